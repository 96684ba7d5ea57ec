// AVX-512 with VNNI: trits of five a byte, as in avx2_base3.cpp; vpdpbusd needs no widening.
#include "rows.h"
#include "x86_tables.h"

#include <immintrin.h>

namespace {

constexpr int kVectors = 2;  // a block of 32 rows is two vectors of 16 lanes
constexpr int kTokens = 6;

inline __m512i quad(const int8_t *q) {
  int32_t bits;
  memcpy(&bits, q, sizeof bits);
  return _mm512_set1_epi32(bits);
}

inline __m512i next_codes(__m512i *bytes) {
  const __m512i one = _mm512_set1_epi8(1);
  const __mmask64 from_one = _mm512_cmpgt_epu8_mask(*bytes, _mm512_set1_epi8(85));
  const __mmask64 from_two = _mm512_cmpgt_epu8_mask(*bytes, _mm512_set1_epi8(-86));  // 170
  *bytes = _mm512_add_epi8(*bytes, _mm512_add_epi8(*bytes, *bytes));
  const __m512i codes = _mm512_maskz_mov_epi8(from_one, one);
  return _mm512_mask_add_epi8(codes, from_two, codes, one);
}

// dots is (T, 32).
template <int T>
void tile_dots(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups, int32_t *dots) {
  __m512i sums[T][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BASE3_COLUMNS)
    for (int v = 0; v < kVectors; ++v) {
      __m512i bytes = _mm512_loadu_si512(w + 64 * v);
      for (int s = 0; s < 5; ++s) {
        const __m512i codes = next_codes(&bytes);
        for (int t = 0; t < T; ++t)
          sums[t][v] = _mm512_dpbusd_epi32(sums[t][v], codes, quad(q + t * stride + 4 * s));
      }
    }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < kVectors; ++v)
      _mm512_storeu_si512(dots + BD_BLOCK_ROWS * t + 16 * v, sums[t][v]);
}

using TileDots = void (*)(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);
constexpr TileDots kTiles[kTokens + 1] = {nullptr,      tile_dots<1>, tile_dots<2>, tile_dots<3>,
                                          tile_dots<4>, tile_dots<5>, tile_dots<6>};

}  // namespace

namespace bitdistill {

void avx512_vnni_ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                               int64_t last) {
  const int64_t groups = base3_groups(w->columns);
  int32_t dots[kTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens);
      const int8_t *q = in->q + token * in->stride;
      kTiles[count](base3_block(w, block), q, in->stride, groups, &dots[0][0]);
      for (int t = 0; t < count; ++t, ++token)
        write_rows(w, block, dots[t], in->sum[token], in->down[token], y + token * w->rows);
    }
}

}  // namespace bitdistill
