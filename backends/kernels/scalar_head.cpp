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

void block_dots4(const BdTable *w, int64_t block, const int8_t *q, int32_t *dots) {
  const uint8_t *codes = table_block(w, block);
  const int8_t *scales = table_scales(w, block);
  for (int r = 0; r < BD_TABLE_ROWS; ++r) dots[r] = 0;
  for (int64_t g = 0; g < table_groups(w->columns); ++g) {
    for (int r = 0; r < BD_TABLE_ROWS; ++r) dots[r] += scales[r] * group_dot(codes, q, r);
    codes += BD_TABLE_BYTES;
    scales += BD_TABLE_ROWS;
    q += BD_TABLE_COLUMNS;
  }
}

void int4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  int32_t high[BD_TABLE_ROWS];
  int32_t low[BD_TABLE_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens; ++token) {
      block_dots4(w, block, head_part(in, token, 0), high);
      block_dots4(w, block, head_part(in, token, 1), low);
      write_table_rows(w, block, high, low, in->down[token], y + token * w->rows);
    }
}

}  // namespace

namespace bitdistill {
const BdHeadKernels scalar_heads = {half, int8, int4};
}  // namespace bitdistill
