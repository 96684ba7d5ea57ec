// The parts of attention's C interface that are the same for every instruction set.
#include "attention.h"
#include "work_memory.h"

extern "C" {

int64_t bd_cache_row_bytes(int64_t head_size, int64_t cache_bits) {
  return cache_bits == 8 ? head_size + 4 : head_size * (cache_bits / 8);
}

size_t bd_attention_scratch_bytes(const BdAttention *a, int64_t first_row, int64_t last_row) {
  const Span span = span_of(a, first_row, last_row);
  const int64_t rows = last_row - first_row;
  const int64_t floats =
      rows * (2 * a->head_size + span.padded) + kBlock * a->head_size + 2 * span.padded;
  return static_cast<size_t>(floats) * sizeof(float);
}

int bd_attention(const BdKernels *kernels, const BdAttention *a, int64_t tokens) {
  kernels->attention->keep(a, 0, tokens);
  const int64_t rows = tokens * a->group;
  for (int64_t first = 0; first < rows; first += BD_TILE_ROWS) {
    const int64_t last = smaller(first + BD_TILE_ROWS, rows);
    void *scratch = bitdistill::work_memory(bd_attention_scratch_bytes(a, first, last));
    if (scratch == nullptr) return 0;
    kernels->attention->attend(a, first, last, scratch);
  }
  return 1;
}

}  // extern "C"
