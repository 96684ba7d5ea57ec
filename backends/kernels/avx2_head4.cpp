// AVX2: the 4-bit head. Each lane is a row, V vectors of 8 rows for T tokens.
//
// Exactness. A lane of int16 takes 16 of a group's 32 columns, of codes 0..15 times |q| <= 127, and
// starts at -4 times the sum of all 32, so that its pair of lanes sums to (code - 8) . q: at most
// 16 * 127 * (11 + 4) = 30480. Times a group scale, 128 * 32 * 8 * 127 < 2^24 is exact in fp32.
#include "avx2.h"
#include "head.h"

#if BD_X86
namespace {

// The scales of 8 rows, each twice in its 32-bit lane as int16.
inline __m256i pair_scales(const int8_t *scales) {
  const __m256i high_bytes =
      _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                       -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
  int64_t eight;
  memcpy(&eight, scales, sizeof eight);
  return _mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), high_bytes), 8);
}

constexpr int kTokens4 = 4;
constexpr int kStreams4 = 2;

// Tokens as the products of one group read them.
struct Group {
  const int8_t *q;
  const int16_t *starts;
  const float *downs;
  int64_t stride;  // of q; the others' is a 32nd
};

inline Group group_of(const BdHeadTokens *in, int64_t token, int64_t g) {
  return {group_q(in, token) + g * BD_TABLE_COLUMNS, group_sums(in, token) + g,
          group_downs(in, token) + g, in->stride};
}

// Adds one group's products to the sums of V * 8 rows and T tokens. Two vectors are a block; where
// there are more, the next block's group lies `apart` groups behind.
template <int V, int T>
inline void add_group(const uint8_t *w, const int8_t *scales, int64_t apart, const Group &in,
                      __m256 (&totals)[T][V]) {
  const __m256i low = _mm256_set1_epi8(15);
  const int64_t step = in.stride / BD_TABLE_COLUMNS;
  __m256i dots[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v)
      dots[t][v] = _mm256_set1_epi16(static_cast<int16_t>(-4 * in.starts[t * step]));
  for (int s = 0; s < 4; ++s)
    for (int v = 0; v < V; ++v) {
      const __m256i codes = load(w + v / 2 * apart * BD_TABLE_BYTES + 64 * s + 32 * (v % 2));
      const __m256i c0 = _mm256_and_si256(codes, low);
      const __m256i c1 = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
      for (int t = 0; t < T; ++t) {
        const int8_t *at = in.q + t * in.stride + 8 * s;
        dots[t][v] = _mm256_add_epi16(dots[t][v], _mm256_maddubs_epi16(c0, quad(at)));
        dots[t][v] = _mm256_add_epi16(dots[t][v], _mm256_maddubs_epi16(c1, quad(at + 4)));
        BD_IN_ORDER(dots[t][v]);
      }
    }
  for (int v = 0; v < V; ++v) {
    const __m256i factors = pair_scales(scales + v / 2 * apart * BD_TABLE_ROWS + 8 * (v % 2));
    for (int t = 0; t < T; ++t) {
      const __m256 dot = _mm256_cvtepi32_ps(_mm256_madd_epi16(dots[t][v], factors));
      const __m256 down = _mm256_set1_ps(in.downs[t * step]);
      totals[t][v] = _mm256_add_ps(totals[t][v], _mm256_mul_ps(dot, down));
    }
  }
}

// One token: memory gives a core more of distant pages than of neighbouring blocks, so S streams of
// `count` blocks each, the first from block `first`, pass side by side. More than two would not fit
// the registers. Every line is fetched, those of the scales too: a part of them misleads the
// processor's own fetching.
template <int S>
void one_token4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t count) {
  constexpr int64_t kAhead = 4;  // groups
  alignas(32) float sums[BD_TABLE_ROWS];
  const int64_t groups = table_groups(w->columns), apart = count * groups;
  for (int64_t block = first; block < first + count; ++block) {
    const uint8_t *codes = table_block(w, block);
    const int8_t *scales = table_scales(w, block);
    __m256 totals[1][2 * S] = {};
    for (int64_t g = 0; g < groups; ++g) {
      for (int s = 0; s < S; ++s) {
        const uint8_t *next = codes + (s * apart + kAhead) * BD_TABLE_BYTES;
        fetch_group(next);
        fetch_group(next + BD_TABLE_BYTES / 2);
        _mm_prefetch(reinterpret_cast<const char *>(scales + (s * apart + kAhead) * BD_TABLE_ROWS),
                     _MM_HINT_T0);
      }
      add_group<2 * S, 1>(codes, scales, apart, group_of(in, 0, g), totals);
      codes += BD_TABLE_BYTES;
      scales += BD_TABLE_ROWS;
    }
    for (int s = 0; s < S; ++s) {
      for (int v = 0; v < 2; ++v) _mm256_store_ps(sums + 8 * v, totals[0][2 * s + v]);
      write_table_rows(w, block + s * count, sums, y);
    }
  }
}

// V * 8 rows of a block, T tokens; sums is (T, 16).
template <int V, int T>
void tile_sums(const BdTable *w, int64_t block, int64_t row, const BdHeadTokens *in, int64_t token,
               float *sums) {
  const uint8_t *codes = table_block(w, block) + 4 * row;
  const int8_t *scales = table_scales(w, block) + row;
  __m256 totals[T][V] = {};
  for (int64_t g = 0; g < table_groups(w->columns); ++g) {
    for (int s = 0; s < 4; ++s)
      _mm_prefetch(reinterpret_cast<const char *>(codes + kPrefetch + 64 * s), _MM_HINT_T0);
    add_group<V, T>(codes, scales, 0, group_of(in, token, g), totals);
    codes += BD_TABLE_BYTES;
    scales += BD_TABLE_ROWS;
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v)
      _mm256_storeu_ps(sums + BD_TABLE_ROWS * t + row + 8 * v, totals[t][v]);
}

// Two tokens take a whole block, more take it in halves: what 16 registers hold.
template <int T>
void tile4(const BdTable *w, int64_t block, const BdHeadTokens *in, int64_t token, float *sums) {
  constexpr int kVectors4 = T <= 2 ? 2 : 1;
  for (int row = 0; row < BD_TABLE_ROWS; row += 8 * kVectors4)
    tile_sums<kVectors4, T>(w, block, row, in, token, sums);
}

using Tile4 = void (*)(const BdTable *, int64_t, const BdHeadTokens *, int64_t, float *);
constexpr Tile4 kTiles4[kTokens4 + 1] = {nullptr, tile4<1>, tile4<2>, tile4<3>, tile4<4>};

}  // namespace

namespace bitdistill {
namespace avx2 {

void head4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  if (in->tokens == 1) {
    const int64_t count = (last - first) / kStreams4;
    one_token4<kStreams4>(w, in, y, first, count);
    return one_token4<1>(w, in, y, first + kStreams4 * count, last - first - kStreams4 * count);
  }
  alignas(32) float sums[kTokens4][BD_TABLE_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens4);
      kTiles4[count](w, block, in, token, &sums[0][0]);
      for (int t = 0; t < count; ++t, ++token)
        write_table_rows(w, block, sums[t], y + token * w->rows);
    }
}

}  // namespace avx2
}  // namespace bitdistill
#endif
