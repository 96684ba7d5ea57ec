// AVX-512 with VNNI: the three heads. vpdpbusd adds four products of unsigned codes and q to an
// int32 lane, so nothing can saturate; what the codes' offsets owe is taken from sums of q.
#include "head.h"
#include "x86_tables.h"

#include <immintrin.h>

namespace {

constexpr int kPrefetch = 2048;  // bytes ahead of a 4-bit table
constexpr int kRows = 4;         // streams
constexpr int kTokens = 3;       // of 16 and 8 bits: what 32 registers hold for 4 rows
constexpr int kTokens4 = 8;

// ---- 16 bits: two vectors are the 32 partial sums ----

template <int R, int T>
inline void half_step(const uint16_t *w, int64_t step, const float *x, int64_t stride,
                      __m512 (&sums)[R][T][2]) {
  for (int v = 0; v < 2; ++v) {
    __m512 e[T];
    for (int t = 0; t < T; ++t) e[t] = _mm512_loadu_ps(x + t * stride + 16 * v);
    for (int p = 0; p < R; ++p) {
      const __m512 weights = _mm512_cvtph_ps(
          _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w + p * step + 16 * v)));
      for (int t = 0; t < T; ++t)
        sums[p][t][v] = _mm512_add_ps(sums[p][t][v], _mm512_mul_ps(e[t], weights));
    }
  }
}

// The last `rest` columns: a lane without one keeps its sum, whatever its sign of zero.
template <int R, int T>
void half_rest(const uint16_t *w, int64_t step, const float *x, int64_t stride, int64_t rest,
               __m512 (&sums)[R][T][2]) {
  for (int v = 0; v < 2; ++v) {
    const __mmask16 mask = static_cast<__mmask16>(((1u << rest) - 1) >> 16 * v);
    for (int p = 0; p < R; ++p) {
      const __m512 weights = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, w + p * step + 16 * v));
      for (int t = 0; t < T; ++t) {
        const __m512 e = _mm512_maskz_loadu_ps(mask, x + t * stride + 16 * v);
        sums[p][t][v] =
            _mm512_mask_add_ps(sums[p][t][v], mask, sums[p][t][v], _mm512_mul_ps(e, weights));
      }
    }
  }
}

// The 32 partial sums added in halves.
inline float fold(__m512 low, __m512 high) {
  const __m512 sixteen = _mm512_add_ps(low, high);
  const __m256 eight =
      _mm256_add_ps(_mm512_castps512_ps256(sixteen), _mm512_extractf32x8_ps(sixteen, 1));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// R streams of `count` rows each, the first from row `first`.
template <int R, int T>
void half_rows(const BdHalfTable *w, const float *x, float *y, int64_t first, int64_t count) {
  const int64_t columns = w->columns;
  for (int64_t row = first; row < first + count; ++row) {
    const uint16_t *table = w->table + row * columns;
    __m512 sums[R][T][2] = {};
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes)
      half_step<R, T>(table + i, count * columns, x + i, columns, sums);
    if (i < columns) half_rest<R, T>(table + i, count * columns, x + i, columns, columns - i, sums);
    for (int p = 0; p < R; ++p)
      for (int t = 0; t < T; ++t)
        y[t * w->rows + row + p * count] = fold(sums[p][t][0], sums[p][t][1]);
  }
}

template <int T>
void half_tile(const BdHalfTable *w, const float *x, float *y, int64_t first, int64_t last) {
  const int64_t count = (last - first) / kRows;
  half_rows<kRows, T>(w, x, y, first, count);
  half_rows<1, T>(w, x, y, first + kRows * count, last - first - kRows * count);
}

using HalfTile = void (*)(const BdHalfTable *, const float *, float *, int64_t, int64_t);
constexpr HalfTile kHalfTiles[kTokens + 1] = {nullptr, half_tile<1>, half_tile<2>, half_tile<3>};

void half(const BdHalfTable *w, const float *x, int64_t tokens, float *y, int64_t first,
          int64_t last) {
  const int64_t strip = strip_rows(tokens, kTokens, last - first);
  for (int64_t row = first; row < last; row += strip)
    for (int64_t token = 0; token < tokens;) {
      const int count = tile_tokens(tokens - token, kTokens);
      kHalfTiles[count](w, x + token * w->columns, y + token * w->rows, row,
                        smaller(row + strip, last));
      token += count;
    }
}

// ---- 8 bits ----

// `codes` holds the next 64 of R rows.
template <int R, int T>
inline void step8(const __m512i (&codes)[R], const int8_t *q, int64_t stride,
                  __m512i (&sums)[R][T][2]) {
  for (int t = 0; t < T; ++t)
    for (int part = 0; part < 2; ++part) {
      const __m512i e = _mm512_loadu_si512(q + (2 * t + part) * stride);
      for (int p = 0; p < R; ++p)
        sums[p][t][part] = _mm512_dpbusd_epi32(sums[p][t][part], codes[p], e);
    }
}

// The sums of R rows at a distance of `step` bytes.
template <int R, int T>
inline void dots8(const uint8_t *w, int64_t step, const int8_t *q, int64_t stride, int64_t columns,
                  __m512i (&sums)[R][T][2]) {
  __m512i codes[R];
  int64_t i = 0;
  for (; i + 64 <= columns; i += 64) {
    for (int p = 0; p < R; ++p) codes[p] = _mm512_loadu_si512(w + p * step + i);
    step8<R, T>(codes, q + i, stride, sums);
  }
  if (i == columns) return;
  const __mmask64 mask = (1ull << (columns - i)) - 1;
  for (int p = 0; p < R; ++p) codes[p] = _mm512_maskz_loadu_epi8(mask, w + p * step + i);
  step8<R, T>(codes, q + i, stride, sums);
}

