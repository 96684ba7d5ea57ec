// The oracle: plain C++ in the order that bitdistill_kernels.h specifies, for any CPU.
#include "head.h"
#include "rows.h"

namespace {

float sum_of_squares(const float *x, int64_t columns) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < columns; ++i) lanes[i % kLanes] += x[i] * x[i];
  return fold(lanes, kLanes);
}

void normalize_row(const BdInput *in, const float *x, float *v) {
  if (in->norm_weight == nullptr) {
    for (int64_t i = 0; i < in->columns; ++i) v[i] = x[i];
    return;
  }
  const float r = inverse_rms(sum_of_squares(x, in->columns), in->columns, in->epsilon);
  for (int64_t i = 0; i < in->columns; ++i) v[i] = x[i] * r * in->norm_weight[i];
}

// v of one element, recomputed at each use: the same operations give the same bits.
float element(const BdInput *in, const float *x, float r, int64_t i) {
  return in->norm_weight == nullptr ? x[i] : x[i] * r * in->norm_weight[i];
}

void quantize_row(const BdInput *in, const BdTokens *out, int64_t token) {
  const float *x = in->x + token * in->columns;
  int8_t *q = out->q + token * out->stride;
  memset(q, 0, static_cast<size_t>(out->stride));
  const bool norm = in->norm_weight != nullptr;
  const float r =
      norm ? inverse_rms(sum_of_squares(x, in->columns), in->columns, in->epsilon) : 1.0f;
  int32_t g = 0;
  for (int64_t i = 0; i < in->columns; ++i) {
    const int32_t m = magnitude(element(in, x, r, i));
    if (m > g) g = m;
  }
  float up;
  out->sum[token] = 0;
  if (!token_scale(g, &up, &out->down[token])) return;
  for (int64_t i = 0; i < in->columns; ++i) {
    q[i] = static_cast<int8_t>(round_even(element(in, x, r, i) * up));
    out->sum[token] += q[i];
  }
}

void quantize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) quantize_row(in, out, token);
}

void normalize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    float *v = out->values + token * out->stride;
    normalize_row(in, in->x + token * in->columns, v);
    for (int64_t i = in->columns; i < out->stride; ++i) v[i] = 0.0f;
  }
}

int code(const uint8_t *group, int row, int s, int j) { return group[4 * row + j] >> 2 * s & 3; }

void block_dots(const uint8_t *packed, const int8_t *q, int64_t groups, int32_t *dots) {
  for (int r = 0; r < BD_BLOCK_ROWS; ++r) dots[r] = 0;
  for (int64_t g = 0; g < groups; ++g, packed += BD_BLOCK_BYTES, q += BD_BLOCK_COLUMNS)
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 4; ++j)
        for (int r = 0; r < BD_BLOCK_ROWS; ++r) dots[r] += code(packed, r, s, j) * q[4 * s + j];
}

void ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  int32_t dots[BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens; ++token) {
      block_dots(block_bytes(w, block), in->q + token * in->stride, groups_of(w->columns), dots);
      write_rows(w, block, dots, in->sum[token], in->down[token], y + token * w->rows);
    }
}

void block_float_dots(const uint8_t *packed, const float *v, int64_t groups, float *dots) {
  float sums[4][BD_BLOCK_ROWS] = {};
  for (int64_t g = 0; g < groups; ++g, packed += BD_BLOCK_BYTES, v += BD_BLOCK_COLUMNS)
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 4; ++j)
        for (int r = 0; r < BD_BLOCK_ROWS; ++r)
          sums[s][r] += v[4 * s + j] * static_cast<float>(code(packed, r, s, j) - 1);
  for (int r = 0; r < BD_BLOCK_ROWS; ++r)
    dots[r] = (sums[0][r] + sums[1][r]) + (sums[2][r] + sums[3][r]);
}

void ternary_float(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  float dots[BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens; ++token) {
      const float *v = in->values + token * in->stride;
      block_float_dots(block_bytes(w, block), v, groups_of(w->columns), dots);
      write_float_rows(w, block, dots, y + token * w->rows);
    }
}

// Five codes of a byte: three times it carries one beyond its 8 bits.
void base3_dots(const uint8_t *packed, const int8_t *q, int64_t groups, int32_t *dots) {
  for (int r = 0; r < BD_BLOCK_ROWS; ++r) dots[r] = 0;
  for (int64_t g = 0; g < groups; ++g, packed += BD_BLOCK_BYTES, q += BD_BASE3_COLUMNS)
    for (int r = 0; r < BD_BLOCK_ROWS; ++r)
      for (int j = 0; j < 4; ++j) {
        int byte = packed[4 * r + j];
        for (int s = 0; s < 5; ++s) {
          dots[r] += (3 * byte >> 8) * q[4 * s + j];
          byte = 3 * byte & 255;
        }
      }
}

void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  int32_t dots[BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens; ++token) {
      base3_dots(base3_block(w, block), in->q + token * in->stride, base3_groups(w->columns), dots);
      write_rows(w, block, dots, in->sum[token], in->down[token], y + token * w->rows);
    }
}

// Quads of columns come in the same order in both layouts, five of them a byte or four.
void unpack_base3(const BdTernary *w, uint8_t *out, int64_t first, int64_t last) {
  const int64_t groups = base3_groups(w->columns), quads = 4 * groups_of(w->columns);
  for (int64_t block = first; block < last; ++block) {
    const uint8_t *packed = base3_block(w, block);
    uint8_t *bytes = out + block * groups_of(w->columns) * BD_BLOCK_BYTES;
    memset(bytes, 0, static_cast<size_t>(quads / 4) * BD_BLOCK_BYTES);
    for (int64_t i = 0; i < BD_BLOCK_BYTES; ++i)
      for (int64_t g = 0; g < groups; ++g) {
        int byte = packed[g * BD_BLOCK_BYTES + i];
        for (int64_t quad = 5 * g; quad < 5 * g + 5 && quad < quads; ++quad) {
          bytes[quad / 4 * BD_BLOCK_BYTES + i] |=
              static_cast<uint8_t>((3 * byte >> 8) << (2 * (quad % 4)));
          byte = 3 * byte & 255;
        }
      }
  }
}

int supported() { return 1; }

const BdKernels kTable = {"scalar",
                          supported,
                          quantize,
                          normalize,
                          gate_all,
                          ternary,
                          ternary_float,
                          ternary_base3,
                          unpack_base3,
                          &bitdistill::scalar_heads,
                          &bitdistill::scalar_attention,
                          0};

}  // namespace

namespace bitdistill {
const BdKernels *scalar_kernels() { return &kTable; }
}  // namespace bitdistill
