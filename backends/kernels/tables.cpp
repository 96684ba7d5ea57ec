// Quantised embedding tables, the parts that are the same code on every CPU: activations for the
// head, and rows for the embedding. Both are short beside what surrounds them.
#include "head.h"

namespace {

constexpr float kSmallest = 7.888609e-31f;  // 2^-100: below it the quotients could overflow
constexpr float kGroupLevels = 127.0f;

int64_t stride_of(int64_t columns) { return (columns + 63) / 64 * 64 + 64; }
size_t align8(size_t bytes) { return (bytes + 7) / 8 * 8; }

// Bytes of each array of a BdHeadTokens, in their order in memory.
struct HeadSizes {
  size_t down, sums, q, parts;
};

HeadSizes head_sizes(int64_t tokens, int64_t columns, int table_bits) {
  const size_t m = static_cast<size_t>(tokens);
  const size_t stride = static_cast<size_t>(stride_of(columns));
  const size_t groups = stride / BD_TABLE_COLUMNS;
  if (table_bits == 8)
    return {align8(m * sizeof(float)), m * 2 * groups * sizeof(int16_t),
            m * stride * sizeof(int16_t), m * 2 * stride};
  return {m * groups * sizeof(float), m * groups * sizeof(int16_t), 0, m * stride};
}

int32_t largest_magnitude(const float *x, int64_t columns) {
  int32_t top = 0;
  for (int64_t i = 0; i < columns; ++i) {
    const int32_t m = magnitude(x[i]);
    top = m > top ? m : top;
  }
  return top;
}

// up of one token; false if it is zero or not finite, and all its q are zero.
bool head_scale(int32_t g_bits, float *up, float *down) {
  float g;
  memcpy(&g, &g_bits, sizeof g);
  *down = g_bits < kInfinityBits ? g / BD_HEAD_LEVELS : NAN;
  if (g_bits >= kInfinityBits || g < kSmallest) return false;
  *up = BD_HEAD_LEVELS / g;
  return true;
}

// q = 128 * high + low of one element, in its places.
void split(int32_t q, int8_t *high, int8_t *low, int16_t *high_sum, int16_t *low_sum) {
  const int32_t h = (q + 64) >> 7;
  *high = static_cast<int8_t>(h);
  *low = static_cast<int8_t>(q - 128 * h);
  *high_sum = static_cast<int16_t>(*high_sum + *high);
  *low_sum = static_cast<int16_t>(*low_sum + *low);
}

// For a table of 8 bits; all places of `out` are zero before.
void quantize_token(const float *x, const BdHeadTokens *out, int64_t token) {
  const int64_t stride = out->stride;
  const int64_t groups = stride / BD_TABLE_COLUMNS;
  int16_t *q = out->q + token * stride;
  int8_t *parts = out->parts + 2 * token * stride;
  int16_t *sums = out->sums + 2 * token * groups;
  float up;
  if (!head_scale(largest_magnitude(x, out->columns), &up, &out->down[token])) return;
  for (int64_t i = 0; i < out->columns; ++i) {
    q[i] = static_cast<int16_t>(round_even(x[i] * up));
    int16_t *sum = sums + i / BD_TABLE_COLUMNS;
    split(q[i], parts + i, parts + stride + i, sum, sum + groups);
  }
}

// 32 columns, or the last ones, for a table of 4 bits; the places of q and `sum` are zero before.
void quantize_group(const float *x, int64_t columns, int8_t *q, int16_t *sum, float *down) {
  const int32_t g_bits = largest_magnitude(x, columns);
  float g;
  memcpy(&g, &g_bits, sizeof g);
  *down = g_bits < kInfinityBits ? g / kGroupLevels : NAN;
  if (g_bits >= kInfinityBits || g < kSmallest) return;
  const float up = 1.0f / *down;
  for (int64_t i = 0; i < columns; ++i) {
    q[i] = static_cast<int8_t>(round_even(x[i] * up));
    *sum = static_cast<int16_t>(*sum + q[i]);
  }
}

void quantize_groups(const float *x, const BdHeadTokens *out, int64_t token) {
  const int64_t groups = out->stride / BD_TABLE_COLUMNS;
  for (int64_t g = 0; g < table_groups(out->columns); ++g) {
    const int64_t first = g * BD_TABLE_COLUMNS;
    quantize_group(x + first, smaller(BD_TABLE_COLUMNS, out->columns - first),
                   out->parts + token * out->stride + first, out->sums + token * groups + g,
                   out->down + token * groups + g);
  }
}

void gather_row4(const BdTable *table, int64_t id, float *row) {
  const int64_t r = id % BD_TABLE_ROWS;
  const uint8_t *codes = table_block(table, id / BD_TABLE_ROWS) + 4 * r;
  const int8_t *scales = table_scales(table, id / BD_TABLE_ROWS) + r;
  for (int64_t k = 0; k < table->columns; ++k) {
    const int64_t group = k / BD_TABLE_COLUMNS;
    const int64_t quad = k % BD_TABLE_COLUMNS / 4;
    const int byte = codes[group * BD_TABLE_BYTES + quad / 2 * 4 * BD_TABLE_ROWS + k % 4];
    const int code = quad % 2 != 0 ? byte >> 4 : byte & 15;
    row[k] = static_cast<float>(scales[group * BD_TABLE_ROWS] * (code - 8)) * table->scale[id];
  }
}

}  // namespace