// As half_rows.
template <int R, int T>
void rows8(const BdTable *w, const BdHeadTokens *in, int64_t token, const int64_t (&owed)[T],
           float *y, int64_t first, int64_t count) {
  for (int64_t row = first; row < first + count; ++row) {
    __m512i sums[R][T][2] = {};
    dots8<R, T>(w->codes + row * w->columns, count * w->columns, head_part(in, token, 0),
                in->stride, w->columns, sums);
    for (int p = 0; p < R; ++p)
      for (int t = 0; t < T; ++t) {
        const int64_t sum = whole_sum(_mm512_reduce_add_epi32(sums[p][t][0]),
                                      _mm512_reduce_add_epi32(sums[p][t][1]));
        y[(token + t) * w->rows + row + p * count] =
            head_value(sum - owed[t], in->down[token + t], w->scale[row + p * count]);
      }
  }
}

template <int T>
void tile8(const BdTable *w, const BdHeadTokens *in, int64_t token, float *y, int64_t first,
           int64_t last) {
  int64_t owed[T];
  for (int t = 0; t < T; ++t) owed[t] = head_owed(in, token + t);
  const int64_t count = (last - first) / kRows;
  rows8<kRows, T>(w, in, token, owed, y, first, count);
  rows8<1, T>(w, in, token, owed, y, first + kRows * count, last - first - kRows * count);
}

using Tile8 = void (*)(const BdTable *, const BdHeadTokens *, int64_t, float *, int64_t, int64_t);
constexpr Tile8 kTiles8[kTokens + 1] = {nullptr, tile8<1>, tile8<2>, tile8<3>};

void int8(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t strip = strip_rows(in->tokens, kTokens, last - first);
  for (int64_t row = first; row < last; row += strip)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens);
      kTiles8[count](w, in, token, y, row, smaller(row + strip, last));
      token += count;
    }
}

// ---- 4 bits: each lane is a row ----

inline __m512i quad(const int8_t *q) {
  int32_t bits;
  memcpy(&bits, q, sizeof bits);
  return _mm512_set1_epi32(bits);
}

// The sums of a block and T tokens, over all groups; sums is (T, 16).
template <int T>
void block_sums(const BdTable *table, int64_t block, const BdHeadTokens *in, int64_t token,
                float (*sums)[BD_TABLE_ROWS]) {
  const __m512i low = _mm512_set1_epi8(15);
  const int64_t step = in->stride / BD_TABLE_COLUMNS;
  const uint8_t *w = table_block(table, block);
  const int8_t *scales = table_scales(table, block);
  const int8_t *q = group_q(in, token);
  const int16_t *starts = group_sums(in, token);
  const float *downs = group_downs(in, token);
  __m512 totals[T] = {};
  for (int64_t g = 0; g < table_groups(in->columns); ++g) {
    __m512i dots[T];
    for (int t = 0; t < T; ++t) dots[t] = _mm512_set1_epi32(-8 * starts[t * step + g]);
    for (int s = 0; s < 4; ++s) {
      _mm_prefetch(reinterpret_cast<const char *>(w + 64 * s + kPrefetch), _MM_HINT_T0);
      const __m512i codes = _mm512_loadu_si512(w + 64 * s);
      const __m512i c0 = _mm512_and_si512(codes, low);
      const __m512i c1 = _mm512_and_si512(_mm512_srli_epi16(codes, 4), low);
      for (int t = 0; t < T; ++t) {
        const int8_t *at = q + t * in->stride + 8 * s;
        dots[t] = _mm512_dpbusd_epi32(dots[t], c0, quad(at));
        dots[t] = _mm512_dpbusd_epi32(dots[t], c1, quad(at + 4));
      }
    }
    const __m512i factors =
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(scales)));
    for (int t = 0; t < T; ++t) {
      const __m512 dot = _mm512_cvtepi32_ps(_mm512_mullo_epi32(dots[t], factors));
      totals[t] = _mm512_add_ps(totals[t], _mm512_mul_ps(dot, _mm512_set1_ps(downs[t * step + g])));
    }
    w += BD_TABLE_BYTES;
    scales += BD_TABLE_ROWS;
    q += BD_TABLE_COLUMNS;
  }
  for (int t = 0; t < T; ++t) _mm512_storeu_ps(sums[t], totals[t]);
}

using BlockSums = void (*)(const BdTable *, int64_t, const BdHeadTokens *, int64_t,
                           float (*)[BD_TABLE_ROWS]);
constexpr BlockSums kBlocks[kTokens4 + 1] = {nullptr,       block_sums<1>, block_sums<2>,
                                             block_sums<3>, block_sums<4>, block_sums<5>,
                                             block_sums<6>, block_sums<7>, block_sums<8>};

void int4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  alignas(64) float sums[kTokens4][BD_TABLE_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens4);
      kBlocks[count](w, block, in, token, sums);
      for (int t = 0; t < count; ++t, ++token)
        write_table_rows(w, block, sums[t], y + token * w->rows);
    }
}

}  // namespace

namespace bitdistill {
const BdHeadKernels avx512_vnni_heads = {half, int8, int4};
}  // namespace bitdistill
