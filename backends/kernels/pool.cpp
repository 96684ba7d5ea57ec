// Threads for callers that have no pool of their own, and layers that run on them.
//
// A call splits its work once, evenly, and the calling thread takes the first part. Workers wait
// for the next call awake for some tens of microseconds, the time between two layers of a token,
// and then sleep. A pool serves one call at a time: a call that finds it busy, from another thread
// or from inside a body, does its work alone, so no two calls wait for each other.
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "bitdistill_kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

constexpr int kSpins = 2000;               // of 15 to 50 ns
constexpr int64_t kShareOfTokens = 16384;  // elements to quantise that are worth a second thread

inline void pause_briefly() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ volatile("yield");
#endif
}

struct Job {
  BdBody body;
  void *context;
  int64_t total;
  int parts;

  void run(int part) const {
    const int64_t first = total * part / parts;
    const int64_t last = total * (part + 1) / parts;
    if (first < last) body(context, first, last);
  }
};

}  // namespace

struct BdPool {
  std::mutex busy;  // held by the one call that is served
  std::mutex sleep;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  Job job = {};  // written before `calls` rises, read after
  // Each on a cache line of its own: workers poll the first while others count down the second.
  alignas(64) std::atomic<uint64_t> calls{0};
  alignas(64) std::atomic<int> unfinished{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stopping{false};

  // After an exception the destructor still ends the workers that were started.
  void start(int threads) {
    for (int part = 1; part < threads; ++part) workers.emplace_back([this, part] { work(part); });
  }

  // A sleeper counts itself before it looks at `calls`, and a caller raises `calls` before it looks
  // for sleepers, in one order that all threads see: one of the two notices the other.
  void wait_for_call(uint64_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      if (calls.load(std::memory_order_acquire) != seen) return;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(sleep);
    sleeping.fetch_add(1);
    wake.wait(lock, [&] { return calls.load() != seen; });
    sleeping.fetch_sub(1);
  }

  void work(int part) {
    for (uint64_t seen = 0;; ++seen) {
      wait_for_call(seen);
      if (stopping.load()) return;
      job.run(part);
      unfinished.fetch_sub(1, std::memory_order_release);
    }
  }

  void call_workers() {
    calls.fetch_add(1);
    if (sleeping.load() == 0) return;
    const std::lock_guard<std::mutex> lock(sleep);
    wake.notify_all();
  }

  void run(const Job &next) {
    const std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    if (!lock.owns_lock()) return next.body(next.context, 0, next.total);
    job = next;
    unfinished.store(static_cast<int>(workers.size()), std::memory_order_relaxed);
    call_workers();
    job.run(0);
    // A worker that has lost its processor needs this one.
    for (int i = 0; unfinished.load(std::memory_order_acquire) != 0; ++i)
      i < kSpins ? pause_briefly() : std::this_thread::yield();
  }

  ~BdPool() {
    stopping.store(true);
    call_workers();
    for (std::thread &worker : workers) worker.join();
  }
};

namespace {

void run_parts(BdPool *pool, int64_t total, BdBody body, void *context) {
  if (total <= 0) return;
  if (pool == nullptr || total == 1 || pool->workers.empty()) return body(context, 0, total);
  pool->run({body, context, total, static_cast<int>(pool->workers.size()) + 1});
}

struct Layer {
  const BdKernels *kernels;
  const BdTernary *w;
  const BdInput *in;
  const BdTokens *tokens;
  float *y;
  bool floats;
};

void prepare_part(void *context, int64_t first, int64_t last) {
  const Layer &l = *static_cast<const Layer *>(context);
  (l.floats ? l.kernels->normalize : l.kernels->quantize)(l.in, l.tokens, first, last);
}

void multiply_part(void *context, int64_t first, int64_t last) {
  const Layer &l = *static_cast<const Layer *>(context);
  (l.floats ? l.kernels->ternary_float : l.kernels->ternary)(l.w, l.tokens, l.y, first, last);
}

}  // namespace

extern "C" {

// Nothing may throw across a C interface: a system without more threads, or without memory, is
// null.
BdPool *bd_pool_create(int threads) {
  if (threads < 1) return nullptr;
  try {
    auto pool = std::make_unique<BdPool>();
    pool->start(threads);
    return pool.release();
  } catch (const std::system_error &) {
    return nullptr;
  } catch (const std::bad_alloc &) {
    return nullptr;
  }
}

void bd_pool_destroy(BdPool *pool) { delete pool; }

int bd_pool_threads(const BdPool *pool) { return static_cast<int>(pool->workers.size()) + 1; }

void bd_pool_run(BdPool *pool, int64_t total, BdBody body, void *context) {
  run_parts(pool, total, body, context);
}

void bd_ternary_layers(const BdKernels *kernels, const BdTernary *w, int count, const BdInput *in,
                       int activation_bits, void *scratch, BdPool *pool, float *const *y) {
  const BdTokens tokens = bd_tokens(scratch, in->tokens, in->columns, activation_bits);
  Layer layer = {kernels, w, in, &tokens, nullptr, activation_bits == 0};
  const bool small = in->tokens * in->columns < kShareOfTokens;
  run_parts(small ? nullptr : pool, in->tokens, prepare_part, &layer);
  for (int i = 0; i < count; ++i) {
    layer.w = w + i;
    layer.y = y[i];
    run_parts(pool, bd_blocks(layer.w->rows), multiply_part, &layer);
  }
}

}  // extern "C"
