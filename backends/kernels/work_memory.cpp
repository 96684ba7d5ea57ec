#include "work_memory.h"

#include <stdint.h>
#include <stdlib.h>

namespace bitdistill {
namespace {

constexpr size_t kAlignment = 64;

struct Memory {
  void *data = nullptr;
  size_t bytes = 0;
  ~Memory() { free(data); }
};

thread_local Memory memory;

}  // namespace

void *work_memory(size_t bytes) {
  if (memory.bytes < bytes) {
    free(memory.data);
    memory.data = calloc(1, bytes + kAlignment);
    memory.bytes = memory.data != nullptr ? bytes : 0;
  }
  if (memory.data == nullptr) return nullptr;
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory.data);
  return reinterpret_cast<void *>((address + kAlignment - 1) / kAlignment * kAlignment);
}

void release_work_memory() {
  if (memory.bytes <= kKeptBytes) return;
  free(memory.data);
  memory.data = nullptr;
  memory.bytes = 0;
}

}  // namespace bitdistill
