// AVX2: the heads of 16 and 8 bits; that of 4 bits is in avx2_head4.cpp.
//
// Exactness. 8 bits: codes 0..255 times |q| <= 8064, two products a vpmaddwd lane, so that one of
// 16 lanes takes 2 * 255 * 8064 for each 32 columns: < 2^31 for K <= 2^14.
#include "avx2.h"
#include "head.h"

#if BD_X86
namespace {

// ---- 16 bits, 32 partial sums for each row and token: two rows of one token, or one row of up to
// three tokens, fill the registers ----

constexpr int kHalfRows = 2;
constexpr int kHalfTokens = 3;

float half_at(const uint16_t *p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*p))); }

__m256 eight_halves(const uint16_t *p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}

template <int R, int T>
inline void half_step(const uint16_t *w, int64_t step, const float *x, int64_t stride,
                      __m256 (&sums)[R][T][4]) {
  for (int v = 0; v < 4; ++v)
    for (int p = 0; p < R; ++p) {
      const __m256 weights = eight_halves(w + p * step + 8 * v);
      for (int t = 0; t < T; ++t) {
        const __m256 e = _mm256_loadu_ps(x + t * stride + 8 * v);
        sums[p][t][v] = _mm256_add_ps(sums[p][t][v], _mm256_mul_ps(e, weights));
      }
    }
}

// The 32 partial sums added in halves.
inline float fold(const __m256 (&sums)[4]) {
  const __m256 eight =
      _mm256_add_ps(_mm256_add_ps(sums[0], sums[2]), _mm256_add_ps(sums[1], sums[3]));
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

// The same, after the columns that do not fill the 32.
float fold_rest(const __m256 (&sums)[4], const uint16_t *w, const float *x, int64_t rest) {
  float lanes[kLanes];
  for (int v = 0; v < 4; ++v) _mm256_storeu_ps(lanes + 8 * v, sums[v]);
  for (int64_t k = 0; k < rest; ++k) lanes[k] += x[k] * half_at(w + k);
  return fold(lanes, kLanes);
}

// R streams of `count` rows each, the first from row `first`.
template <int R, int T>
void half_rows(const BdHalfTable *w, const float *x, float *y, int64_t first, int64_t count) {
  const int64_t columns = w->columns;
  const int64_t whole = columns / kLanes * kLanes;
  for (int64_t row = first; row < first + count; ++row) {
    const uint16_t *table = w->table + row * columns;
    __m256 sums[R][T][4] = {};
    for (int64_t i = 0; i < whole; i += kLanes)
      half_step<R, T>(table + i, count * columns, x + i, columns, sums);
    for (int p = 0; p < R; ++p)
      for (int t = 0; t < T; ++t)
        y[t * w->rows + row + p * count] =
            whole == columns ? fold(sums[p][t])
                             : fold_rest(sums[p][t], table + p * count * columns + whole,
                                         x + t * columns + whole, columns - whole);
  }
}

void half_one(const BdHalfTable *w, const float *x, float *y, int64_t first, int64_t last) {
  const int64_t count = (last - first) / kHalfRows;
  half_rows<kHalfRows, 1>(w, x, y, first, count);
  half_rows<1, 1>(w, x, y, first + kHalfRows * count, last - first - kHalfRows * count);
}

template <int T>
void half_tile(const BdHalfTable *w, const float *x, float *y, int64_t first, int64_t last) {
  half_rows<1, T>(w, x, y, first, last - first);
}

using HalfTile = void (*)(const BdHalfTable *, const float *, float *, int64_t, int64_t);
constexpr HalfTile kHalfTiles[kHalfTokens + 1] = {nullptr, half_one, half_tile<2>, half_tile<3>};

void half(const BdHalfTable *w, const float *x, int64_t tokens, float *y, int64_t first,
          int64_t last) {
  const int64_t strip = strip_rows(tokens, kHalfTokens, last - first);
  for (int64_t row = first; row < last; row += strip)
    for (int64_t token = 0; token < tokens;) {
      const int count = tile_tokens(tokens - token, kHalfTokens);
      kHalfTiles[count](w, x + token * w->columns, y + token * w->rows, row,
                        smaller(row + strip, last));
      token += count;
    }
}

// ---- 8 bits, widened to 16 ----

constexpr int kTokens8 = 2;

inline __m256i widened(const uint8_t *p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}

// 32 columns; the two sums of each row and token take 16 of them each.
template <int R, int T>
inline void step8(const uint8_t *w, int64_t step, const int16_t *q, int64_t stride,
                  __m256i (&sums)[R][T][2]) {
  for (int v = 0; v < 2; ++v)
    for (int p = 0; p < R; ++p) {
      const __m256i codes = widened(w + p * step + 16 * v);
      for (int t = 0; t < T; ++t) {
        const __m256i products = _mm256_madd_epi16(codes, load(q + t * stride + 16 * v));
        sums[p][t][v] = _mm256_add_epi32(sums[p][t][v], products);
      }
    }
}

inline int64_t total_of(const __m256i (&sums)[2]) {
  __m256i wide = _mm256_setzero_si256();
  for (int v = 0; v < 2; ++v) {
    wide = _mm256_add_epi64(wide, _mm256_cvtepi32_epi64(_mm256_castsi256_si128(sums[v])));
    wide = _mm256_add_epi64(wide, _mm256_cvtepi32_epi64(_mm256_extracti128_si256(sums[v], 1)));
  }
  const __m128i two =
      _mm_add_epi64(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  return _mm_cvtsi128_si64(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two)));
}

