// Where the products of trits end: sums of one token and one block of rows are scaled and put into
// y. Internal linkage, as common.h explains.
#ifndef BITDISTILL_ROWS_H
#define BITDISTILL_ROWS_H

#include "gate.h"

namespace {

// y as BdTernary::update asks.
inline void update_rows(int update, const float *values, int64_t count, float *y) {
  switch (update) {
    case BD_ADD:
      for (int64_t r = 0; r < count; ++r) y[r] += values[r];
      return;
    case BD_SILU:
      for (int64_t r = 0; r < count; ++r) y[r] = activated<true>(y[r]) * values[r];
      return;
    case BD_GELU_TANH:
      for (int64_t r = 0; r < count; ++r) y[r] = activated<false>(y[r]) * values[r];
      return;
    default:
      memcpy(y, values, static_cast<size_t>(count) * sizeof *y);
  }
}

// Products of a row's sum and its scale -> y, with what there is to be added.
inline void finish_rows(const BdTernary *w, int64_t first, int64_t count, float *values, float *y) {
  if (w->bias != nullptr)
    for (int64_t r = 0; r < count; ++r) values[r] += w->bias[first + r];
  update_rows(w->update, values, count, y + first);
}

// Scales the integer sums of one token and one block of rows into y, row by row.
inline void write_rows(const BdTernary *w, int64_t block, const int32_t *dots, int32_t sum,
                       float down, float *y) {
  const int64_t first = block * BD_BLOCK_ROWS;
  const int64_t count = smaller(BD_BLOCK_ROWS, w->rows - first);
  const float *scale = w->scale + first;
  float values[BD_BLOCK_ROWS];
  for (int64_t r = 0; r < count; ++r)
    values[r] = static_cast<float>(dots[r] - sum) * (down * scale[r]);
  finish_rows(w, first, count, values, y);
}

// The same for the sums of the fp32 path.
inline void write_float_rows(const BdTernary *w, int64_t block, const float *dots, float *y) {
  const int64_t first = block * BD_BLOCK_ROWS;
  const int64_t count = smaller(BD_BLOCK_ROWS, w->rows - first);
  float values[BD_BLOCK_ROWS];
  for (int64_t r = 0; r < count; ++r) values[r] = dots[r] * w->scale[first + r];
  finish_rows(w, first, count, values, y);
}

}  // namespace
#endif
