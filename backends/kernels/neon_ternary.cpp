// NEON: trits times int8 and fp32 activations. Every lane is an output row; SDOT adds four products
// of a row's codes and a broadcast quad of activations, exactly: |q . code| <= 3 * 128 * 2^17 <
// 2^31.
#include "neon.h"
#include "rows.h"

#if BD_ARM
namespace {

constexpr int kTileTokens = 4;   // for half a block: 16 sums of the 32 registers
constexpr int kFloatTokens = 4;  // for 4 rows

// V vectors of 4 rows for T tokens; dots is (T, 32).
template <int S, int V, int T>
inline void step(const uint8_t *w, const int8_t *q, int64_t stride, int32x4_t (&sums)[T][V]) {
  int8x16_t quads[T];
  for (int t = 0; t < T; ++t) quads[t] = quad(q + t * stride + 4 * S);
  for (int v = 0; v < V; ++v) {
    const int8x16_t codes = codes_at<S>(vld1q_u8(w + 16 * v));
    for (int t = 0; t < T; ++t) sums[t][v] = vdotq_s32(sums[t][v], codes, quads[t]);
  }
}

template <int V, int T>
void tile_dots(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups, int32_t *dots) {
  int32x4_t sums[T][V] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BLOCK_COLUMNS) {
    step<0, V, T>(w, q, stride, sums);
    step<1, V, T>(w, q, stride, sums);
    step<2, V, T>(w, q, stride, sums);
    step<3, V, T>(w, q, stride, sums);
  }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) vst1q_s32(dots + BD_BLOCK_ROWS * t + 4 * v, sums[t][v]);
}

using TileDots = void (*)(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);
constexpr TileDots kTiles[kTileTokens + 1] = {nullptr, nullptr, tile_dots<4, 2>, tile_dots<4, 3>,
                                              tile_dots<4, 4>};

void block_dots(const uint8_t *packed, const int8_t *q, int64_t stride, int64_t groups, int count,
                int32_t *dots) {
  if (count == 1) return tile_dots<kQuads, 1>(packed, q, stride, groups, dots);
  kTiles[count](packed, q, stride, groups, dots);
  kTiles[count](packed + BD_BLOCK_BYTES / 2, q, stride, groups, dots + BD_BLOCK_ROWS / 2);
}

// ---- fp32 activations, 4 rows for T tokens in the four partial sums of the header ----

inline float32x4_t trits_at(uint32x4_t packed, int shift) {
  const uint32x4_t codes = vshlq_u32(packed, vdupq_n_s32(-shift));
  const int32x4_t trits =
      vsubq_s32(vreinterpretq_s32_u32(vandq_u32(codes, vdupq_n_u32(3))), vdupq_n_s32(1));
  return vcvtq_f32_s32(trits);
}

template <int T>
void float_dots(const uint8_t *w, const float *v, int64_t stride, int64_t groups, float *dots) {
  float32x4_t sums[T][4] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, v += BD_BLOCK_COLUMNS) {
    const uint32x4_t packed = vreinterpretq_u32_u8(vld1q_u8(w));
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < 4; ++j) {
        const float32x4_t trits = trits_at(packed, 8 * j + 2 * s);
        for (int t = 0; t < T; ++t) {
          const float32x4_t e = vdupq_n_f32(v[t * stride + 4 * s + j]);
          sums[t][s] = vaddq_f32(sums[t][s], vmulq_f32(e, trits));
        }
      }
  }
  for (int t = 0; t < T; ++t)
    vst1q_f32(dots + BD_BLOCK_ROWS * t,
              vaddq_f32(vaddq_f32(sums[t][0], sums[t][1]), vaddq_f32(sums[t][2], sums[t][3])));
}

using FloatDots = void (*)(const uint8_t *, const float *, int64_t, int64_t, float *);
constexpr FloatDots kFloatTiles[kFloatTokens + 1] = {nullptr, float_dots<1>, float_dots<2>,
                                                     float_dots<3>, float_dots<4>};

}  // namespace

namespace bitdistill {
namespace neon {

void ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t groups = groups_of(w->columns);
  int32_t dots[kTileTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTileTokens);
      const int8_t *q = in->q + token * in->stride;
      block_dots(block_bytes(w, block), q, in->stride, groups, count, &dots[0][0]);
      for (int t = 0; t < count; ++t, ++token)
        write_rows(w, block, dots[t], in->sum[token], in->down[token], y + token * w->rows);
    }
}

void ternary_float(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t groups = groups_of(w->columns);
  float dots[kFloatTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kFloatTokens);
      const float *v = in->values + token * in->stride;
      for (int part = 0; part < kQuads; ++part)
        kFloatTiles[count](block_bytes(w, block) + 16 * part, v, in->stride, groups,
                           &dots[0][4 * part]);
      for (int t = 0; t < count; ++t, ++token)
        write_float_rows(w, block, dots[t], y + token * w->rows);
    }
}

}  // namespace neon
}  // namespace bitdistill
#endif
