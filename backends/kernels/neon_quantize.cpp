// NEON: the gate, the optional RMSNorm, the magnitude of each token, and its rounding to
// int8.
#include "gate.h"
#include "neon.h"

#if BD_ARM
namespace {

float sum_of_squares(const float *x, int64_t columns) {
  float32x4_t sums[8] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    for (int v = 0; v < 8; ++v) {
      const float32x4_t e = vld1q_f32(x + i + 4 * v);
      sums[v] = vaddq_f32(sums[v], vmulq_f32(e, e));
    }
  if (i == columns) return fold(sums);
  float lanes[kLanes];
  for (int v = 0; v < 8; ++v) vst1q_f32(lanes + 4 * v, sums[v]);
  for (int lane = 0; i < columns; ++i, ++lane) lanes[lane] += x[i] * x[i];
  return fold(lanes, kLanes);
}

// The elements of one token after the optional norm; Norm is a compile-time choice.
template <bool Norm>
struct Row {
  const float *x;
  const float *weight;
  float r;

  float one(int64_t i) const { return Norm ? x[i] * r * weight[i] : x[i]; }
  float32x4_t four(int64_t i) const {
    const float32x4_t e = vld1q_f32(x + i);
    if (!Norm) return e;
    return vmulq_f32(vmulq_f32(e, vdupq_n_f32(r)), vld1q_f32(weight + i));
  }
};

template <bool Norm>
Row<Norm> row_of(const BdInput *in, int64_t token) {
  const float *x = in->x + token * in->columns;
  float r = 1.0f;
  if (Norm) r = inverse_rms(sum_of_squares(x, in->columns), in->columns, in->epsilon);
  return {x, in->norm_weight, r};
}

template <bool Norm>
int32_t largest_magnitude(const Row<Norm> &row, int64_t columns) {
  const int32x4_t mask = vdupq_n_s32(0x7fffffff);
  int32x4_t top = vdupq_n_s32(0);
  int64_t i = 0;
  for (; i + 4 <= columns; i += 4)
    top = vmaxq_s32(top, vandq_s32(mask, vreinterpretq_s32_f32(row.four(i))));
  int32_t result = vmaxvq_s32(top);
  for (; i < columns; ++i) {
    const int32_t m = magnitude(row.one(i));
    if (m > result) result = m;
  }
  return result;
}

// Rounds 8 elements half-to-even into 8 bytes; their sum is added to `sums`.
template <bool Norm>
inline int32x4_t round_eight(const Row<Norm> &row, int64_t i, float up, int8_t *q, int32x4_t sums) {
  const int32x4_t a = vcvtnq_s32_f32(vmulq_f32(row.four(i), vdupq_n_f32(up)));
  const int32x4_t b = vcvtnq_s32_f32(vmulq_f32(row.four(i + 4), vdupq_n_f32(up)));
  vst1_s8(q, vqmovn_s16(vcombine_s16(vqmovn_s32(a), vqmovn_s32(b))));
  return vaddq_s32(sums, vaddq_s32(a, b));
}

template <bool Norm>
void quantize_row(const BdInput *in, const BdTokens *out, int64_t token) {
  const Row<Norm> row = row_of<Norm>(in, token);
  const int64_t columns = in->columns;
  int8_t *q = out->q + token * out->stride;
  float up;
  out->sum[token] = 0;
  if (!token_scale(largest_magnitude(row, columns), &up, &out->down[token])) {
    memset(q, 0, static_cast<size_t>(out->stride));
    return;
  }
  int32x4_t sums = vdupq_n_s32(0);
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8) sums = round_eight(row, i, up, q + i, sums);
  int32_t sum = vaddvq_s32(sums);
  memset(q + i, 0, static_cast<size_t>(out->stride - i));
  for (; i < columns; ++i) {
    q[i] = static_cast<int8_t>(round_even(row.one(i) * up));
    sum += q[i];
  }
  out->sum[token] = sum;
}

template <bool Norm>
void normalize_row(const BdInput *in, float *v, int64_t stride, int64_t token) {
  const Row<Norm> row = row_of<Norm>(in, token);
  int64_t i = 0;
  for (; i + 4 <= in->columns; i += 4) vst1q_f32(v + i, row.four(i));
  for (; i < in->columns; ++i) v[i] = row.one(i);
  for (; i < stride; ++i) v[i] = 0.0f;
}

}  // namespace

namespace bitdistill {
namespace neon {

void quantize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token)
    in->norm_weight != nullptr ? quantize_row<true>(in, out, token)
                               : quantize_row<false>(in, out, token);
}

void normalize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    float *v = out->values + token * out->stride;
    in->norm_weight != nullptr ? normalize_row<true>(in, v, out->stride, token)
                               : normalize_row<false>(in, v, out->stride, token);
  }
}

void gate(const BdGate *in, float *out, int64_t first, int64_t last) {
  gate_all(in, out, first, last);
}

}  // namespace neon
}  // namespace bitdistill
#endif
