// What the NEON files share: loads, and the functions of their table. They need the dot product of
// Armv8.2, and are empty on processors other than 64-bit Arm.
#ifndef BITDISTILL_NEON_H
#define BITDISTILL_NEON_H

#include "common.h"

#if BD_ARM
namespace bitdistill {
namespace neon {
void quantize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last);
void normalize(const BdInput *in, const BdTokens *out, int64_t first, int64_t last);
void gate(const BdGate *in, float *out, int64_t first, int64_t last);
void ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
void ternary_float(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
void unpack_base3(const BdTernary *w, uint8_t *out, int64_t first, int64_t last);
extern const BdHeadKernels heads;
extern const BdAttentionKernels attention;
}  // namespace neon
}  // namespace bitdistill

// neon.cpp itself is compiled for any Armv8: it asks whether the CPU has the dot product.
#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

namespace {

constexpr int kQuads = BD_BLOCK_ROWS / 4;  // a block of 32 rows is eight vectors of 4 lanes

// Four activations in every lane.
inline int8x16_t quad(const int8_t *q) {
  int32_t bits;
  memcpy(&bits, q, sizeof bits);
  return vreinterpretq_s8_s32(vdupq_n_s32(bits));
}

// The codes at bits 2 S of each byte; S is a constant because the shift must be.
template <int S>
inline int8x16_t codes_at(uint8x16_t packed) {
  if (S == 0) return vreinterpretq_s8_u8(vandq_u8(packed, vdupq_n_u8(3)));
  return vreinterpretq_s8_u8(vandq_u8(vshrq_n_u8(packed, S == 0 ? 1 : 2 * S), vdupq_n_u8(3)));
}

// 32 partial sums, in eight vectors, added in halves.
inline float fold(const float32x4_t (&sums)[8]) {
  float32x4_t four[4];
  for (int v = 0; v < 4; ++v) four[v] = vaddq_f32(sums[v], sums[v + 4]);
  const float32x4_t one = vaddq_f32(vaddq_f32(four[0], four[2]), vaddq_f32(four[1], four[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(one), vget_high_f32(one));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}

}  // namespace
#endif
#endif
#endif
