// float16 <-> float32 without instructions for it. Internal linkage, as common.h explains.
#ifndef BITDISTILL_HALF_H
#define BITDISTILL_HALF_H

#include "common.h"

namespace {

inline float from_half(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t fraction = half & 1023u;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
  float value;
  memcpy(&value, &bits, sizeof value);
  if (exponent != 0) return value;
  const float small = static_cast<float>(fraction) * (1.0f / 16777216.0f);  // subnormal: 2^-24
  return sign != 0 ? -small : small;
}

// To nearest even; what is beyond the largest becomes the largest.
inline uint16_t to_half(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477fe000u) return static_cast<uint16_t>(sign | 0x7bffu);  // 65504 and more
  if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24
    float small;
    memcpy(&small, &bits, sizeof small);
    small += 0.5f;
    memcpy(&bits, &small, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + (bits >> 13 & 1);  // exponent less 112, half a unit less one, odd up
  return static_cast<uint16_t>(sign | bits >> 13);
}

}  // namespace
#endif
