// AVX2: trits times fp32 activations; vpermilps looks a trit up by the low two bits of each lane.
#include "avx2.h"
#include "rows.h"

#if BD_X86
namespace {

constexpr int kFloatTokens = 3;

template <int T>
void float_dots(const uint8_t *w, const float *v, int64_t stride, int64_t groups, float *dots) {
  const __m256 trits = _mm256_setr_ps(-1, 0, 1, 2, -1, 0, 1, 2);
  __m256 sums[T][4] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, v += BD_BLOCK_COLUMNS) {
    const __m256i packed = load(w);
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 4; ++j) {
        const __m256 trit = _mm256_permutevar_ps(trits, _mm256_srli_epi32(packed, 8 * j + 2 * s));
        for (int t = 0; t < T; ++t)
          sums[t][s] = _mm256_add_ps(
              sums[t][s], _mm256_mul_ps(_mm256_set1_ps(v[t * stride + 4 * s + j]), trit));
      }
  }
  for (int t = 0; t < T; ++t)
    _mm256_storeu_ps(dots + BD_BLOCK_ROWS * t,
                     _mm256_add_ps(_mm256_add_ps(sums[t][0], sums[t][1]),
                                   _mm256_add_ps(sums[t][2], sums[t][3])));
}

using FloatDots = void (*)(const uint8_t *, const float *, int64_t, int64_t, float *);
constexpr FloatDots kFloatTiles[kFloatTokens + 1] = {nullptr, float_dots<1>, float_dots<2>,
                                                     float_dots<3>};

}  // namespace

namespace bitdistill {
namespace avx2 {

void ternary_float(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t groups = groups_of(w->columns);
  float dots[kFloatTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kFloatTokens);
      const float *v = in->values + token * in->stride;
      for (int part = 0; part < kVectors; ++part)
        kFloatTiles[count](block_bytes(w, block) + 32 * part, v, in->stride, groups,
                           &dots[0][8 * part]);
      for (int t = 0; t < count; ++t, ++token)
        write_float_rows(w, block, dots[t], y + token * w->rows);
    }
}

}  // namespace avx2
}  // namespace bitdistill
#endif
