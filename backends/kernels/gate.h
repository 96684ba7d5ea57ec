// act(gate) * up, in plain loops that every compiler turns into vectors. No operation is fused and
// each rounds once, so all instruction sets compute the same bits. Internal linkage, as common.h
// explains.
#ifndef BITDISTILL_GATE_H
#define BITDISTILL_GATE_H

#include "attention.h"

namespace {

constexpr float kTwiceRoot = 1.5957691216f;  // 2 sqrt(2 / pi)
constexpr float kCubic = 0.044715f;
constexpr int32_t kOneBits = 0x3f800000;
constexpr int32_t kFadedBits = 0x42ac0000;  // 86: exp(-x) counts as zero above

inline int32_t bits_of(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// exp(-x) of attention.h for x of these bits, not negative, with products rounded; its bits.
inline int32_t faded(int32_t x) {
  const float t = -float_of(x) * kLog2e + kRound;
  const float n = t - kRound;
  const float r = (-float_of(x) - n * kLn2High) - n * kLn2Low;
  float p = kExp[0];
  for (int i = 1; i < 6; ++i) p = p * r + kExp[i];
  const uint32_t y = static_cast<uint32_t>(bits_of((p * (r * r) + r) + 1.0f));
  const uint32_t exponent = static_cast<uint32_t>(bits_of(t)) << 23;
  return static_cast<int32_t>(y + exponent) & ~((kFadedBits - x) >> 31);
}

// x * sigmoid(z), as x / (1 + e) or x e / (1 + e) with e = exp(-|z|): silu for z = x, and
// 0.5 x (1 + tanh(u)) for z = 2 u. Masks in place of branches, which would keep a loop scalar.
template <bool Silu>
inline float activated(float x) {
  const int32_t z = bits_of(Silu ? x : kTwiceRoot * (x + kCubic * (x * x * x)));
  const int32_t e = faded(z & 0x7fffffff), negative = z >> 31;
  return x * float_of((e & negative) | (kOneBits & ~negative)) / (1.0f + float_of(e));
}

template <bool Silu>
void gate_rows(const BdGate *in, float *out, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const float *x = in->gate + token * in->stride, *up = in->up + token * in->stride;
    float *y = out + token * in->columns;
    for (int64_t i = 0; i < in->columns; ++i) y[i] = activated<Silu>(x[i]) * up[i];
  }
}

inline void gate_all(const BdGate *in, float *out, int64_t first, int64_t last) {
  (in->activation == BD_SILU ? gate_rows<true> : gate_rows<false>)(in, out, first, last);
}

}  // namespace
#endif
