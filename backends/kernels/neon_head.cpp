// NEON: the three heads. Written for exactness and checked under emulation; not timed on hardware.
#include "head.h"
#include "neon.h"

#if BD_ARM
namespace {

constexpr int kRows8 = 4;  // streams
constexpr int kTokens8 = 2;
constexpr int kTokens4 = 4;

// ---- 16 bits: eight vectors are the 32 partial sums of a row and token ----

inline float32x4_t four_halves(const uint16_t *p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}

inline float half_at(const uint16_t *p) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(*p))), 0);
}

float half_dot(const uint16_t *w, const float *x, int64_t columns) {
  float32x4_t sums[8] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    for (int v = 0; v < 8; ++v)
      sums[v] = vaddq_f32(sums[v], vmulq_f32(vld1q_f32(x + i + 4 * v), four_halves(w + i + 4 * v)));
  if (i == columns) return fold(sums);
  float lanes[kLanes];
  for (int v = 0; v < 8; ++v) vst1q_f32(lanes + 4 * v, sums[v]);
  for (int64_t k = i; k < columns; ++k) lanes[k - i] += x[k] * half_at(w + k);
  return fold(lanes, kLanes);
}

void half(const BdHalfTable *w, const float *x, int64_t tokens, float *y, int64_t first,
          int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t token = 0; token < tokens; ++token)
      y[token * w->rows + row] =
          half_dot(w->table + row * w->columns, x + token * w->columns, w->columns);
}

// ---- 8 bits ----

template <int R, int T>
inline void step8(const uint8_t *w, int64_t step, const int8_t *q, int64_t stride,
                  int32x4_t (&sums)[R][T][2]) {
  for (int p = 0; p < R; ++p) {
    const int8x16_t codes = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + p * step), vdupq_n_u8(0x80)));
    for (int t = 0; t < T; ++t)
      for (int part = 0; part < 2; ++part)
        sums[p][t][part] =
            vdotq_s32(sums[p][t][part], codes, vld1q_s8(q + (2 * t + part) * stride));
  }
}

// The last columns of R rows, copied beside each other: nothing is read beyond a table.
template <int R, int T>
void rest8(const uint8_t *w, int64_t step, int64_t bytes, const int8_t *q, int64_t stride,
           int32x4_t (&sums)[R][T][2]) {
  uint8_t copy[R][16] = {};  // q is zero there, whatever stands beside it
  for (int p = 0; p < R; ++p) memcpy(copy[p], w + p * step, static_cast<size_t>(bytes));
  step8<R, T>(&copy[0][0], 16, q, stride, sums);
}

// R streams of `count` rows each, the first from row `first`.
template <int R, int T>
void rows8(const BdTable *w, const BdHeadTokens *in, int64_t token, float *y, int64_t first,
           int64_t count) {
  const int64_t columns = w->columns;
  const int8_t *q = head_part(in, token, 0);
  for (int64_t row = first; row < first + count; ++row) {
    const uint8_t *codes = w->codes + row * columns;
    int32x4_t sums[R][T][2] = {};
    int64_t i = 0;
    for (; i + 16 <= columns; i += 16)
      step8<R, T>(codes + i, count * columns, q + i, in->stride, sums);
    if (i < columns) rest8<R, T>(codes + i, count * columns, columns - i, q + i, in->stride, sums);
    for (int p = 0; p < R; ++p)
      for (int t = 0; t < T; ++t)
        y[(token + t) * w->rows + row + p * count] =
            head_value(whole_sum(vaddvq_s32(sums[p][t][0]), vaddvq_s32(sums[p][t][1])),
                       in->down[token + t], w->scale[row + p * count]);
  }
}

template <int T>
void tile8(const BdTable *w, const BdHeadTokens *in, int64_t token, float *y, int64_t first,
           int64_t last) {
  const int64_t count = (last - first) / kRows8;
  rows8<kRows8, T>(w, in, token, y, first, count);
  rows8<1, T>(w, in, token, y, first + kRows8 * count, last - first - kRows8 * count);
}

void int8(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t strip = strip_rows(in->tokens, kTokens8, last - first);
  for (int64_t row = first; row < last; row += strip)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens8);
      (count == 1 ? tile8<1> : tile8<2>)(w, in, token, y, row, smaller(row + strip, last));
      token += count;
    }
}

// ---- 4 bits: each lane is a row; codes 0..15 start from what their offset of 8 owes ----

// Four rows of a group for T tokens.
template <int T>
inline void group4(const uint8_t *w, const int8_t *q, int64_t stride, int32x4_t (&dots)[T]) {
  for (int s = 0; s < 4; ++s) {
    const uint8x16_t codes = vld1q_u8(w + 64 * s);
    const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(codes, vdupq_n_u8(15)));
    const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(codes, 4));
    for (int t = 0; t < T; ++t) {
      dots[t] = vdotq_s32(dots[t], low, quad(q + t * stride + 8 * s));
      dots[t] = vdotq_s32(dots[t], high, quad(q + t * stride + 8 * s + 4));
    }
  }
}

inline int32x4_t four_scales(const int8_t *scales) {
  int32_t bits;
  memcpy(&bits, scales, sizeof bits);
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(bits));
  return vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
}

// The sums of a block and T tokens, over all groups; sums is (T, 16).
template <int T>
void block_sums(const BdTable *w, int64_t block, const BdHeadTokens *in, int64_t token,
                float (*sums)[BD_TABLE_ROWS]) {
  const int64_t step = in->stride / BD_TABLE_COLUMNS;
  const uint8_t *codes = table_block(w, block);
  const int8_t *scales = table_scales(w, block);
  const int8_t *q = group_q(in, token);
  const int16_t *starts = group_sums(in, token);
  const float *downs = group_downs(in, token);
  float32x4_t totals[4][T] = {};
  for (int64_t g = 0; g < table_groups(w->columns); ++g) {
    for (int v = 0; v < 4; ++v) {
      int32x4_t dots[T];
      for (int t = 0; t < T; ++t) dots[t] = vdupq_n_s32(-8 * starts[t * step + g]);
      group4<T>(codes + 16 * v, q, in->stride, dots);
      const int32x4_t factors = four_scales(scales + 4 * v);
      for (int t = 0; t < T; ++t) {
        const float32x4_t dot = vcvtq_f32_s32(vmulq_s32(dots[t], factors));
        const float32x4_t product = vmulq_f32(dot, vdupq_n_f32(downs[t * step + g]));
        totals[v][t] = vaddq_f32(totals[v][t], product);
      }
    }
    codes += BD_TABLE_BYTES;
    scales += BD_TABLE_ROWS;
    q += BD_TABLE_COLUMNS;
  }
  for (int v = 0; v < 4; ++v)
    for (int t = 0; t < T; ++t) vst1q_f32(sums[t] + 4 * v, totals[v][t]);
}

using BlockSums = void (*)(const BdTable *, int64_t, const BdHeadTokens *, int64_t,
                           float (*)[BD_TABLE_ROWS]);
constexpr BlockSums kBlocks[kTokens4 + 1] = {nullptr, block_sums<1>, block_sums<2>, block_sums<3>,
                                             block_sums<4>};

void int4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  float sums[kTokens4][BD_TABLE_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens4);
      kBlocks[count](w, block, in, token, sums);
      for (int t = 0; t < count; ++t, ++token)
        write_table_rows(w, block, sums[t], y + token * w->rows);
    }
}

}  // namespace

namespace bitdistill {
namespace neon {
const BdHeadKernels heads = {half, int8, int4};
}  // namespace neon
}  // namespace bitdistill
#endif
