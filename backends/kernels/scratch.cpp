#include "scratch.h"

#include <stdlib.h>

#include "work_memory.h"

namespace bitdistill {
namespace {

struct ThreadMemory {
  void *data = nullptr;
  size_t bytes = 0;
  bool busy = false;
  ~ThreadMemory() { free(data); }
};

thread_local ThreadMemory memory;

}  // namespace

Scratch::Scratch(size_t bytes) : data_(nullptr), kept_(!memory.busy) {
  if (!kept_) {
    data_ = malloc(bytes);
    return;
  }
  if (memory.bytes < bytes) {
    free(memory.data);
    memory.data = malloc(bytes);
    memory.bytes = memory.data != nullptr ? bytes : 0;
  }
  memory.busy = true;
  data_ = memory.data;
}

Scratch::~Scratch() {
  if (kept_)
    memory.busy = false;
  else
    free(data_);
}

void Scratch::release() {
  if (memory.busy || memory.bytes <= kKeptBytes) return;
  free(memory.data);
  memory.data = nullptr;
  memory.bytes = 0;
}

}  // namespace bitdistill
