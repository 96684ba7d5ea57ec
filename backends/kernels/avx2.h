// What the AVX2 files share: loads, and the functions of their table. Internal linkage for the
// helpers, as common.h explains.
#ifndef BITDISTILL_AVX2_H
#define BITDISTILL_AVX2_H

#include "common.h"

#if BD_X86
namespace bitdistill {
namespace avx2 {
void quantize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last);
void normalize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last);
void gate(const BdGate *in, float *out, int64_t first, int64_t last);
void ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
// Prefill by tables (lookup.h): the number of leading tokens whose results it wrote.
int64_t lookup(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
void ternary_float(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
void unpack_base3(const BdTernary *w, uint8_t *out, int64_t first, int64_t last);
void head4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last);
extern const BdHeadKernels heads;
extern const BdAttentionKernels attention;
}  // namespace avx2
}  // namespace bitdistill

// avx2.cpp itself is compiled without AVX2: it asks whether the CPU has it.
#if defined(__AVX2__)
#include <immintrin.h>

// GCC reassociates the integer sums of a tile and then spills its registers; the empty statement
// ties each sum to its place (1.3 times faster; clang needs no help).
#if defined(__GNUC__) && !defined(__clang__)
#define BD_IN_ORDER(v) __asm__("" : "+x"(v))
#else
#define BD_IN_ORDER(v) static_cast<void>(v)
#endif

#if defined(_MSC_VER)
#define BD_NOINLINE __declspec(noinline)
#else
#define BD_NOINLINE __attribute__((noinline))
#endif

namespace {

constexpr int kVectors = BD_BLOCK_ROWS / 8;  // a block of 32 rows is four vectors of 8 lanes
constexpr int kPrefetch = 2048;              // bytes ahead of the weights being read

inline __m256i load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline void store(void *p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i *>(p), v); }

// Four activations, in every 32-bit lane.
inline __m256i quad(const int8_t *q) {
  int32_t bits;
  memcpy(&bits, q, sizeof bits);
  return _mm256_set1_epi32(bits);
}

// One token: several blocks pass side by side, a run of groups of each in turn, while lines of all
// of them are fetched in turn for the runs that follow: memory gives more of several pages than of
// one.
constexpr int kStreams = 4;

inline void fetch_group(const uint8_t *w) {
  _mm_prefetch(reinterpret_cast<const char *>(w), _MM_HINT_T0);
  _mm_prefetch(reinterpret_cast<const char *>(w + 64), _MM_HINT_T0);
}

}  // namespace
#endif
#endif
#endif
