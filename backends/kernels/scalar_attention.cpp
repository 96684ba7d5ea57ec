// The oracle of attention, for any CPU: one row and one position at a time.
#include "attention.h"
#include "half.h"

namespace {

float exponential(float x) {
  if (x < kExpLeast) return 0.0f;
  const float t = x * kLog2e + kRound;
  const float n = t - kRound;
  const float r = fmaf(n, -kLn2Low, fmaf(n, -kLn2High, x));
  float p = kExp[0];
  for (int i = 1; i < 6; ++i) p = fmaf(p, r, kExp[i]);
  const float y = fmaf(p, r * r, r) + 1.0f;
  uint32_t bits, exponent;
  memcpy(&bits, &y, sizeof bits);
  memcpy(&exponent, &t, sizeof exponent);
  bits += exponent << 23;
  float result;
  memcpy(&result, &bits, sizeof result);
  return y == y ? result : y;
}

float element(const BdAttention *a, const char *row, int64_t i) {
  if (a->cache_bits == 8) return static_cast<float>(reinterpret_cast<const int8_t *>(row)[i]);
  if (a->cache_bits == 16) return from_half(reinterpret_cast<const uint16_t *>(row)[i]);
  return reinterpret_cast<const float *>(row)[i];
}

void keep_row(const BdAttention *a, const float *x, char *row) {
  if (a->cache_bits == 8) return keep_codes(x, a->head_size, row);
  if (a->cache_bits == 32) {
    memcpy(row, x, static_cast<size_t>(a->head_size) * sizeof *x);
    return;
  }
  for (int64_t i = 0; i < a->head_size; ++i) reinterpret_cast<uint16_t *>(row)[i] = to_half(x[i]);
}

void keep(const BdAttention *a, int64_t first, int64_t last) {
  float key[BD_MAX_HEAD_SIZE];
  for (int64_t t = first; t < last; ++t) {
    prepare_head(a, a->k + t * a->k_stride, a->k_norm, a->past + t, key);
    keep_row(a, key, cache_row(a, a->keys, a->past + t));
    keep_row(a, a->v + t * a->v_stride, cache_row(a, a->values, a->past + t));
  }
}

float dot(const BdAttention *a, const float *q, const char *key) {
  float lanes[kSumLanes] = {};
  for (int64_t i = 0; i < a->head_size; ++i)
    lanes[i % kSumLanes] = fmaf(q[i], element(a, key, i), lanes[i % kSumLanes]);
  return fold(lanes, kSumLanes);
}

void attend_row(const BdAttention *a, int64_t position, const float *q, float *s, float *y) {
  const int64_t low = first_visible(a, position);
  float top = -INFINITY;
  for (int64_t j = low; j <= position; ++j) {
    s[j - low] = dot(a, q, cache_row(a, a->keys, j)) * (a->scale * row_scale(a, a->keys, j));
    top = s[j - low] > top ? s[j - low] : top;
  }
  float lanes[kSumLanes] = {};
  memset(y, 0, static_cast<size_t>(a->head_size) * sizeof *y);
  for (int64_t j = low; j <= position; ++j) {
    const float p = exponential(s[j - low] - top);
    const float w = p * row_scale(a, a->values, j);
    const char *value = cache_row(a, a->values, j);
    lanes[j % kSumLanes] += p;
    for (int64_t d = 0; d < a->head_size; ++d) y[d] = fmaf(w, element(a, value, d), y[d]);
  }
  const float inverse = 1.0f / fold(lanes, kSumLanes);
  for (int64_t d = 0; d < a->head_size; ++d) y[d] *= inverse;
}

void attend(const BdAttention *a, int64_t first, int64_t last, void *scratch) {
  float q[BD_MAX_HEAD_SIZE];
  for (int64_t row = first; row < last; ++row) {
    const int64_t token = row / a->group, head = row % a->group * a->head_size;
    prepare_head(a, a->q + token * a->q_stride + head, a->q_norm, a->past + token, q);
    attend_row(a, a->past + token, q, static_cast<float *>(scratch),
               a->y + token * a->y_stride + head);
  }
}

}  // namespace

namespace bitdistill {
const BdAttentionKernels scalar_attention = {keep, attend};
}  // namespace bitdistill
