// AVX2: int8 activations times trits. Every SIMD lane is an output row, so there are no horizontal
// sums: a 4-byte quad of activations is broadcast and meets 8 rows in one vpmaddubsw.
//
// Exactness. A code is 0..2 (or 3 in malformed weights, which may then wrap but never trap) and an
// activation -128..127, so one vpmaddubsw lane, a sum of two products, lies in
//   [2 * 2 * -128, 2 * 2 * 127] = [-512, 508]           for codes at weight 1,
//   [2 * 8 * -128, 2 * 8 * 127] = [-2048, 2032]         for codes left in place at weight 4;
// int16 therefore holds 64 sums of the first kind (-32768 .. 32512) and 16 of the second (the same
// range), exactly, before they are widened to int32. In int32, |q . code| <= 2 * 128 * 2^17 = 2^25.
#include "avx2.h"
#include "rows.h"

#if BD_X86
namespace {

constexpr int kMatvecChunk = 8;       // groups of 16 columns: 16 sums at weight 4
constexpr int64_t kMostSpread = 192;  // groups whose activations are spread at once: 24 KiB
constexpr int kTileChunk = 16;        // groups: 64 sums at weight 1
constexpr int kTileVectors = 2;
constexpr int kTileTokens = 6;

// ---- one token: bound by memory, so the codes at bits 2 and 6 stay in place (weight 4) ----

inline void add_product(__m256i *sum, __m256i codes, __m256i x) {
  *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, x));
  BD_IN_ORDER(*sum);
}

// Each quad of activations in a vector of its own.
inline void spread(const int8_t *q, int64_t groups, __m256i (*quads)[4]) {
  for (int64_t i = 0; i < groups; ++i)
    for (int k = 0; k < 4; ++k) quads[i][k] = quad(q + i * BD_BLOCK_COLUMNS + 4 * k);
}

// Products of S blocks, `step` bytes apart. Four vectors and their sums fill the registers, so
// activations are spread in memory: all of them before, in `all`, or (null) those of a run here.
template <int S>
void matvec_dots(const uint8_t *w, int64_t step, const int8_t *q, const __m256i (*all)[4],
                 int64_t groups, int32_t (*dots)[BD_BLOCK_ROWS]) {
  const __m256i low = _mm256_set1_epi8(0x03);
  const __m256i high = _mm256_set1_epi8(0x0c);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i totals[S][kVectors] = {};
  __m256i run[kMatvecChunk][4];
  int64_t ahead[kMatvecChunk];  // places of a run's lines that are fetched, one for each group
  for (int i = 0; i < kMatvecChunk; ++i) ahead[i] = i % S * step + i / S * BD_BLOCK_BYTES;
  for (int64_t g = 0; g < groups; g += kMatvecChunk) {
    const int64_t count = smaller(kMatvecChunk, groups - g);
    if (all == nullptr) spread(q + g * BD_BLOCK_COLUMNS, count, run);
    const __m256i(*quads)[4] = all != nullptr ? all + g : run;
    const uint8_t *next = w + (g + count) * BD_BLOCK_BYTES;
    for (int s = 0; s < S; ++s, next += kMatvecChunk / S * BD_BLOCK_BYTES) {
      __m256i one[kVectors] = {};
      __m256i four[kVectors] = {};
      const uint8_t *row = w + s * step + g * BD_BLOCK_BYTES;
      for (int64_t i = 0; i < count; ++i, row += BD_BLOCK_BYTES) {
        const __m256i *x = quads[i];
        fetch_group(next + ahead[i]);
        for (int v = 0; v < kVectors; ++v) {
          const __m256i a = load(row + 32 * v);
          const __m256i b = _mm256_srli_epi16(a, 4);
          add_product(&one[v], _mm256_and_si256(a, low), x[0]);
          add_product(&four[v], _mm256_and_si256(a, high), x[1]);
          add_product(&one[v], _mm256_and_si256(b, low), x[2]);
          add_product(&four[v], _mm256_and_si256(b, high), x[3]);
        }
      }
      for (int v = 0; v < kVectors; ++v) {  // |one| and |four / 4| <= 16 * 512: no overflow
        const __m256i sum = _mm256_add_epi16(one[v], _mm256_srai_epi16(four[v], 2));
        totals[s][v] = _mm256_add_epi32(totals[s][v], _mm256_madd_epi16(sum, ones));
      }
    }
  }
  for (int s = 0; s < S; ++s)
    for (int v = 0; v < kVectors; ++v) store(dots[s] + 8 * v, totals[s][v]);
}

// ---- several tokens: a tile of 16 rows x T tokens unpacks each code once for T tokens ----

