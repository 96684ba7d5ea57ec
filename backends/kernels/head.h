// What the heads of every instruction set share: scaling integer sums, and the order of a 4-bit
// block. Internal linkage, as common.h explains.
#ifndef BITDISTILL_HEAD_H
#define BITDISTILL_HEAD_H

#include "common.h"

namespace bitdistill {
extern const BdHeadKernels scalar_heads;
}

namespace {

inline int64_t table_groups(int64_t columns) {
  return (columns + BD_TABLE_COLUMNS - 1) / BD_TABLE_COLUMNS;
}

// The sums of the high and the low parts of q, put together: at most 128 * 8 * 8064 K < 2^38.
inline int64_t whole_sum(int32_t high, int32_t low) {
  return static_cast<int64_t>(high) * 128 + low;
}

inline float head_value(int64_t sum, float down, float scale) {
  return static_cast<float>(sum) * (down * scale);
}

// Where a token's parts begin, for a table of 8 bits.
inline const int8_t *head_part(const BdHeadTokens *in, int64_t token, int part) {
  return in->parts + (2 * token + part) * in->stride;
}

inline const int16_t *head_sums(const BdHeadTokens *in, int64_t token, int part) {
  return in->sums + (2 * token + part) * (in->stride / BD_TABLE_COLUMNS);
}

// Of a token, for a table of 4 bits.
inline const int8_t *group_q(const BdHeadTokens *in, int64_t token) {
  return in->parts + token * in->stride;
}

inline const int16_t *group_sums(const BdHeadTokens *in, int64_t token) {
  return in->sums + token * (in->stride / BD_TABLE_COLUMNS);
}

inline const float *group_downs(const BdHeadTokens *in, int64_t token) {
  return in->down + token * (in->stride / BD_TABLE_COLUMNS);
}

// 128 times the sum of a token's q: what products of codes 0..255 owe to those of code - 128.
inline int64_t head_owed(const BdHeadTokens *in, int64_t token) {
  int64_t total = 0;
  for (int64_t g = 0; g < table_groups(in->columns); ++g)
    total += whole_sum(head_sums(in, token, 0)[g], head_sums(in, token, 1)[g]);
  return 128 * total;
}

// Scales the sums of one token and one block of 16 rows into y.
inline void write_table_rows(const BdTable *w, int64_t block, const float *sums, float *y) {
  const int64_t first = block * BD_TABLE_ROWS;
  const int64_t count = smaller(BD_TABLE_ROWS, w->rows - first);
  for (int64_t r = 0; r < count; ++r) y[first + r] = sums[r] * w->scale[first + r];
}

// Row-major tables are read as R streams, each in order, rather than R neighbouring rows: those
// came from memory at a third of the rate. Where every token passes at once the streams are as long
// as the range allows; else the rows of a strip stay in the cache until all tokens have passed.
constexpr int64_t kStripRows = 128;

inline int64_t strip_rows(int64_t tokens, int most, int64_t rows) {
  return tokens <= most ? rows : smaller(kStripRows, rows);
}

inline const uint8_t *table_block(const BdTable *w, int64_t block) {
  return w->codes + block * table_groups(w->columns) * BD_TABLE_BYTES;
}

inline const int8_t *table_scales(const BdTable *w, int64_t block) {
  return w->group_scale + block * table_groups(w->columns) * BD_TABLE_ROWS;
}

}  // namespace
#endif