extern "C" {

size_t bd_head_scratch_bytes(int64_t tokens, int64_t columns, int table_bits) {
  const HeadSizes sizes = head_sizes(tokens, columns, table_bits);
  return sizes.down + sizes.sums + sizes.q + sizes.parts;
}

BdHeadTokens bd_head_tokens(void *scratch, int64_t tokens, int64_t columns, int table_bits) {
  const HeadSizes sizes = head_sizes(tokens, columns, table_bits);
  char *down = static_cast<char *>(scratch);
  char *sums = down + sizes.down;
  char *q = sums + sizes.sums;
  return {table_bits == 8 ? reinterpret_cast<int16_t *>(q) : nullptr,
          reinterpret_cast<int8_t *>(q + sizes.q),
          reinterpret_cast<int16_t *>(sums),
          reinterpret_cast<float *>(down),
          tokens,
          columns,
          stride_of(columns)};
}

void bd_head_quantize(const float *x, const BdHeadTokens *out, int64_t first, int64_t last) {
  const int64_t parts = out->q != nullptr ? 2 : 1;
  const auto clear = [&](auto *places, int64_t each) {
    memset(places + first * each, 0, static_cast<size_t>((last - first) * each) * sizeof *places);
  };
  clear(out->parts, parts * out->stride);
  clear(out->sums, parts * out->stride / BD_TABLE_COLUMNS);
  if (out->q != nullptr) clear(out->q, out->stride);
  for (int64_t token = first; token < last; ++token)
    (out->q != nullptr ? quantize_token : quantize_groups)(x + token * out->columns, out, token);
}

void bd_gather_int8(const BdTable *table, const int64_t *ids, int64_t count, float *rows) {
  const int64_t columns = table->columns;
  for (int64_t i = 0; i < count; ++i) {
    const uint8_t *codes = table->codes + ids[i] * columns;
    const float scale = table->scale[ids[i]];
    for (int64_t k = 0; k < columns; ++k)
      rows[i * columns + k] = static_cast<float>(codes[k] - 128) * scale;
  }
}

void bd_gather_int4(const BdTable *table, const int64_t *ids, int64_t count, float *rows) {
  for (int64_t i = 0; i < count; ++i) gather_row4(table, ids[i], rows + i * table->columns);
}

int64_t bd_table_blocks(int64_t rows) { return (rows + BD_TABLE_ROWS - 1) / BD_TABLE_ROWS; }

}  // extern "C"
