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
#include "split.h"

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

// One part, on a cache line of its own: the numbers of the last call for which someone took it, and
// for which its worker finished it.
struct alignas(64) Part {
  std::atomic<uint64_t> taken{0};
  std::atomic<uint64_t> done{0};

  bool take(uint64_t call) {
    uint64_t last = taken.load(std::memory_order_relaxed);
    return last < call && taken.compare_exchange_strong(last, call, std::memory_order_acq_rel);
  }
};

}  // namespace

struct BdPool {
  std::mutex busy;  // held by the one call that is served
  std::mutex sleep;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  std::unique_ptr<Part[]> parts;
  // Written before `calls` rises. A call ends when all its parts are taken and done, so whoever
  // takes a part of a call reads that call's job.
  Job job = {};
  alignas(64) std::atomic<uint64_t> calls{0};
  alignas(64) std::atomic<int> sleeping{0};
  std::atomic<bool> stopping{false};

  // After an exception the destructor still ends the workers that were started.
  void start(int threads) {
    parts = std::make_unique<Part[]>(static_cast<size_t>(threads));
    for (int part = 1; part < threads; ++part) workers.emplace_back([this, part] { work(part); });
  }

  // A sleeper counts itself before it looks at `calls`, and a caller raises `calls` before it looks
  // for sleepers, in one order that all threads see: one of the two notices the other.
  uint64_t next_call(uint64_t seen) {
    for (int i = 0; i < kSpins; ++i) {
      const uint64_t call = calls.load(std::memory_order_acquire);
      if (call != seen) return call;
      pause_briefly();
    }
    std::unique_lock<std::mutex> lock(sleep);
    sleeping.fetch_add(1);
    wake.wait(lock, [&] { return calls.load() != seen; });
    sleeping.fetch_sub(1);
    return calls.load();
  }

  void work(int part) {
    uint64_t call = 0;
    for (;;) {
      call = next_call(call);
      if (stopping.load()) return;
      if (!parts[part].take(call)) continue;
      job.run(part);
      parts[part].done.store(call, std::memory_order_release);
    }
  }

  uint64_t call_workers() {
    const uint64_t call = calls.fetch_add(1) + 1;
    if (sleeping.load() == 0) return call;
    const std::lock_guard<std::mutex> lock(sleep);
    wake.notify_all();
    return call;
  }

  void finish(int part, uint64_t call) {
    if (parts[part].take(call)) return job.run(part);
    // A worker that has lost its processor needs this one.
    for (int i = 0; parts[part].done.load(std::memory_order_acquire) != call; ++i)
      i < kSpins ? pause_briefly() : std::this_thread::yield();
  }

  void run(const Job &next) {
    const std::unique_lock<std::mutex> lock(busy, std::try_to_lock);
    if (!lock.owns_lock()) return next.body(next.context, 0, next.total);
    job = next;
    const uint64_t call = call_workers();
    job.run(0);
    for (int part = 1; part < job.parts; ++part) finish(part, call);
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
  void (*product)(const BdTernary *, const BdTokens *, float *, int64_t, int64_t);
  uint8_t *unpacked;
  bitdistill::Split split;
  alignas(64) std::atomic<int64_t> next;  // part of `split`; in a line of its own: all write it
};

void prepare_part(void *context, int64_t first, int64_t last) {
  const Layer &l = *static_cast<const Layer *>(context);
  (l.floats ? l.kernels->normalize : l.kernels->quantize)(l.in, l.tokens, first, last);
}

// One thread's share: the parts that are left when it comes.
void multiply_parts(void *context, int64_t, int64_t) {
  Layer &l = *static_cast<Layer *>(context);
  l.split.take(&l.next, l.product, *l.w, *l.tokens, l.y);
}

void unpack_part(void *context, int64_t first, int64_t last) {
  const Layer &l = *static_cast<const Layer *>(context);
  l.kernels->unpack_base3(l.w, l.unpacked, first, last);
}

// The layer's weights in the layout that its product reads best. Without memory to unpack them they
// stay as they are, and take longer.
BdTernary chosen(Layer &l, const BdTernary &w, BdPool *pool, std::unique_ptr<uint8_t[]> *memory) {
  BdTernary use = w;
  l.product = l.floats ? l.kernels->ternary_float : l.kernels->ternary;
  if (w.base3 == 0) return use;
  if (l.in->tokens >= BD_UNPACKED_TOKENS)
    memory->reset(new (std::nothrow)
                      uint8_t[static_cast<size_t>(bd_packed_bytes(w.rows, w.columns))]);
  if (*memory == nullptr) {
    l.product = l.kernels->ternary_base3;
    return use;
  }
  l.w = &w;
  l.unpacked = memory->get();
  run_parts(pool, bd_blocks(w.rows), unpack_part, &l);
  use.packed = l.unpacked;
  return use;
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
  if (in->tokens == 0) return;
  const BdTokens tokens = bd_tokens(scratch, in->tokens, in->columns, activation_bits);
  const int threads = pool != nullptr ? bd_pool_threads(pool) : 1;
  const bitdistill::Split none(1, 1, 1, 1, false);
  Layer layer = {kernels, nullptr, in,   &tokens, nullptr, activation_bits == 0,
                 nullptr, nullptr, none, {0}};
  const bool small = in->tokens * in->columns < kShareOfTokens;
  run_parts(small ? nullptr : pool, in->tokens, prepare_part, &layer);
  for (int i = 0; i < count; ++i) {
    std::unique_ptr<uint8_t[]> memory;
    const BdTernary use = chosen(layer, w[i], pool, &memory);
    layer.w = &use;
    layer.y = y[i];
    layer.split = bitdistill::Split(in->tokens, bd_blocks(use.rows), threads, 1,
                                    kernels->by_tokens != 0 && layer.product == kernels->ternary);
    layer.next.store(0);
    run_parts(pool, threads, multiply_parts, &layer);
  }
}

void bd_ternary_linear(const BdKernels *kernels, const BdTernary *w, const BdInput *in,
                       int activation_bits, void *scratch, float *y) {
  bd_ternary_layers(kernels, w, 1, in, activation_bits, scratch, nullptr, &y);
}

}  // extern "C"
