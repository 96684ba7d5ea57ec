// What every instruction set shares. Internal linkage on purpose: each file is compiled with its
// own machine flags, and a function merged by the linker could carry AVX2 code into the scalar
// path. For the same reason these files include no C++ standard header with inline functions.
#ifndef BITDISTILL_COMMON_H
#define BITDISTILL_COMMON_H

#include <math.h>
#include <string.h>

#include "bitdistill_kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define BD_X86 1
#else
#define BD_X86 0
#endif

#if defined(__aarch64__) && !defined(_MSC_VER)
#define BD_ARM 1
#else
#define BD_ARM 0
#endif

namespace bitdistill {
extern const BdAttentionKernels scalar_attention;
const BdKernels *scalar_kernels();
#if BD_ARM
const BdKernels *neon_kernels();
#endif
#if BD_X86
const BdKernels *avx2_kernels();
#endif
}  // namespace bitdistill

namespace {

constexpr float kActivationEps = 1e-5f;
constexpr int32_t kInfinityBits = 0x7f800000;
constexpr int kLanes = 32;

inline int64_t groups_of(int64_t columns) {
  return (columns + BD_BLOCK_COLUMNS - 1) / BD_BLOCK_COLUMNS;
}

inline int64_t base3_groups(int64_t columns) {
  return (columns + BD_BASE3_COLUMNS - 1) / BD_BASE3_COLUMNS;
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// |x| as an integer: it orders like |x|, and NaN and infinity are >= kInfinityBits. A maximum of
// these is exact and independent of the order, NaN included.
inline int32_t magnitude(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffff;
}

inline float fold(float *lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float inverse_rms(float sum_of_squares, int64_t columns, float epsilon) {
  return 1.0f / sqrtf(sum_of_squares / static_cast<float>(columns) + epsilon);
}

// Half-to-even for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction bits to keep.
inline float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }

// up of one token from the bits of g = max |v|; false if the token is not finite.
inline bool token_scale(int32_t g_bits, float *up, float *down) {
  float g;
  memcpy(&g, &g_bits, sizeof g);
  *up = 127.0f / (g + kActivationEps);
  *down = g / 127.0f;
  if (g_bits < kInfinityBits) return true;
  *down = NAN;
  return false;
}

// The tokens from `first` on; their results start at y + first * rows.
inline BdTokens tokens_from(const BdTokens *in, int64_t first) {
  BdTokens out = *in;
  out.q += first * in->stride;
  out.down += first;
  out.sum += first;
  out.tokens -= first;
  return out;
}

// Tokens of the next tile, so that tiles differ by at most one token.
inline int tile_tokens(int64_t remaining, int most) {
  const int64_t tiles = (remaining + most - 1) / most;
  return static_cast<int>((remaining + tiles - 1) / tiles);
}

inline const uint8_t *block_bytes(const BdTernary *w, int64_t block) {
  return w->packed + block * groups_of(w->columns) * BD_BLOCK_BYTES;
}

inline const uint8_t *base3_block(const BdTernary *w, int64_t block) {
  return w->packed + block * base3_groups(w->columns) * BD_BLOCK_BYTES;
}

}  // namespace
#endif
