// What attention is made of on every CPU: rows of the cache, norm and rotation, the exponential's
// constants, and the division of scratch memory. Internal linkage, as common.h explains.
#ifndef BITDISTILL_ATTENTION_PARTS_H
#define BITDISTILL_ATTENTION_PARTS_H

#include "common.h"

namespace {

constexpr int kSumLanes = 16;  // partial sums of a dot product and of the sum of p
constexpr int kBlock = 32;     // positions whose keys or values are widened at a time
constexpr float kLargestHalf = 65504.0f;
constexpr float kSmallestRow = 7.888609e-31f;  // 2^-100: below it 127 / g could overflow

// exp(x) = 2^n (1 + r + r^2 P(r)), n = round(x / ln 2), r = x - n ln 2 in two parts.
constexpr float kLog2e = 1.44269504f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kExp[6] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                           4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kExpLeast = -86.0f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23

inline int64_t cache_row_bytes(const BdAttention *a) {
  return bd_cache_row_bytes(a->head_size, a->cache_bits);
}

inline char *cache_row(const BdAttention *a, void *cache, int64_t position) {
  return static_cast<char *>(cache) + position * cache_row_bytes(a);
}

// The scale behind the codes of an 8-bit row; 1 for the others.
inline float row_scale(const BdAttention *a, void *cache, int64_t position) {
  if (a->cache_bits != 8) return 1.0f;
  float scale;
  memcpy(&scale, cache_row(a, cache, position) + a->head_size, sizeof scale);
  return scale;
}

inline int64_t first_visible(const BdAttention *a, int64_t position) {
  return a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
}

// Norm and rotation of one head at a position.
inline void prepare_head(const BdAttention *a, const float *x, const float *norm, int64_t position,
                         float *out) {
  const int64_t size = a->head_size, half = size / 2;
  if (norm != nullptr) {
    float lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
    for (int lane = 0; i < size; ++i, ++lane) lanes[lane] += x[i] * x[i];
    const float r = inverse_rms(fold(lanes, kLanes), size, a->epsilon);
    for (i = 0; i < size; ++i) out[i] = x[i] * r * norm[i];
  } else if (out != x) {
    memcpy(out, x, static_cast<size_t>(size) * sizeof *out);
  }
  if (a->cos == nullptr) return;
  const float *cos = a->cos + position * half, *sin = a->sin + position * half;
  for (int64_t i = 0; i < half; ++i) {
    const float first = out[i], second = out[half + i];
    out[i] = first * cos[i] - second * sin[i];
    out[half + i] = second * cos[i] + first * sin[i];
  }
}

// An 8-bit row: codes, then their scale.
inline void keep_codes(const float *x, int64_t size, char *row) {
  int32_t top = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int32_t m = magnitude(x[i]);
    top = m > top ? m : top;
  }
  float g;
  memcpy(&g, &top, sizeof g);
  const float scale = top < kInfinityBits ? g / 127.0f : NAN;
  memcpy(row + size, &scale, sizeof scale);
  int8_t *codes = reinterpret_cast<int8_t *>(row);
  if (top >= kInfinityBits || g < kSmallestRow) {
    memset(codes, 0, static_cast<size_t>(size));
    return;
  }
  const float up = 127.0f / g;
  for (int64_t i = 0; i < size; ++i)
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(round_even(x[i] * up)));
}

// Positions that rows [first, last) see: from `base`, a multiple of 16, to `end`. `padded`
// positions have scores.
struct Span {
  int64_t base, end, padded;
};

inline Span span_of(const BdAttention *a, int64_t first_row, int64_t last_row) {
  const int64_t low = a->past + first_row / a->group;
  const int64_t end = a->past + (last_row - 1) / a->group + 1;
  const int64_t base = first_visible(a, low) / kSumLanes * kSumLanes;
  return {base, end, (end - base + kSumLanes - 1) / kSumLanes * kSumLanes};
}

}  // namespace
#endif
