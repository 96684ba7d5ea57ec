// NEON: attention over vectors of 4 floats.
#include "attention_tile.h"
#include "neon.h"

#if BD_ARM
namespace {

struct Neon {
  using F = float32x4_t;
  static constexpr int kWidth = 4, kSums = 16;

  static F load(const float *x) { return vld1q_f32(x); }
  static F load(const uint16_t *x) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x))); }
  static F load(const int8_t *x) {
    int32_t bytes;
    memcpy(&bytes, x, sizeof bytes);
    const int8x8_t codes = vreinterpret_s8_s32(vdup_n_s32(bytes));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(codes))));
  }
  static void prefetch(const char *) {}  // nothing was measured on Arm
  static void store(float *y, F x) { vst1q_f32(y, x); }
  static void store_half(uint16_t *y, F x) {
    x = vmaxq_f32(all(-kLargestHalf), vminq_f32(all(kLargestHalf), x));
    vst1_u16(y, vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }
  static F zero() { return vdupq_n_f32(0.0f); }
  static F all(float x) { return vdupq_n_f32(x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F fused(F a, F b, F c) { return vfmaq_f32(c, a, b); }

  // y * 2^n, n being the low bits of t.
  static F times_power(F y, F t) {
    const int32x4_t exponent = vshlq_n_s32(vreinterpretq_s32_f32(t), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(y), exponent));
  }
  static F zero_below(F y, F x, float least) {
    const uint32x4_t below = vcltq_f32(x, all(least));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), below));
  }
  static float largest(F x) { return vmaxvq_f32(x); }

  // Four dot products of 16 sums each: lanes + 8, then + 4, + 2 and + 1.
  static void fold(const F (&lanes)[4][4], float *out) {
    for (int p = 0; p < 4; ++p) {
      const F four = add(add(lanes[0][p], lanes[2][p]), add(lanes[1][p], lanes[3][p]));
      const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
      out[p] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
  }
};

}  // namespace

namespace bitdistill {
namespace neon {
const BdAttentionKernels attention = {keep<Neon>, attend<Neon>};
}  // namespace neon
}  // namespace bitdistill
#endif
