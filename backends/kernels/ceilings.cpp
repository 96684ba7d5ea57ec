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
  std::atomic<uint64_t> sum;
};

// Sixteen independent words a step; the sum is used, so nothing may be left out.
uint64_t read_lines(const uint8_t *p, int64_t first, int64_t last) {
  uint64_t sums[16] = {};
  for (int64_t i = first; i + 128 <= last; i += 128) {
    uint64_t words[16];
    memcpy(words, p + i, sizeof words);
    for (int k = 0; k < 16; ++k) sums[k] += words[k];
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum += s;
  return sum;
}

}  // namespace

extern "C" {

double bd_rate_fma(const char *isa, BdPool *pool) {
  return bitdistill::cpu_features().fma ? rate_of(ceiling_of(isa).fma, pool) : 0;
}

double bd_rate_int8(const char *isa, BdPool *pool) { return rate_of(ceiling_of(isa).int8, pool); }

double bd_time_read(const uint8_t *bytes, int64_t count, BdPool *pool) {
  Bytes read = {bytes, {0}};
  const double start = seconds_now();
  bd_pool_run(
      pool, count,
      [](void *context, int64_t first, int64_t last) {
        Bytes &b = *static_cast<Bytes *>(context);
        b.sum += read_lines(b.data, first, last);
      },
      &read);
  return seconds_now() - start;
}

double bd_time_ternary(const BdKernels *kernels, const BdTernary *copies, int count,
                       const BdInput *in, void *scratch, BdPool *pool, float *y) {
  const double start = seconds_now();
  for (int i = 0; i < count; ++i)
    bd_ternary_layers(kernels, copies + i, 1, in, 8, scratch, pool, &y);
  return seconds_now() - start;
}

}  // extern "C"
