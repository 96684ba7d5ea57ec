// The benchmark's measurements: ceilings of the machine and passes over copies of a layer.
#include "ceilings.h"

#include <string.h>

#include <atomic>
#include <chrono>

#include "bitdistill_bench.h"
#include "cpu.h"

namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

using Rounds = double (*)(int64_t rounds);

struct Ceiling {
  const char *isa;
  Rounds fma;
  Rounds int8;
};

constexpr Ceiling kCeilings[] = {
#if defined(BD_AMX)
    {"amx", bitdistill::avx512_fma_rounds, bitdistill::amx_int8_rounds},
#endif
#if defined(BD_AVX512_VNNI)
    {"avx512-vnni", bitdistill::avx512_fma_rounds, bitdistill::avx512_vnni_int8_rounds},
#endif
#if defined(BD_AVX_VNNI)
    {"avx-vnni", bitdistill::avx2_fma_rounds, bitdistill::avx_vnni_int8_rounds},
#endif
#if defined(__x86_64__) || defined(_M_X64)
    {"avx2", bitdistill::avx2_fma_rounds, bitdistill::avx2_int8_rounds},
#endif
    {"scalar", nullptr, nullptr},
};

Ceiling ceiling_of(const char *isa) {
  for (const Ceiling &ceiling : kCeilings)
    if (strcmp(ceiling.isa, isa) == 0 && bd_kernels(isa) != nullptr) return ceiling;
  return {isa, nullptr, nullptr};
}

struct Run {
  Rounds rounds;
  int64_t count;
  std::atomic<int64_t> operations;
};

// Best of several runs of about 10 ms: interruptions only slow a loop down.
double rate_of(Rounds rounds, BdPool *pool) {
  if (rounds == nullptr) return 0;
  double best = 0;
  for (int i = 0; i < 9; ++i) {
    Run run = {rounds, 1 << 21, {0}};
    const double start = seconds_now();
    bd_pool_run(
        pool, pool != nullptr ? bd_pool_threads(pool) : 1,
        [](void *context, int64_t, int64_t) {
          Run &r = *static_cast<Run *>(context);
          r.operations += static_cast<int64_t>(r.rounds(r.count));
        },
        &run);
    const double rate = static_cast<double>(run.operations) / (seconds_now() - start);
    best = rate > best ? rate : best;
  }
  return best;
}

struct Bytes {
  const uint8_t *data;
  int64_t streams;
  std::atomic<uint64_t> sum;
};

constexpr int64_t kStep = 128;    // bytes of a stream that are read in turn
constexpr int64_t kAhead = 2048;  // bytes ahead that are fetched

void fetch(const uint8_t *p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
  __builtin_prefetch(p + 64);
#else
  static_cast<void>(p);
#endif
}

// Sixteen independent words a step; the sum is used, so nothing may be left out. `streams` places
// are read in turn, as the kernels read rows: one place alone may not use all of the memory.
uint64_t read_lines(const uint8_t *p, int64_t bytes, int64_t streams) {
  uint64_t sums[16] = {};
  const int64_t each = bytes / streams / kStep * kStep;
  for (int64_t i = 0; i < each; i += kStep)
    for (int64_t s = 0; s < streams; ++s) {
      const uint8_t *at = p + s * each + i;
      fetch(at + kAhead);
      uint64_t words[16];
      memcpy(words, at, sizeof words);
      for (int k = 0; k < 16; ++k) sums[k] += words[k];
    }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum += s;
  return sum;
}

double time_of(const uint8_t *bytes, int64_t count, int64_t streams, BdPool *pool) {
  Bytes read = {bytes, streams, {0}};
  const double start = seconds_now();
  bd_pool_run(
      pool, count,
      [](void *context, int64_t first, int64_t last) {
        Bytes &b = *static_cast<Bytes *>(context);
        b.sum += read_lines(b.data + first, last - first, b.streams);
      },
      &read);
  return seconds_now() - start;
}

}  // namespace

extern "C" {

double bd_rate_fma(const char *isa, BdPool *pool) {
  return bitdistill::cpu_features().fma ? rate_of(ceiling_of(isa).fma, pool) : 0;
}

double bd_rate_int8(const char *isa, BdPool *pool) { return rate_of(ceiling_of(isa).int8, pool); }

// The better of one stream and four.
double bd_time_read(const uint8_t *bytes, int64_t count, BdPool *pool) {
  const double one = time_of(bytes, count, 1, pool), four = time_of(bytes, count, 4, pool);
  return one < four ? one : four;
}

double bd_time_ternary(const BdKernels *kernels, const BdTernary *copies, int count,
                       const BdInput *in, void *scratch, BdPool *pool, float *y) {
  const double start = seconds_now();
  for (int i = 0; i < count; ++i)
    bd_ternary_layers(kernels, copies + i, 1, in, 8, scratch, pool, &y);
  return seconds_now() - start;
}

}  // extern "C"
