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

// Scales the sums of one token and rows from `first` on into y, with what there is to be added.
// A whole block of rows, as all but the last one are, has loops of a known length.
template <bool Whole, class Sum>
inline void finish_rows(const BdTernary *w, int64_t first, Sum scaled, float *y) {
  const int64_t count = Whole ? int64_t{BD_BLOCK_ROWS} : w->rows - first;
  const float *scale = w->scale + first;
  float values[BD_BLOCK_ROWS];
  for (int64_t r = 0; r < count; ++r) values[r] = scaled(r, scale[r]);
  if (w->bias != nullptr)
    for (int64_t r = 0; r < count; ++r) values[r] += w->bias[first + r];
  update_rows(w->update, values, count, y + first);
}

template <class Sum>
inline void finish_block(const BdTernary *w, int64_t block, Sum scaled, float *y) {
  const int64_t first = block * BD_BLOCK_ROWS;
  first + BD_BLOCK_ROWS <= w->rows ? finish_rows<true>(w, first, scaled, y)
                                   : finish_rows<false>(w, first, scaled, y);
}

// Integer sums of one token and one block of rows.
inline void write_rows(const BdTernary *w, int64_t block, const int32_t *dots, int32_t sum,
                       float down, float *y) {
  finish_block(
      w, block,
      [=](int64_t r, float scale) { return static_cast<float>(dots[r] - sum) * (down * scale); },
      y);
}

// The same for the sums of the fp32 path.
inline void write_float_rows(const BdTernary *w, int64_t block, const float *dots, float *y) {
  finish_block(w, block, [=](int64_t r, float scale) { return dots[r] * scale; }, y);
}

}  // namespace
#endif
