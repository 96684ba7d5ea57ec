// Attention for the vector instruction sets, a template over one: rows of a tile pass together over
// the cache, so that each key and value is loaded once for them. `I` gives vectors of kWidth floats
// (F), their arithmetic, loads that widen, and kSums, how many of them a tile may hold as sums.
//
// The cache passes in blocks. With more than kDirectRows rows one is widened to floats first; else
// each load widens, and the block that follows is fetched meanwhile, since a token that reads the
// cache once waits for memory. Both compute the same bits.
#ifndef BITDISTILL_ATTENTION_TILE_H
#define BITDISTILL_ATTENTION_TILE_H

#include "attention.h"
#include "attention_fetch.h"

namespace {

constexpr int64_t kDirectRows = 4;
constexpr int kPositions = 4;          // keys of one tile of dot products
constexpr int64_t kDirectBlock = 128;  // positions
constexpr int64_t kFirstBytes = 8192;  // of the first block, fetched before anything else is done

// Memory of one call of attend; every part is a multiple of 64 bytes.
struct Tile {
  Span span;
  int64_t rows, size;
  float *q, *sums, *scores, *wide, *key_scale, *value_scale;

  Tile(const BdAttention *a, int64_t first, int64_t last, void *scratch)
      : span(span_of(a, first, last)), rows(last - first), size(a->head_size) {
    float *memory = static_cast<float *>(scratch);
    q = memory;
    sums = q + rows * size;
    scores = sums + rows * size;
    wide = scores + rows * span.padded;
    key_scale = wide + kBlock * size;
    value_scale = key_scale + span.padded;
  }
};

template <class I, class T>
struct Attend {
  using F = typename I::F;
  static constexpr int W = I::kWidth, kParts = kSumLanes / W;
  static constexpr int64_t kBytes = sizeof(T);

  // Products of R rows of q and four keys, each in `kParts` vectors of sums.
  template <int R>
  static void dots(const float *q, int64_t size, const T *const *k, float *scores, int64_t stride) {
    F sums[kParts][R][kPositions];
    for (int part = 0; part < kParts; ++part) {
      F some[R][kPositions];
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < kPositions; ++p) some[r][p] = I::zero();
      for (int64_t i = part * W; i < size; i += kSumLanes) {
        F key[kPositions];
        for (int p = 0; p < kPositions; ++p) key[p] = I::load(k[p] + i);
        for (int r = 0; r < R; ++r) {
          const F x = I::load(q + r * size + i);
          for (int p = 0; p < kPositions; ++p) some[r][p] = I::fused(x, key[p], some[r][p]);
        }
      }
      for (int r = 0; r < R; ++r)
        for (int p = 0; p < kPositions; ++p) sums[part][r][p] = some[r][p];
    }
    for (int r = 0; r < R; ++r) {
      F lanes[kParts][kPositions];
      for (int part = 0; part < kParts; ++part)
        for (int p = 0; p < kPositions; ++p) lanes[part][p] = sums[part][r][p];
      I::fold(lanes, scores + r * stride);
    }
  }

