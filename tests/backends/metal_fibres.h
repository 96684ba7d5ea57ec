// The threads of a Metal threadgroup as fibres that take turns; see metal_shim.cpp.

#pragma once

#include <ucontext.h>
#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace fibres {

constexpr int kSimd = 32, kStack = 1 << 16;

// Threads that wait for each other, and what each of them shows to the others.
struct Group {
  int size = 0, arrived = 0;
  uint64_t round = 0;
  float values[kSimd] = {};
};

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int lane = 0;
  Group *simdgroup = nullptr;
  bool done = false;
};

inline ucontext_t scheduler;
inline Fibre *current = nullptr;
inline Group *threadgroup = nullptr;
inline std::function<void(int)> body;
inline std::vector<Fibre> all;

inline void wait(Group &group) {
  const uint64_t round = group.round;
  if (++group.arrived == group.size) {
    group.arrived = 0;
    ++group.round;
  }
  while (group.round == round) swapcontext(&current->context, &scheduler);
}

inline void enter(int index) {
  body(index);
  all[size_t(index)].done = true;
}

// Runs `task(thread)` for every thread of a threadgroup.
inline void run(int threads, std::function<void(int)> task) {
  std::vector<Group> simdgroups(size_t(threads / kSimd));
  Group whole;
  whole.size = threads;
  threadgroup = &whole;
  body = std::move(task);
  all = std::vector<Fibre>(size_t(threads));
  for (int index = 0; index < threads; ++index) {
    Fibre &fibre = all[size_t(index)];
    fibre.lane = index % kSimd;
    fibre.simdgroup = &simdgroups[size_t(index / kSimd)];
    fibre.simdgroup->size = kSimd;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.get();
    fibre.context.uc_stack.ss_size = kStack;
    fibre.context.uc_link = &scheduler;
    makecontext(&fibre.context, reinterpret_cast<void (*)()>(enter), 1, index);
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (Fibre &fibre : all) {
      if (fibre.done) continue;
      busy = true;
      current = &fibre;
      swapcontext(&scheduler, &fibre.context);
    }
  }
}

// Sum over the `count` lanes from `first` on.
inline float sum(float value, int first, int count) {
  Group &group = *current->simdgroup;
  group.values[current->lane] = value;
  wait(group);
  float total = 0;
  for (int lane = first; lane < first + count; ++lane) total += group.values[lane];
  wait(group);
  return total;
}

}  // namespace fibres
