// AVX2: int8 activations times trits of five a byte, decoded on the fly. Every SIMD lane is an
// output row, as in avx2_ternary.cpp; a lane of int16 takes at most 60 products of codes 0..2
// before it is widened, of magnitude 512 each.
//
// A code is what three times its byte carries: 1 from 86 on, 2 from 171 on. Bytes are kept with
// their top bit flipped, for a signed comparison; three times such a byte is flipped again, because
// 3 * 128 = 128 modulo 256.
#include "avx2.h"

#if BD_X86
namespace {

constexpr int kChunk = 12;  // groups of 20 columns: 60 sums
constexpr int kTokens = 4;

inline __m256i quad(const int8_t *q) {
  int32_t bits;
  memcpy(&bits, q, sizeof bits);
  return _mm256_set1_epi32(bits);
}

inline __m256i next_codes(__m256i *bytes) {
  const __m256i one = _mm256_cmpgt_epi8(*bytes, _mm256_set1_epi8(85 - 128));
  const __m256i two = _mm256_cmpgt_epi8(*bytes, _mm256_set1_epi8(170 - 128));
  *bytes = _mm256_add_epi8(*bytes, _mm256_add_epi8(*bytes, *bytes));
  return _mm256_abs_epi8(_mm256_add_epi8(one, two));
}

// V vectors of 8 rows for T tokens, from group g to end.
template <int V, int T>
inline void chunk_sums(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups,
                       __m256i (&sums)[T][V]) {
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BASE3_COLUMNS)
    for (int v = 0; v < V; ++v) {
      __m256i bytes = _mm256_xor_si256(load(w + 32 * v), _mm256_set1_epi8(-128));
      for (int s = 0; s < 5; ++s) {
        const __m256i codes = next_codes(&bytes);
        for (int t = 0; t < T; ++t) {
          const __m256i x = quad(q + t * stride + 4 * s);
          sums[t][v] = _mm256_add_epi16(sums[t][v], _mm256_maddubs_epi16(codes, x));
          BD_IN_ORDER(sums[t][v]);
        }
      }
    }
}

// dots is (T, 32); V vectors of it are filled.
template <int V, int T>
void tile_dots(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups, int32_t *dots) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i totals[T][V] = {};
  for (int64_t g = 0; g < groups; g += kChunk) {
    __m256i sums[T][V] = {};
    chunk_sums<V, T>(w + g * BD_BLOCK_BYTES, q + g * BD_BASE3_COLUMNS, stride,
                     smaller(kChunk, groups - g), sums);
    for (int t = 0; t < T; ++t)
      for (int v = 0; v < V; ++v)
        totals[t][v] = _mm256_add_epi32(totals[t][v], _mm256_madd_epi16(sums[t][v], ones));
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) store(dots + BD_BLOCK_ROWS * t + 8 * v, totals[t][v]);
}

using TileDots = void (*)(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);
constexpr TileDots kTiles[kTokens + 1] = {nullptr, nullptr, tile_dots<2, 2>, tile_dots<2, 3>,
                                          tile_dots<2, 4>};

void block_dots(const uint8_t *packed, const int8_t *q, int64_t stride, int64_t groups, int count,
                int32_t *dots) {
  if (count == 1) return tile_dots<kVectors, 1>(packed, q, stride, groups, dots);
  kTiles[count](packed, q, stride, groups, dots);
  kTiles[count](packed + BD_BLOCK_BYTES / 2, q, stride, groups, dots + BD_BLOCK_ROWS / 2);
}

}  // namespace

namespace bitdistill {
namespace avx2 {

void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t groups = base3_groups(w->columns);
  alignas(32) int32_t dots[kTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens);
      const int8_t *q = in->q + token * in->stride;
      block_dots(base3_block(w, block), q, in->stride, groups, count, &dots[0][0]);
      for (int t = 0; t < count; ++t, ++token)
        write_rows(w, block, dots[t], in->sum[token], in->down[token], y + token * w->rows);
    }
}

}  // namespace avx2
}  // namespace bitdistill
#endif
