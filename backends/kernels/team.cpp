#include "team.h"

#include <thread>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#include <immintrin.h>
#endif

namespace bitdistill {
namespace {

// Waiting costs the processor's other hardware thread little, and after a while lets others run: a
// thread that is waited for may need this processor.
class Wait {
 public:
  void once() {
    if (++turns_ > kTurns) {
      std::this_thread::yield();
      return;
    }
#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
    _mm_pause();
#endif
  }

 private:
  static constexpr int kTurns = 4096;
  int turns_ = 0;
};

}  // namespace

void Team::take() {
  for (;;) {
    const size_t index = next_.fetch_add(1);
    if (index >= count_) return;
    body_(data_, index);
    done_.fetch_add(1);
  }
}

void Team::run(Run body, void *data, size_t count) {
  body_ = body, data_ = data, count_ = count;
  next_.store(0);
  done_.store(0);
  open_.store(true);
  state_.fetch_add(1);
  take();
  Wait wait;
  while (done_.load() < count) wait.once();
  // One that comes now finds the loop over; the loop's members change when none is looking at them.
  open_.store(false);
  while (helping_.load() != 0) wait.once();
}

void Team::help() {
  uint64_t seen = 0;
  Wait wait;
  for (;;) {
    const uint64_t state = state_.load();
    if (state == kFinished) return;
    if (state == seen) {
      wait.once();
      continue;
    }
    seen = state;
    helping_.fetch_add(1);
    if (open_.load()) take();
    helping_.fetch_sub(1);
    wait = Wait();
  }
}

}  // namespace bitdistill
