// int8 activations times trits with vpdpbusd, which multiplies four unsigned bytes of an output row
// by four signed ones and adds them to its int32 lane: nothing saturates and nothing is widened.
// avx_vnni_ternary.cpp and avx512_vnni_ternary.cpp include this after defining `Vector`: the loads,
// logic and vpdpbusd of their register width. Internal linkage, as common.h explains.
//
// Exactness. A code is 0..3 (3 only in malformed weights) and may stay in place at weight 1, 4, 16
// or 64. A lane then sums at most 2^17 products of 3 * 128 at weight 4, below 2^28, or 2^15
// products (a quarter of the columns) of 192 * 128, below 2^30: int32 holds both.
#ifndef BITDISTILL_VNNI_H
#define BITDISTILL_VNNI_H

#include "rows.h"

namespace {

using Type = Vector::Type;

constexpr int kVectors = BD_BLOCK_ROWS / Vector::kRows;
constexpr int kVectorBytes = 4 * Vector::kRows;
constexpr int kTileVectors = 2;
constexpr int kPrefetch = 2048;  // bytes ahead of the weights being read

inline Type quad(const int8_t *q) {
  int32_t bits;
  memcpy(&bits, q, sizeof bits);
  return Vector::every(bits);
}

// ---- one token: bound by memory, so codes stay in place and each weight has a sum of its own ----

inline void add_products(Type a, const Type (&x)[4], Type (&sums)[Vector::kSums]) {
  const Type low = Vector::every(0x03030303), next = Vector::every(0x0c0c0c0c);
  sums[0] = Vector::dot(sums[0], Vector::both(a, low), x[0]);
  sums[1] = Vector::dot(sums[1], Vector::both(a, next), x[1]);
  if (Vector::kSums == 4) {
    sums[Vector::kSums - 2] =
        Vector::dot(sums[Vector::kSums - 2], Vector::both(a, Vector::every(0x30303030)), x[2]);
    sums[Vector::kSums - 1] =
        Vector::dot(sums[Vector::kSums - 1],
                    Vector::both(a, Vector::every(static_cast<int32_t>(0xc0c0c0c0u))), x[3]);
  } else {
    const Type b = Vector::right<4>(a);
    sums[0] = Vector::dot(sums[0], Vector::both(b, low), x[2]);
    sums[1] = Vector::dot(sums[1], Vector::both(b, next), x[3]);
  }
}

inline Type total_of(const Type (&sums)[Vector::kSums]) {  // every sum is a multiple of its weight
  const Type total = Vector::add(sums[0], Vector::divide<2>(sums[1]));
  if (Vector::kSums == 2) return total;
  return Vector::add(total, Vector::add(Vector::divide<4>(sums[Vector::kSums - 2]),
                                        Vector::divide<6>(sums[Vector::kSums - 1])));
}

void matvec_dots(const uint8_t *w, const int8_t *q, int64_t groups, int32_t *dots) {
  Type sums[kVectors][Vector::kSums] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BLOCK_COLUMNS) {
    _mm_prefetch(reinterpret_cast<const char *>(w + kPrefetch), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char *>(w + kPrefetch + 64), _MM_HINT_T0);
    const Type x[4] = {quad(q), quad(q + 4), quad(q + 8), quad(q + 12)};
    for (int v = 0; v < kVectors; ++v) add_products(Vector::load(w + kVectorBytes * v), x, sums[v]);
  }
  for (int v = 0; v < kVectors; ++v) Vector::store(dots + Vector::kRows * v, total_of(sums[v]));
}

// ---- several tokens: a tile of two vectors of rows x T tokens unpacks each code once ----

template <int S, int T>
inline void tile_step(const Type (&packed)[kTileVectors], const int8_t *q, int64_t stride,
                      Type (&sums)[kTileVectors][T]) {
  const Type low = Vector::every(0x03030303);
  const Type w0 = Vector::both(Vector::right<2 * S>(packed[0]), low);
  const Type w1 = Vector::both(Vector::right<2 * S>(packed[1]), low);
  for (int t = 0; t < T; ++t) {
    const Type x = quad(q + t * stride + 4 * S);
    sums[0][t] = Vector::dot(sums[0][t], w0, x);
    sums[1][t] = Vector::dot(sums[1][t], w1, x);
  }
}

// dots is (T, 32), of which a tile fills its rows.
template <int T>
void tile_dots(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups, int32_t *dots) {
  Type sums[kTileVectors][T] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BLOCK_COLUMNS) {
    const Type packed[kTileVectors] = {Vector::load(w), Vector::load(w + kVectorBytes)};
    tile_step<0, T>(packed, q, stride, sums);
    tile_step<1, T>(packed, q, stride, sums);
    tile_step<2, T>(packed, q, stride, sums);
    tile_step<3, T>(packed, q, stride, sums);
  }
  for (int v = 0; v < kTileVectors; ++v)
    for (int t = 0; t < T; ++t)
      Vector::store(dots + BD_BLOCK_ROWS * t + Vector::kRows * v, sums[v][t]);
}

using TileDots = void (*)(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);

template <int T>
struct Tiles {  // the tile of at most T tokens for a count
  static TileDots of(int count) { return count == T ? tile_dots<T> : Tiles<T - 1>::of(count); }
};
template <>
struct Tiles<0> {
  static TileDots of(int) { return nullptr; }
};

void one_token(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  int32_t dots[BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block) {
    matvec_dots(block_bytes(w, block), in->q, groups_of(w->columns), dots);
    write_rows(w, block, dots, in->sum[0], in->down[0], y);
  }
}

void several_tokens(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  constexpr int kParts = kVectors / kTileVectors;
  int32_t dots[Vector::kTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, Vector::kTokens);
      const TileDots tile = Tiles<Vector::kTokens>::of(count);
      for (int part = 0; part < kParts; ++part)
        tile(block_bytes(w, block) + kTileVectors * kVectorBytes * part, in->q + token * in->stride,
             in->stride, groups_of(w->columns), &dots[0][kTileVectors * Vector::kRows * part]);
      for (int t = 0; t < count; ++t, ++token)
        write_rows(w, block, dots[t], in->sum[token], in->down[token], y + token * w->rows);
    }
}

}  // namespace
#endif
