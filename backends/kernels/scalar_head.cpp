// The oracle of the three heads, for any CPU.
#include "half.h"
#include "head.h"

namespace {

void half(const BdHalfTable *w, const float *x, int64_t tokens, float *y, int64_t first,
          int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t token = 0; token < tokens; ++token) {
      const uint16_t *table = w->table + row * w->columns;
      float lanes[kLanes] = {};
      for (int64_t i = 0; i < w->columns; ++i)
        lanes[i % kLanes] += x[token * w->columns + i] * from_half(table[i]);
      y[token * w->rows + row] = fold(lanes, kLanes);
    }
}

void int8(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t token = 0; token < in->tokens; ++token) {
      const uint8_t *codes = w->codes + row * w->columns;
      const int16_t *q = in->q + token * in->stride;
      int64_t sum = 0;
      for (int64_t i = 0; i < w->columns; ++i) sum += (codes[i] - 128) * q[i];
      y[token * w->rows + row] = head_value(sum, in->down[token], w->scale[row]);
    }
}

// sum of (code - 8) * q over the 32 columns of one group of row r
int32_t group_dot(const uint8_t *codes, const int8_t *q, int r) {
  int32_t sum = 0;
  for (int s = 0; s < 4; ++s)
    for (int j = 0; j < 4; ++j) {
      const int byte = codes[(BD_TABLE_ROWS * s + r) * 4 + j];
      sum += ((byte & 15) - 8) * q[8 * s + j] + ((byte >> 4) - 8) * q[8 * s + 4 + j];
    }
  return sum;
}

void block_sums4(const BdTable *w, int64_t block, const int8_t *q, const float *downs,
                 float *sums) {
  const uint8_t *codes = table_block(w, block);
  const int8_t *scales = table_scales(w, block);
  for (int r = 0; r < BD_TABLE_ROWS; ++r) sums[r] = 0.0f;
  for (int64_t g = 0; g < table_groups(w->columns); ++g) {
    for (int r = 0; r < BD_TABLE_ROWS; ++r)
      sums[r] += static_cast<float>(scales[r] * group_dot(codes, q, r)) * downs[g];
    codes += BD_TABLE_BYTES;
    scales += BD_TABLE_ROWS;
    q += BD_TABLE_COLUMNS;
  }
}

void int4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  float sums[BD_TABLE_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens; ++token) {
      block_sums4(w, block, group_q(in, token), group_downs(in, token), sums);
      write_table_rows(w, block, sums, y + token * w->rows);
    }
}

}  // namespace

namespace bitdistill {
const BdHeadKernels scalar_heads = {half, int8, int4};
}  // namespace bitdistill