  // Adds `count` weighted values to R rows of sums, N vectors wide. Weights lie `stride` apart. A
  // few lines are fetched at a time: a pass' worth at once would hold up the loads.
  template <int R, int N>
  static void mix(const float *w, int64_t stride, const T *v, int64_t row_size, int64_t count,
                  float *y, int64_t size, Fetch<I> *ahead) {
    F sums[R][N];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) sums[r][n] = I::load(y + r * size + n * W);
    Fetch<I> more = *ahead;
    for (int64_t j = 0; j < count;) {
      more.advance(kPositions * N * W * kBytes);
      for (const int64_t end = smaller(j + kPositions, count); j < end; ++j, v += row_size) {
        F value[N];
        for (int n = 0; n < N; ++n) value[n] = I::load(v + n * W);
        for (int r = 0; r < R; ++r) {
          const F weight = I::all(w[r * stride + j]);
          for (int n = 0; n < N; ++n) sums[r][n] = I::fused(weight, value[n], sums[r][n]);
        }
      }
    }
    *ahead = more;
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) I::store(y + r * size + n * W, sums[r][n]);
  }

  // `count` positions from `keys`, whose rows are row_size elements apart, for rows of one height.
  template <int R>
  static void dot_rows(const Tile &t, int64_t row, const T *keys, int64_t row_size, int64_t place,
                       int64_t count, Fetch<I> *ahead) {
    for (int64_t j = 0; j < count; j += kPositions) {
      ahead->advance(kPositions * row_size * kBytes);
      const T *k[kPositions];
      for (int p = 0; p < kPositions; ++p) k[p] = keys + smaller(j + p, count - 1) * row_size;
      dots<R>(t.q + row * t.size, t.size, k, t.scores + row * t.span.padded + place + j,
              t.span.padded);
    }
  }

  template <int R>
  static void mix_rows(const Tile &t, int64_t row, const T *values, int64_t row_size, int64_t place,
                       int64_t count, Fetch<I> *ahead) {
    constexpr int N = I::kSums / R;
    const float *w = t.scores + row * t.span.padded + place;
    float *y = t.sums + row * t.size;
    int64_t i = 0;
    for (; i + N * W <= t.size; i += N * W)
      mix<R, N>(w, t.span.padded, values + i, row_size, count, y + i, t.size, ahead);
    for (; i < t.size; i += W)
      mix<R, 1>(w, t.span.padded, values + i, row_size, count, y + i, t.size, ahead);
  }

  // Positions [place, place + count) of the span, for all rows of the tile.
  static void dot_all(const Tile &t, const T *keys, int64_t row_size, int64_t place, int64_t count,
                      Fetch<I> ahead) {
    int64_t r = 0;
    for (; r + 4 <= t.rows && I::kSums >= 16; r += 4)
      dot_rows<4>(t, r, keys, row_size, place, count, &ahead);
    for (; r + 2 <= t.rows; r += 2) dot_rows<2>(t, r, keys, row_size, place, count, &ahead);
    for (; r < t.rows; ++r) dot_rows<1>(t, r, keys, row_size, place, count, &ahead);
  }

  static void mix_all(const Tile &t, const T *values, int64_t row_size, int64_t place,
                      int64_t count, Fetch<I> ahead) {
    int64_t r = 0;
    for (; r + 4 <= t.rows; r += 4) mix_rows<4>(t, r, values, row_size, place, count, &ahead);
    for (; r + 2 <= t.rows; r += 2) mix_rows<2>(t, r, values, row_size, place, count, &ahead);
    for (; r < t.rows; ++r) mix_rows<1>(t, r, values, row_size, place, count, &ahead);
  }
};

// Rows of the cache, `stride` elements apart -> floats without gaps.
template <class I, class T>
const float *widen(const T *rows, int64_t stride, int64_t count, int64_t size, float *out) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < size; i += I::kWidth)
      I::store(out + j * size + i, I::load(rows + j * stride + i));
  return out;
}

// Positions of a block: the span in equal parts, so that the next is fetched while one passes.
inline int64_t block_positions(const Tile &t) {
  if (t.rows > kDirectRows) return kBlock;
  const int64_t all = t.span.end - t.span.base, blocks = (all + kDirectBlock - 1) / kDirectBlock;
  return ((all + blocks - 1) / blocks + kPositions - 1) / kPositions * kPositions;
}

// The block at `place`; nothing beyond the end.
template <class I>
Fetch<I> fetch_block(const BdAttention *a, const Tile &t, void *cache, int64_t place) {
  const int64_t all = t.span.end - t.span.base;
  if (t.rows > kDirectRows || place >= all) return Fetch<I>();
  return Fetch<I>(cache_row(a, cache, t.span.base + place),
                  smaller(block_positions(t), all - place) * cache_row_bytes(a));
}

// Dot products with the keys, or sums of the values, of every position of the span.
template <class I, class T>
void over_cache(const BdAttention *a, const Tile &t, void *cache, bool keys) {
  const int64_t stride = cache_row_bytes(a) / static_cast<int64_t>(sizeof(T));
  const int64_t all = t.span.end - t.span.base, block = block_positions(t);
  for (int64_t place = 0; place < all; place += block) {
    const int64_t count = smaller(block, all - place);
    const T *rows = reinterpret_cast<const T *>(cache_row(a, cache, t.span.base + place));
    if (t.rows <= kDirectRows || sizeof(T) == sizeof(float)) {
      const Fetch<I> ahead = keys && place + block >= all
                                 ? fetch_block<I>(a, t, a->values, 0)
                                 : fetch_block<I>(a, t, cache, place + block);
      keys ? Attend<I, T>::dot_all(t, rows, stride, place, count, ahead)
           : Attend<I, T>::mix_all(t, rows, stride, place, count, ahead);
      continue;
    }
    const float *wide = widen<I, T>(rows, stride, count, t.size, t.wide);
    keys ? Attend<I, float>::dot_all(t, wide, t.size, place, count, Fetch<I>())
         : Attend<I, float>::mix_all(t, wide, t.size, place, count, Fetch<I>());
  }
}

template <class I>
void over_cache(const BdAttention *a, const Tile &t, void *cache, bool keys) {
  if (a->cache_bits == 8)
    over_cache<I, int8_t>(a, t, cache, keys);
  else if (a->cache_bits == 16)
    over_cache<I, uint16_t>(a, t, cache, keys);
  else
    over_cache<I, float>(a, t, cache, keys);
}