// The last columns of R rows, copied beside each other: nothing is read beyond a table.
template <int R, int T>
void rest8(const uint8_t *w, int64_t step, int64_t bytes, const int16_t *q, int64_t stride,
           __m256i (&sums)[R][T][2]) {
  uint8_t copy[R][32] = {};  // q is zero there, whatever stands beside it
  for (int p = 0; p < R; ++p) memcpy(copy[p], w + p * step, static_cast<size_t>(bytes));
  step8<R, T>(&copy[0][0], 32, q, stride, sums);
}

// As half_rows.
template <int R, int T>
void rows8(const BdTable *w, const BdHeadTokens *in, int64_t token, const int64_t (&owed)[T],
           float *y, int64_t first, int64_t count) {
  const int64_t columns = w->columns;
  const int16_t *q = in->q + token * in->stride;
  for (int64_t row = first; row < first + count; ++row) {
    const uint8_t *codes = w->codes + row * columns;
    __m256i sums[R][T][2] = {};
    int64_t i = 0;
    for (; i + 32 <= columns; i += 32)
      step8<R, T>(codes + i, count * columns, q + i, in->stride, sums);
    if (i < columns) rest8<R, T>(codes + i, count * columns, columns - i, q + i, in->stride, sums);
    for (int p = 0; p < R; ++p)
      for (int t = 0; t < T; ++t)
        y[(token + t) * w->rows + row + p * count] = head_value(
            total_of(sums[p][t]) - owed[t], in->down[token + t], w->scale[row + p * count]);
  }
}

template <int R, int T>
void tile8(const BdTable *w, const BdHeadTokens *in, int64_t token, float *y, int64_t first,
           int64_t last) {
  int64_t owed[T];
  for (int t = 0; t < T; ++t) owed[t] = head_owed(in, token + t);
  const int64_t count = (last - first) / R;
  rows8<R, T>(w, in, token, owed, y, first, count);
  rows8<1, T>(w, in, token, owed, y, first + R * count, last - first - R * count);
}

void int8(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t strip = strip_rows(in->tokens, kTokens8, last - first);
  for (int64_t row = first; row < last; row += strip)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens8);
      (count == 1 ? tile8<4, 1> : tile8<3, 2>)(w, in, token, y, row, smaller(row + strip, last));
      token += count;
    }
}

}  // namespace

namespace bitdistill {
namespace avx2 {
const BdHeadKernels heads = {half, int8, head4};
}  // namespace avx2
}  // namespace bitdistill
#endif
