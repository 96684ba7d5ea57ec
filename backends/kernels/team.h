// Threads of the host's pool that stay together for several loops of one call: between two of them
// they watch for the next one, which takes a tenth of a microsecond where handing a loop to a pool
// takes several. A decoded token has a hundred loops of a few dozen microseconds.
//
// One thread leads and is never kept waiting by one that has not come: what a loop is divided into
// is taken piece by piece, by the leader alone if need be.
#ifndef BITDISTILL_TEAM_H
#define BITDISTILL_TEAM_H

#include <stddef.h>
#include <stdint.h>

#include <atomic>

namespace bitdistill {

class Team {
 public:
  using Run = void (*)(void *data, size_t index);

  // Whoever calls this first is to lead: it does its work, whose loops go to `run`, and then calls
  // `finish`. All others call `help`.
  bool leads() { return !led_.exchange(true); }

  // body(data, index) for every index below count, by the leader and those who help.
  void run(Run body, void *data, size_t count);

  // Takes part in loops until `finish`.
  void help();

  void finish() { state_.store(kFinished); }

 private:
  static constexpr uint64_t kFinished = UINT64_MAX;

  void take();

  std::atomic<bool> led_{false};
  std::atomic<uint64_t> state_{0};  // how many loops there have been, or kFinished
  std::atomic<bool> open_{false};   // the members below are those of a loop that is not over
  std::atomic<size_t> helping_{0};
  std::atomic<size_t> next_{0}, done_{0};
  Run body_ = nullptr;
  void *data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace bitdistill
#endif
