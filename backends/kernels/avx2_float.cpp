// AVX2: the products with fp32 activations: trits of fp32 activations, and the float16 head.
#include "avx2.h"

#if BD_X86
namespace {

constexpr int kFloatTokens = 3;
constexpr int kHeadTokens = 3;

// ---- fp32 activations: vpermilps looks a trit up by the low two bits of each lane ----

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

// ---- the head: one row at a time, so that the table is read in order (two rows at once halved the
// rate at which it came from memory), for T tokens, 32 partial sums each ----

float half_at(const uint16_t *p) { return _cvtsh_ss(*p); }

__m256 eight_halves(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}

template <int T>
void head_tile(const uint16_t *w, const float *x, int64_t columns, float *y, int64_t y_stride) {
  __m256 sums[T][4] = {};
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes) {
    _mm_prefetch(reinterpret_cast<const char *>(w + i) + kPrefetch, _MM_HINT_T0);
    for (int v = 0; v < 4; ++v) {
      const __m256 weights = eight_halves(w + i + 8 * v);
      for (int t = 0; t < T; ++t) {
        const __m256 e = _mm256_loadu_ps(x + t * columns + i + 8 * v);
        sums[t][v] = _mm256_add_ps(sums[t][v], _mm256_mul_ps(e, weights));
      }
    }
  }
  for (int t = 0; t < T; ++t) {
    float lanes[kLanes];
    for (int v = 0; v < 4; ++v) _mm256_storeu_ps(lanes + 8 * v, sums[t][v]);
    for (int64_t k = i; k < columns; ++k) lanes[k - i] += x[t * columns + k] * half_at(w + k);
    y[t * y_stride] = fold(lanes, kLanes);
  }
}

using HeadTile = void (*)(const uint16_t *, const float *, int64_t, float *, int64_t);
constexpr HeadTile kHeadTiles[kHeadTokens + 1] = {nullptr, head_tile<1>, head_tile<2>,
                                                  head_tile<3>};

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

void head(const BdHead *w, const float *x, int64_t tokens, float *y, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    for (int64_t token = 0; token < tokens;) {
      const int count = tile_tokens(tokens - token, kHeadTokens);
      kHeadTiles[count](w->table + row * w->columns, x + token * w->columns, w->columns,
                        y + token * w->rows + row, w->rows);
      token += count;
    }
}

}  // namespace avx2
}  // namespace bitdistill
#endif
