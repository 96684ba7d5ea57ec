// NEON: int8 activations times trits of five a byte. A code is what three times its byte carries: 1
// from 86 on, 2 from 171 on.
#include "neon.h"
#include "rows.h"

#if BD_ARM
namespace {

constexpr int kTokens = 4;

inline int8x16_t next_codes(uint8x16_t *bytes) {
  const uint8x16_t one = vcgtq_u8(*bytes, vdupq_n_u8(85));  // 255 for true: -1
  const uint8x16_t two = vcgtq_u8(*bytes, vdupq_n_u8(170));
  *bytes = vaddq_u8(*bytes, vaddq_u8(*bytes, *bytes));
  return vabsq_s8(vreinterpretq_s8_u8(vaddq_u8(one, two)));
}

// V vectors of 4 rows for T tokens; dots is (T, 32).
template <int V, int T>
void tile_dots(const uint8_t *w, const int8_t *q, int64_t stride, int64_t groups, int32_t *dots) {
  int32x4_t sums[T][V] = {};
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES, q += BD_BASE3_COLUMNS)
    for (int v = 0; v < V; ++v) {
      uint8x16_t bytes = vld1q_u8(w + 16 * v);
      for (int s = 0; s < 5; ++s) {
        const int8x16_t codes = next_codes(&bytes);
        for (int t = 0; t < T; ++t)
          sums[t][v] = vdotq_s32(sums[t][v], codes, quad(q + t * stride + 4 * s));
      }
    }
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) vst1q_s32(dots + BD_BLOCK_ROWS * t + 4 * v, sums[t][v]);
}

using TileDots = void (*)(const uint8_t *, const int8_t *, int64_t, int64_t, int32_t *);
constexpr TileDots kTiles[kTokens + 1] = {nullptr, nullptr, tile_dots<4, 2>, tile_dots<4, 3>,
                                          tile_dots<4, 4>};

void block_dots(const uint8_t *packed, const int8_t *q, int64_t stride, int64_t groups, int count,
                int32_t *dots) {
  if (count == 1) return tile_dots<kQuads, 1>(packed, q, stride, groups, dots);
  kTiles[count](packed, q, stride, groups, dots);
  kTiles[count](packed + BD_BLOCK_BYTES / 2, q, stride, groups, dots + BD_BLOCK_ROWS / 2);
}

// 16 bytes of each group of a block, as in avx2_base3.cpp.
void unpack_rows(const uint8_t *w, int64_t groups, uint8_t *out, const uint8_t *end) {
  uint8x16_t byte = vdupq_n_u8(0);
  int codes_in_byte = 0;
  for (int64_t g = 0; g < groups; ++g, w += BD_BLOCK_BYTES) {
    uint8x16_t bytes = vld1q_u8(w);
    for (int s = 0; s < 5; ++s) {
      const uint8x16_t codes = vreinterpretq_u8_s8(next_codes(&bytes));
      byte = vsliq_n_u8(vshrq_n_u8(byte, 2), codes, 6);
      if (++codes_in_byte < 4) continue;
      if (out < end) vst1q_u8(out, byte);
      byte = vdupq_n_u8(0);
      codes_in_byte = 0;
      out += BD_BLOCK_BYTES;
    }
  }
  if (out >= end) return;
  for (; codes_in_byte < 4; ++codes_in_byte) byte = vshrq_n_u8(byte, 2);
  vst1q_u8(out, byte);
}

}  // namespace

namespace bitdistill {
namespace neon {

void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t groups = base3_groups(w->columns);
  int32_t dots[kTokens][BD_BLOCK_ROWS];
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens;) {
      const int count = tile_tokens(in->tokens - token, kTokens);
      const int8_t *q = in->q + token * in->stride;
      block_dots(base3_block(w, block), q, in->stride, groups, count, &dots[0][0]);
      for (int t = 0; t < count; ++t, ++token)
        write_rows(w, block, dots[t], in->sum[token], in->down[token], y + token * w->rows);
    }
}

void unpack_base3(const BdTernary *w, uint8_t *out, int64_t first, int64_t last) {
  const int64_t groups = base3_groups(w->columns);
  const int64_t bytes = groups_of(w->columns) * BD_BLOCK_BYTES;
  for (int64_t block = first; block < last; ++block)
    for (int64_t i = 0; i < BD_BLOCK_BYTES; i += 16)
      unpack_rows(base3_block(w, block) + i, groups, out + block * bytes + i,
                  out + (block + 1) * bytes);
}

}  // namespace neon
}  // namespace bitdistill
#endif
