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

// Parts that threads take as they come, as tiles of tokens are: a core that is slowed down takes
// fewer, and no thread waits for another longer than a part lasts.
struct Parts {
  Parts(int64_t all, int64_t each) : count((all + each - 1) / each), size(each), total(all) {}

  // body(first, last) on each part that this thread takes.
  template <class Body>
  void take(Body body) {
    for (int64_t part = next.fetch_add(1); part < count; part = next.fetch_add(1)) {
      const int64_t last = (part + 1) * size;
      body(part * size, last < total ? last : total);
    }
  }

  const int64_t count, size, total;
  alignas(64) std::atomic<int64_t> next{0};  // in a line of its own: all write it
};

// Seconds until every thread of a pool has called body(context, ...) once.
double time_of(BdPool *pool, BdBody body, void *context) {
  const double start = seconds_now();
  bd_pool_run(pool, pool != nullptr ? bd_pool_threads(pool) : 1, body, context);
  return seconds_now() - start;
}

constexpr int64_t kRounds = 1 << 21;      // some 5 ms of a core
constexpr int64_t kPartRounds = 1 << 15;  // some 80 us

struct Run {
  Rounds rounds;
  Parts parts;
  std::atomic<int64_t> operations;
};

double rate_of(Rounds rounds, int64_t count, BdPool *pool) {
  Run run = {rounds, {count, kPartRounds}, {0}};
  const double seconds = time_of(
      pool,
      [](void *context, int64_t, int64_t) {
        Run &r = *static_cast<Run *>(context);
        double done = 0;
        r.parts.take([&](int64_t first, int64_t last) { done += r.rounds(last - first); });
        r.operations += static_cast<int64_t>(done);
      },
      &run);
  return static_cast<double>(run.operations) / seconds;
}

// The first run wakes threads that sleep: for a millisecond after it they are slower.
double rate_of(Rounds rounds, BdPool *pool) {
  if (rounds == nullptr) return 0;
  rate_of(rounds, kRounds, pool);
  return rate_of(rounds, kRounds, pool);
}

struct Read {
  const uint8_t *data;
  int64_t streams, ahead;
  Parts parts;
  std::atomic<uint64_t> sum;
};

constexpr int64_t kStep = 128;          // bytes of a stream, two lines, that are read in turn
constexpr int64_t kPartRead = 1 << 20;  // bytes

void fetch(const uint8_t *p) {
#if defined(__GNUC__)
  __builtin_prefetch(p);
  __builtin_prefetch(p + 64);
#else
  static_cast<void>(p);
#endif
}

// A word of each line: memory gives whole lines, and nothing else takes time. The sum is used, so
// nothing may be left out. `streams` places are read in turn, as the kernels read rows: one place
// alone may not use all of the memory.
uint64_t read_lines(const uint8_t *p, int64_t bytes, int64_t streams, int64_t ahead) {
  uint64_t sum = 0;
  const int64_t each = bytes / streams / kStep * kStep;
  for (int64_t i = 0; i < each; i += kStep)
    for (int64_t s = 0; s < streams; ++s) {
      const uint8_t *at = p + s * each + i;
      if (ahead > 0) fetch(at + ahead);
      uint64_t words[2];
      memcpy(words, at, sizeof words[0]);
      memcpy(words + 1, at + kStep / 2, sizeof words[1]);
      sum += words[0] + words[1];
    }
  return sum;
}

}  // namespace

extern "C" {

double bd_rate_fma(const char *isa, BdPool *pool) {
  return bitdistill::cpu_features().fma ? rate_of(ceiling_of(isa).fma, pool) : 0;
}

double bd_rate_int8(const char *isa, BdPool *pool) { return rate_of(ceiling_of(isa).int8, pool); }

double bd_time_read(const uint8_t *bytes, int64_t count, int64_t streams, int64_t ahead,
                    BdPool *pool) {
  Read read = {bytes, streams, ahead, {count, kPartRead}, {0}};
  return time_of(
      pool,
      [](void *context, int64_t, int64_t) {
        Read &r = *static_cast<Read *>(context);
        r.parts.take([&](int64_t first, int64_t last) {
          r.sum += read_lines(r.data + first, last - first, r.streams, r.ahead);
        });
      },
      &read);
}

double bd_time_ternary(const BdKernels *kernels, const BdTernary *copies, int count,
                       const BdInput *in, void *scratch, BdPool *pool, float *y) {
  const double start = seconds_now();
  for (int i = 0; i < count; ++i)
    bd_ternary_layers(kernels, copies + i, 1, in, 8, scratch, pool, &y);
  return seconds_now() - start;
}

}  // extern "C"
