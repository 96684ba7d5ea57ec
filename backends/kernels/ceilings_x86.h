// A round of a ceiling: `kSums` independent sums, so that latency does not bind. The empty
// statement keeps the compiler from folding the loop.
#ifndef BITDISTILL_CEILINGS_X86_H
#define BITDISTILL_CEILINGS_X86_H

#include <immintrin.h>

#include "ceilings.h"

namespace {

constexpr int kSums = 12;

#if defined(__GNUC__)
#define BD_KEEP(value) __asm__ volatile("" : "+v"(value))
#define BD_INLINE inline __attribute__((always_inline))
#else
#define BD_KEEP(value) static_cast<void>(value)
#define BD_INLINE inline
#endif

#define BD_STEP(i)         \
  sums[i] = step(sums[i]); \
  BD_KEEP(sums[i]);

// Inlined and written out: GCC keeps an array that it must index, or hand over, in memory.
template <class Type, class Step>
BD_INLINE double rounds_of(int64_t rounds, Type start, int operations, Step step) {
  Type sums[kSums] = {start, start, start, start, start, start,
                      start, start, start, start, start, start};
  for (int64_t i = 0; i < rounds; ++i) {
    BD_STEP(0)
    BD_STEP(1)
    BD_STEP(2)
    BD_STEP(3)
    BD_STEP(4) BD_STEP(5) BD_STEP(6) BD_STEP(7) BD_STEP(8) BD_STEP(9) BD_STEP(10) BD_STEP(11)
  }
  return static_cast<double>(rounds) * kSums * operations;
}

}  // namespace
#endif