template <int S, int T>
inline void tile_step(const uint8_t *w, const int8_t *q, int64_t stride,
                      __m256i (&sums)[kTileVectors][T]) {
  const __m256i low = _mm256_set1_epi8(0x03);
  const __m256i w0 = _mm256_and_si256(_mm256_srli_epi16(load(w), 2 * S), low);
  const __m256i w1 = _mm256_and_si256(_mm256_srli_epi16(load(w + 32), 2 * S), low);
  for (int t = 0; t < T; ++t) {
    const __m256i x = quad(q + t * stride + 4 * S);
    sums[0][t] = _mm256_add_epi16(sums[0][t], _mm256_maddubs_epi16(w0, x));
    sums[1][t] = _mm256_add_epi16(sums[1][t], _mm256_maddubs_epi16(w1, x));
    BD_IN_ORDER(sums[0][t]);
    BD_IN_ORDER(sums[1][t]);
  }
}

// dots is (T, 32); this half of the block fills 16 of the 32.
template <int T>
void tile_dots(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups, int32_t *dots) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i totals[kTileVectors][T] = {};
  for (int64_t g = 0; g < groups; g += kTileChunk) {
    const int64_t end = smaller(g + kTileChunk, groups);
    __m256i sums[kTileVectors][T] = {};
    for (int64_t i = g; i < end; ++i, w += BD_BLOCK_BYTES, q += BD_BLOCK_COLUMNS) {
      tile_step<0, T>(w, q, stride, sums);
      tile_step<1, T>(w, q, stride, sums);
      tile_step<2, T>(w, q, stride, sums);
      tile_step<3, T>(w, q, stride, sums);
    }
    for (int v = 0; v < kTileVectors; ++v)
      for (int t = 0; t < T; ++t)
        totals[v][t] = _mm256_add_epi32(totals[v][t], _mm256_madd_epi16(sums[v][t], ones));
  }
  for (int v = 0; v < kTileVectors; ++v)
    for (int t = 0; t < T; ++t) store(dots + BD_BLOCK_ROWS * t + 8 * v, totals[v][t]);
}

using TileDots = void (*)(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);
constexpr TileDots kTiles[kTileTokens + 1] = {
    nullptr, tile_dots<1>, tile_dots<2>, tile_dots<3>, tile_dots<4>, tile_dots<5>, tile_dots<6>};

// S streams of `count` blocks each, the first from block `first`.
template <int S>
void one_token(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t count) {
  if (count == 0) return;
  alignas(32) int32_t dots[S][BD_BLOCK_ROWS];
  __m256i quads[kMostSpread][4];
  const int64_t groups = groups_of(w->columns), step = count * groups * BD_BLOCK_BYTES;
  const __m256i(*all)[4] = groups <= kMostSpread ? quads : nullptr;
  if (all != nullptr) spread(in->q, groups, quads);
  // The runs that nothing fetches ahead of.
  for (int64_t i = 0; i < smaller(kMatvecChunk, groups); ++i)
    for (int s = 0; s < S; ++s) fetch_group(block_bytes(w, first) + s * step + i * BD_BLOCK_BYTES);
  for (int64_t block = first; block < first + count; ++block) {
    matvec_dots<S>(block_bytes(w, block), step, in->q, all, groups, dots);
    for (int s = 0; s < S; ++s)
      write_rows(w, block + s * count, dots[s], in->sum[0], in->down[0], y);
  }
}

void several_tokens(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t groups = groups_of(w->columns);
  alignas(32) int32_t dots[kTileTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTileTokens);
      const int8_t *q = in->q + token * in->stride;
      const uint8_t *packed = block_bytes(w, block);
      kTiles[count](packed, q, in->stride, groups, &dots[0][0]);
      kTiles[count](packed + BD_BLOCK_BYTES / 2, q, in->stride, groups, &dots[0][16]);
      for (int t = 0; t < count; ++t, ++token)
        write_rows(w, block, dots[t], in->sum[token], in->down[token], y + token * w->rows);
    }
}

}  // namespace

namespace bitdistill {
namespace avx2 {

void ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  if (in->tokens == 1) {
    const int64_t count = (last - first) / kStreams;
    one_token<kStreams>(w, in, y, first, count);
    return one_token<1>(w, in, y, first + kStreams * count, last - first - kStreams * count);
  }
  const int64_t done = lookup(w, in, y, first, last);
  const BdTokens rest = tokens_from(in, done);
  several_tokens(w, &rest, y + done * w->rows, first, last);
}

}  // namespace avx2
}  // namespace bitdistill
#endif
