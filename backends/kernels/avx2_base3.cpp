// AVX2: int8 activations times trits of five a byte, decoded on the fly. Every SIMD lane is an
// output row, as in avx2_ternary.cpp; a lane of int16 takes at most 60 products of codes 0..2
// before it is widened, of magnitude 512 each.
//
// Nine times a byte carries two codes beyond its 8 bits, 3 c_0 + c_1 <= 8, and keeps the others:
// vpmaddubsw multiplies the even and the odd bytes into 16 bits, takes the kept bytes for the next
// two codes as they are, and vpshufb tells the two apart.
#include "avx2.h"
#include "rows.h"

#if BD_X86
namespace {

constexpr int kChunk = 12;  // groups of 20 columns: 60 sums
constexpr int kTokens = 4;
constexpr int kDigits = 5;

// What was carried: the high byte of each lane of both.
inline __m256i carried(__m256i even, __m256i odd) {
  return _mm256_blendv_epi8(_mm256_srli_epi16(even, 8), odd, _mm256_set1_epi16(-256));
}

inline void next_pair(__m256i even, __m256i odd, __m256i *codes) {
  const int64_t c0 = 0x0202010101000000, c1 = 0x0100020100020100;  // of the pairs 0 to 7
  const __m256i first = _mm256_set_epi64x(2, c0, 2, c0);
  const __m256i second = _mm256_set_epi64x(2, c1, 2, c1);
  const __m256i pair = carried(even, odd);
  codes[0] = _mm256_shuffle_epi8(first, pair);
  codes[1] = _mm256_shuffle_epi8(second, pair);
}

// The codes of 32 bytes: of 8 rows, four columns each.
inline void decode(__m256i bytes, __m256i (&codes)[kDigits]) {
  const __m256i nine = _mm256_set1_epi16(9), three = _mm256_set1_epi16(3);
  __m256i even = _mm256_maddubs_epi16(bytes, nine);
  __m256i odd = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(9 << 8));
  next_pair(even, odd, codes);
  even = _mm256_maddubs_epi16(even, nine);
  odd = _mm256_maddubs_epi16(odd, nine);
  next_pair(even, odd, codes + 2);
  codes[4] = carried(_mm256_maddubs_epi16(even, three), _mm256_maddubs_epi16(odd, three));
}

// ---- one token ----

// Products of S blocks, `step` bytes apart, a run of groups of each in turn (avx2.h).
template <int S>
void matvec_dots(const uint8_t *w, int64_t step, const int8_t *q, int64_t groups,
                 int32_t (*dots)[BD_BLOCK_ROWS]) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i totals[S][kVectors] = {};
  for (int64_t g = 0; g < groups; g += kChunk) {
    const int64_t count = smaller(kChunk, groups - g);
    const uint8_t *next = w + (g + count) * BD_BLOCK_BYTES;
    for (int s = 0; s < S; ++s) {
      __m256i sums[kVectors] = {};
      const uint8_t *row = w + s * step + g * BD_BLOCK_BYTES;
      const int8_t *x = q + g * BD_BASE3_COLUMNS;
      for (int64_t i = 0; i < count; ++i, row += BD_BLOCK_BYTES, x += BD_BASE3_COLUMNS) {
        const int64_t turn = s * count + i;
        fetch_group(next + turn % S * step + turn / S * BD_BLOCK_BYTES);
        for (int v = 0; v < kVectors; ++v) {
          __m256i codes[kDigits];
          decode(load(row + 32 * v), codes);
          for (int d = 0; d < kDigits; ++d)
            sums[v] = _mm256_add_epi16(sums[v], _mm256_maddubs_epi16(codes[d], quad(x + 4 * d)));
        }
      }
      for (int v = 0; v < kVectors; ++v)
        totals[s][v] = _mm256_add_epi32(totals[s][v], _mm256_madd_epi16(sums[v], ones));
    }
  }
  for (int s = 0; s < S; ++s)
    for (int v = 0; v < kVectors; ++v) store(dots[s] + 8 * v, totals[s][v]);
}

// ---- several tokens ----

// V vectors of 8 rows for T tokens, from group g to end.
template <int V, int T>
inline void chunk_sums(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups,
                       __m256i (&sums)[T][V]) {
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BASE3_COLUMNS)
    for (int v = 0; v < V; ++v) {
      __m256i codes[kDigits];
      decode(load(w + 32 * v), codes);
      for (int d = 0; d < kDigits; ++d)
        for (int t = 0; t < T; ++t) {
          const __m256i x = quad(q + t * stride + 4 * d);
          sums[t][v] = _mm256_add_epi16(sums[t][v], _mm256_maddubs_epi16(codes[d], x));
          BD_IN_ORDER(sums[t][v]);
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
  kTiles[count](packed, q, stride, groups, dots);
  kTiles[count](packed + BD_BLOCK_BYTES / 2, q, stride, groups, dots + BD_BLOCK_ROWS / 2);
}

// S streams of `count` blocks each, the first from block `first`.
template <int S>
void one_token(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t count) {
  alignas(32) int32_t dots[S][BD_BLOCK_ROWS];
  const int64_t groups = base3_groups(w->columns), step = count * groups * BD_BLOCK_BYTES;
  for (int64_t block = first; block < first + count; ++block) {
    matvec_dots<S>(base3_block(w, block), step, in->q, groups, dots);
    for (int s = 0; s < S; ++s)
      write_rows(w, block + s * count, dots[s], in->sum[0], in->down[0], y);
  }
}

void several_tokens(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
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

// One vector of 8 rows of a block: codes come four columns at a time in both layouts, and four
// times four make a byte of the other.
void unpack_rows(const uint8_t *w, int64_t groups, uint8_t *out, const uint8_t *end) {
  __m256i byte = _mm256_setzero_si256();
  int codes_in_byte = 0;
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES) {
    __m256i codes[kDigits];
    decode(load(w), codes);
    for (int d = 0; d < kDigits; ++d) {
      byte = _mm256_or_si256(_mm256_srli_epi16(byte, 2), _mm256_slli_epi16(codes[d], 6));
      if (++codes_in_byte < 4) continue;
      if (out < end) store(out, byte);
      byte = _mm256_setzero_si256();
      codes_in_byte = 0;
      out += BD_BLOCK_BYTES;
    }
  }
  if (out >= end) return;
  for (; codes_in_byte < 4; ++codes_in_byte) byte = _mm256_srli_epi16(byte, 2);
  store(out, byte);
}

}  // namespace

namespace bitdistill {
namespace avx2 {

void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  if (in->tokens != 1) return several_tokens(w, in, y, first, last);
  const int64_t count = (last - first) / kStreams;
  one_token<kStreams>(w, in, y, first, count);
  one_token<1>(w, in, y, first + kStreams * count, last - first - kStreams * count);
}

void unpack_base3(const BdTernary *w, uint8_t *out, int64_t first, int64_t last) {
  const int64_t groups = base3_groups(w->columns);
  const int64_t bytes = groups_of(w->columns) * BD_BLOCK_BYTES;
  for (int64_t block = first; block < last; ++block)
    for (int64_t v = 0; v < kVectors; ++v)
      unpack_rows(base3_block(w, block) + 32 * v, groups, out + block * bytes + 32 * v,
                  out + (block + 1) * bytes);
}

}  // namespace avx2
}  // namespace bitdistill
#endif
