/* Attention of one sequence and one key head with the query heads of its group, over a cache that
 * is written in place. Part of bitdistill_kernels.h; every instruction set computes the same bits.
 *
 *   prepare  x' = x * (1 / sqrt(mean(x^2) + epsilon)) * norm      where there is a norm
 *            rotated: (a cos - b sin, b cos + a sin) of the halves a and b, products rounded
 *   keep     cache row = x' at 32 or 16 bits (to nearest even, at most +-65504), or at 8 bits
 *            q = round-half-even(x' * (127 / g)), scale = g / 127, g = max |x'|; q is zero where
 *            g < 2^-100 or is not finite (scale is then g / 127, or NaN)
 *   attend   s[j] = dot(x', k[j]) * (scale * key scale[j])        of the visible positions j
 *            p[j] = exp(s[j] - max s);  w[j] = p[j] * value scale[j]
 *            y[d] = (w[0] v[0][d] + w[1] v[1][d] + ...) * (1 / (p[0] + p[1] + ...))
 *
 * Float order: mean(x^2) as in bitdistill_kernels.h; dot adds element i into partial sum i mod 16
 * and the sum of p adds position j into partial sum j mod 16, both folded in halves (8, 4, 2, 1); y
 * adds positions in their order. Products of dot and y are fused: added unrounded. exp is the
 * polynomial of attention.h, zero below -86. So a token's result depends neither on the tokens fed
 * with it nor on how the work was divided, and decoding equals a whole forward. A NaN or infinity
 * reaches the tokens that are computed with it, later ones of the same call included. */
#ifndef BITDISTILL_ATTENTION_H
#define BITDISTILL_ATTENTION_H

#include <stdint.h>

enum {
  BD_HEAD_MULTIPLE = 16, /* of head_size */
  BD_MAX_HEAD_SIZE = 1024,
  BD_TILE_ROWS = 32 /* the most that `attend` takes at once */
};

/* Token t lies at position past + t. Pointers are those of the first token, of the key head or the
 * first query head of its group; the group's heads follow one another. Strides are in floats. */
typedef struct BdAttention {
  const float *q, *k, *v;
  float *y;
  int64_t q_stride, k_stride, v_stride, y_stride;
  void *keys, *values;          /* the cache: rows of bd_cache_row_bytes(), one a position */
  const float *cos, *sin;       /* (positions, head_size / 2); NULL: no rotation */
  const float *q_norm, *k_norm; /* (head_size), or NULL */
  float epsilon;
  float scale;
  int64_t past;
  int64_t group;      /* query heads of this key head */
  int64_t head_size;  /* a multiple of 16 */
  int64_t window;     /* positions that a token sees, itself included; 0: all */
  int64_t cache_bits; /* 32, 16 or 8 */
} BdAttention;

/* Rows are numbered token * group + head. Calls of `attend` may run at once, after all of `keep`.
 */
typedef struct BdAttentionKernels {
  void (*keep)(const BdAttention *a, int64_t first_token, int64_t last_token);
  /* at most BD_TILE_ROWS rows; scratch of bd_attention_scratch_bytes() */
  void (*attend)(const BdAttention *a, int64_t first_row, int64_t last_row, void *scratch);
} BdAttentionKernels;

#endif
