// AVX2: the gate, the optional RMSNorm, the magnitude of each token, and its rounding to
// int8.
#include "avx2.h"
#include "gate.h"

#if BD_X86
namespace {

float sum_of_squares(const float *x, int64_t columns) {
  __m256 sums[4] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    for (int v = 0; v < 4; ++v) {
      const __m256 e = _mm256_loadu_ps(x + i + 8 * v);
      sums[v] = _mm256_add_ps(sums[v], _mm256_mul_ps(e, e));
    }
  float lanes[kLanes];
  for (int v = 0; v < 4; ++v) _mm256_storeu_ps(lanes + 8 * v, sums[v]);
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
  __m256 eight(int64_t i) const {
    const __m256 e = _mm256_loadu_ps(x + i);
    if (!Norm) return e;
    return _mm256_mul_ps(_mm256_mul_ps(e, _mm256_set1_ps(r)), _mm256_loadu_ps(weight + i));
  }
};

template <bool Norm>
Row<Norm> row_of(const BdInput *in, int64_t token) {
  const float *x = in->x + token * in->columns;
  float r = 1.0f;
  if (Norm) r = inverse_rms(sum_of_squares(x, in->columns), in->columns, in->epsilon);
  return {x, in->norm_weight, r};
}

int32_t largest(__m256i v) {
  int32_t lanes[8];
  store(lanes, v);
  int32_t top = lanes[0];
  for (int i = 1; i < 8; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

int32_t total_of(__m256i v) {
  int32_t lanes[8];
  store(lanes, v);
  int32_t sum = 0;
  for (int i = 0; i < 8; ++i) sum += lanes[i];
  return sum;
}

template <bool Norm>
int32_t largest_magnitude(const Row<Norm> &row, int64_t columns) {
  const __m256i mask = _mm256_set1_epi32(0x7fffffff);
  __m256i top = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8)
    top = _mm256_max_epi32(top, _mm256_and_si256(mask, _mm256_castps_si256(row.eight(i))));
  int32_t result = largest(top);
  for (; i < columns; ++i) {
    const int32_t m = magnitude(row.one(i));
    if (m > result) result = m;
  }
  return result;
}

// Rounds 8 elements half-to-even (the mode every thread starts with) into 8 bytes.
__m256i round_eight(__m256 v, float up, int8_t *q) {
  const __m256i wide = _mm256_cvtps_epi32(_mm256_mul_ps(v, _mm256_set1_ps(up)));
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i *>(q), _mm_packs_epi16(words, words));
  return wide;
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
  __m256i sums = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= columns; i += 8)
    sums = _mm256_add_epi32(sums, round_eight(row.eight(i), up, q + i));
  int32_t sum = total_of(sums);
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
  for (; i + 8 <= in->columns; i += 8) _mm256_storeu_ps(v + i, row.eight(i));
  for (; i < in->columns; ++i) v[i] = row.one(i);
  for (; i < stride; ++i) v[i] = 0.0f;
}

}  // namespace

namespace bitdistill {
namespace avx2 {

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

}  // namespace avx2
}  // namespace bitdistill
#endif
