// Attention for kernels_driver.cpp: pieces of tokens over caches of every width, in exactly sized
// heap buffers, against the scalar table.
#ifndef BITDISTILL_ATTENTION_DRIVER_H
#define BITDISTILL_ATTENTION_DRIVER_H

#include <cstring>
#include <random>
#include <vector>

#include "bitdistill_kernels.h"

struct AttentionCase {
  int64_t size, group, window, bits;
  std::vector<int64_t> pieces;  // tokens fed at once
};

// What attention writes for every token, then both caches.
inline std::vector<char> run_attention(const BdKernels *kernels, const AttentionCase &c,
                                       const std::vector<float> &x) {
  int64_t tokens = 0;
  for (const int64_t piece : c.pieces) tokens += piece;
  const size_t row = static_cast<size_t>(bd_cache_row_bytes(c.size, c.bits));
  std::vector<char> keys(row * static_cast<size_t>(tokens)), values(keys.size());
  const int64_t columns = (c.group + 2) * c.size;
  std::vector<float> y(static_cast<size_t>(tokens * c.group * c.size), -1.0f);
  const std::vector<float> turn(static_cast<size_t>(tokens * c.size / 2), 0.7071f);
  const std::vector<float> norm(static_cast<size_t>(c.size), 1.1f);
  BdAttention a = {};
  a.keys = keys.data(), a.values = values.data();
  a.cos = turn.data(), a.sin = turn.data(), a.q_norm = norm.data(), a.k_norm = norm.data();
  a.q_stride = a.k_stride = a.v_stride = columns, a.y_stride = c.group * c.size;
  a.epsilon = 1e-6f, a.scale = 0.125f;
  a.group = c.group, a.head_size = c.size, a.window = c.window, a.cache_bits = c.bits;
  for (const int64_t piece : c.pieces) {
    a.q = x.data() + a.past * columns;
    a.k = a.q + c.group * c.size, a.v = a.k + c.size;
    a.y = y.data() + a.past * a.y_stride;
    if (bd_attention(kernels, &a, piece) == 0) return {};
    a.past += piece;
  }
  std::vector<char> all(y.size() * sizeof(float));
  std::memcpy(all.data(), y.data(), all.size());
  all.insert(all.end(), keys.begin(), keys.end());
  all.insert(all.end(), values.begin(), values.end());
  return all;
}

inline bool same_attention(const BdKernels *kernels, const BdKernels *oracle,
                           std::mt19937 &random) {
  std::normal_distribution<float> normal;
  for (const int64_t bits : {32, 16, 8})
    for (const int64_t size : {16, 80})
      for (const int64_t group : {1, 5})
        for (const int64_t window : {0, 9}) {
          const AttentionCase c = {size, group, window, bits, {17, 1, 3}};
          std::vector<float> x(static_cast<size_t>(21 * (group + 2) * size));
          for (float &value : x) value = normal(random);
          const std::vector<char> expected = run_attention(oracle, c, x);
          if (expected.empty() || run_attention(kernels, c, x) != expected) return false;
        }
  return true;
}

#endif