template <class I>
typename I::F exponential(typename I::F x) {
  using F = typename I::F;
  const F t = I::add(I::mul(x, I::all(kLog2e)), I::all(kRound));
  const F n = I::sub(t, I::all(kRound));
  const F r = I::fused(n, I::all(-kLn2Low), I::fused(n, I::all(-kLn2High), x));
  F p = I::all(kExp[0]);
  for (int i = 1; i < 6; ++i) p = I::fused(p, r, I::all(kExp[i]));
  const F y = I::add(I::fused(p, I::mul(r, r), r), I::all(1.0f));
  return I::zero_below(I::times_power(y, t), x, kExpLeast);
}

// Scores of one row -> weights, in place; returns 1 / (sum of p).
template <class I>
float soften(const BdAttention *a, const Tile &t, int64_t position, float *s) {
  using F = typename I::F;
  constexpr int W = I::kWidth;
  const int64_t low = first_visible(a, position) - t.span.base;
  const int64_t high = position + 1 - t.span.base;
  F top = I::all(-INFINITY);
  for (int64_t j = 0; j < t.span.padded; j += W)
    I::store(s + j, I::mul(I::load(s + j), I::load(t.key_scale + j)));
  for (int64_t j = 0; j < low; ++j) s[j] = -INFINITY;
  for (int64_t j = high; j < t.span.padded; ++j) s[j] = -INFINITY;
  for (int64_t j = 0; j < t.span.padded; j += W) top = I::max(top, I::load(s + j));
  const F most = I::all(I::largest(top));
  F lanes[kSumLanes / W];
  for (F &sum : lanes) sum = I::zero();
  for (int64_t j = 0; j < t.span.padded; j += W) {
    const F p = exponential<I>(I::sub(I::load(s + j), most));
    F &sum = lanes[j / W % (kSumLanes / W)];
    sum = I::add(sum, p);
    I::store(s + j, I::mul(p, I::load(t.value_scale + j)));
  }
  float sums[kSumLanes];
  for (int part = 0; part < kSumLanes / W; ++part) I::store(sums + part * W, lanes[part]);
  return 1.0f / fold(sums, kSumLanes);
}

inline void read_scales(const BdAttention *a, const Tile &t) {
  for (int64_t j = 0; j < t.span.padded; ++j) {
    const bool held = t.span.base + j < t.span.end;
    t.key_scale[j] = a->scale * (held ? row_scale(a, a->keys, t.span.base + j) : 1.0f);
    t.value_scale[j] = held ? row_scale(a, a->values, t.span.base + j) : 1.0f;
  }
}

template <class I>
void attend(const BdAttention *a, int64_t first, int64_t last, void *scratch) {
  const Tile t(a, first, last, scratch);
  const int64_t size = t.size;
  fetch_block<I>(a, t, a->keys, 0).advance(kFirstBytes);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t token = (first + r) / a->group, head = (first + r) % a->group;
    const float *q = a->q + token * a->q_stride + head * size;
    prepare_head(a, q, a->q_norm, a->past + token, t.q + r * size);
  }
  read_scales(a, t);
  memset(t.sums, 0, static_cast<size_t>(t.rows * size) * sizeof(float));
  over_cache<I>(a, t, a->keys, true);
  float inverse[BD_TILE_ROWS];
  for (int64_t r = 0; r < t.rows; ++r)
    inverse[r] = soften<I>(a, t, a->past + (first + r) / a->group, t.scores + r * t.span.padded);
  over_cache<I>(a, t, a->values, false);
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t token = (first + r) / a->group, head = (first + r) % a->group;
    float *y = a->y + token * a->y_stride + head * size;
    for (int64_t i = 0; i < size; ++i) y[i] = t.sums[r * size + i] * inverse[r];
  }
}

template <class I>
void keep_row(const BdAttention *a, const float *x, char *row) {
  if (a->cache_bits == 8) return keep_codes(x, a->head_size, row);
  if (a->cache_bits == 32) {
    memcpy(row, x, static_cast<size_t>(a->head_size) * sizeof *x);
    return;
  }
  for (int64_t i = 0; i < a->head_size; i += I::kWidth)
    I::store_half(reinterpret_cast<uint16_t *>(row) + i, I::load(x + i));
}

template <class I>
void keep(const BdAttention *a, int64_t first, int64_t last) {
  float key[BD_MAX_HEAD_SIZE];
  for (int64_t t = first; t < last; ++t) {
    prepare_head(a, a->k + t * a->k_stride, a->k_norm, a->past + t, key);
    keep_row<I>(a, key, cache_row(a, a->keys, a->past + t));
    keep_row<I>(a, a->v + t * a->v_stride, cache_row(a, a->values, a->past + t));
  }
}

}  // namespace
#endif
