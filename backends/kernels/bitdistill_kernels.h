/* The C ABI of bitdistill's CPU kernels, usable without any runtime.
 *
 * One table of function pointers per instruction set (BdKernels); bd_kernels() picks one. All
 * tables compute the same bits: `scalar` is the oracle, the others must equal it exactly.
 *
 *   quantize   v = x, or x * (1 / sqrt(mean(x^2) + epsilon)) * norm_weight with a norm
 *              g = max |v|;  q = round-half-even(v * (127 / (g + 1e-5)));  sum = q_0 + q_1 + ...
 *   ternary    y[n] = float(q . t[n]) * ((g / 127) * scale[n]) + bias[n]
 *
 * q . t is exact integer arithmetic: the packed codes are t + 1, so the kernels form q . code and
 * subtract `sum`. A token that holds NaN or infinity gives a row of NaN.
 *
 * Float order (the same everywhere): mean(x^2) and the 16-bit head add element i into partial sum
 * i mod 32, each product rounded before it is added, and fold the partial sums in
 * halves (16, 8, 4, 2, 1); `ternary_float` adds column 16 q + 4 s + j into partial sum s in the
 * order of q, then j, and folds (0 + 1) + (2 + 3).
 *
 *   gate       out = act(gate) * up, act being silu or gelu in its tanh form, to some units in the
 *              last place (gate.h)
 *
 * Attention has a header of its own, bitdistill_attention.h.
 *
 * The LM head and the embedding read one table of 16, 8 or 4 bits:
 *
 *   half       y[n] = x . fp32(table[n])
 *   int8       g = max |x|;  q = round-half-even(x * (8064 / g)), zero if g < 2^-100
 *              y[n] = float(q . w[n]) * ((g / 8064) * scale[n])
 *   int4       of each 32 columns d = max |x| / 127;  q = round-half-even(x * (1 / d)), zero if
 *              max |x| < 2^-100;  y[n] = (float(q . w[n]) * d + ...) * scale[n], group by group
 *   gather     row[k] = float(w[n][k]) * scale[n]
 *
 * with integers w = code - 128 (8 bits) or w = group_scale * (code - 8) (4 bits), so that q . w is
 * exact too. Beside a table of 8 bits, 8-bit activations would cost more accuracy than the table
 * does, and 14 bits cost little where the table comes from memory; q is also kept as
 * 128 * high + low. A table of 4 bits costs so much that 8 bits for each 32 columns add nothing.
 *
 * Nothing throws, and only the pool locks. It allocates, and so does AVX2 prefill: once a thread,
 * and without memory it takes a slower way. Pointers need no alignment beyond their type's
 * (`packed`: none). The caller checks sizes; codes of 3 in `packed` give some result and no fault.
 */
#ifndef BITDISTILL_KERNELS_H
#define BITDISTILL_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "bitdistill_attention.h"

#if defined(_WIN32)
#define BD_API __declspec(dllexport)
#else
#define BD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
  BD_ABI_VERSION = 1,
  BD_LAYOUT_VERSION = 1, /* of `packed`; bitdistill/packing.py */
  BD_BLOCK_ROWS = 32,
  BD_BLOCK_COLUMNS = 16,
  BD_BLOCK_BYTES = 128,
  BD_BASE3_LAYOUT_VERSION = 2,
  BD_BASE3_COLUMNS = 20,    /* of a block of 128 bytes */
  BD_UNPACKED_TOKENS = 8,   /* from here on base 3 is worth unpacking */
  BD_MAX_COLUMNS = 1 << 17, /* |q . t| <= 128 K must be exact in fp32 */
  BD_TABLE_ROWS = 16,       /* of a 4-bit table; bitdistill/tables.py */
  BD_TABLE_COLUMNS = 32,
  BD_TABLE_BYTES = 256,
  BD_SILU = 1, /* of a gate */
  BD_GELU_TANH = 2,
  BD_ADD = 3,
  BD_HEAD_LEVELS = 63 * 128,
  BD_MAX_TABLE_COLUMNS = 1 << 14 /* 2 * 255 * 8064 K / 32 must fit int32 */
};

/* A ternary matrix (rows, columns): packed is uint8 (ceil(rows/32), ceil(columns/16), 32, 4), or in
 * base 3 (ceil(rows/32), ceil(columns/20), 32, 4), where no byte is a fault: one that is not of the
 * 243 counts as its neighbour.
 *
 * With `update` what y holds before is not overwritten: BD_ADD adds to it, and with BD_SILU or
 * BD_GELU_TANH it is a gate, which is activated and multiplied. So a residual and an MLP's product
 * need no memory beside y. */
typedef struct BdTernary {
  const uint8_t *packed;
  const float *scale; /* (rows) */
  const float *bias;  /* (rows), or NULL */
  int64_t rows;
  int64_t columns;
  int base3; /* which of the two: bd_ternary_linear and bd_ternary_layers ask, the kernels know */
  int update;
} BdTernary;

/* Activations as they come: x is (tokens, columns). */
typedef struct BdInput {
  const float *x;
  const float *norm_weight; /* (columns), or NULL: no norm */
  float epsilon;
  int64_t tokens;
  int64_t columns;
} BdInput;

/* A gated MLP's halves: `columns` of each token, whose rows begin `stride` floats apart. */
typedef struct BdGate {
  const float *gate;
  const float *up;
  int64_t stride;
  int64_t columns;
  int activation; /* BD_SILU or BD_GELU_TANH */
} BdGate;

/* Activations as the products read them; all in the caller's scratch memory. Each token takes
 * `stride` elements of `q` or `values`, zero beyond `columns`. */
typedef struct BdTokens {
  int8_t *q;     /* 8-bit path */
  float *down;   /* g / 127 of each token; NaN for a token that is not finite */
  int32_t *sum;  /* sum of q of each token */
  float *values; /* fp32 path; NULL in the 8-bit path */
  int64_t tokens;
  int64_t columns;
  int64_t stride;
} BdTokens;

/* A float16 table (rows, columns), row-major. */
typedef struct BdHalfTable {
  const uint16_t *table;
  int64_t rows;
  int64_t columns;
} BdHalfTable;

/* A quantised table. 8 bits: codes is uint8 (rows, columns), group_scale NULL. 4 bits: codes is
 * uint8 (ceil(rows/16), ceil(columns/32), 4, 16, 4), where byte (s, r, j) of a block holds columns
 * 8 s + j (low bits) and 8 s + 4 + j of row r; group_scale is (ceil(rows/16), ceil(columns/32),
 * 16). No byte is invalid. */
typedef struct BdTable {
  const uint8_t *codes;
  const int8_t *group_scale;
  const float *scale; /* (rows) */
  int64_t rows;
  int64_t columns;
} BdTable;

/* Activations as int8 and int4 read them, in the caller's scratch memory; zero beyond `columns`. */
typedef struct BdHeadTokens {
  int16_t *q;    /* int8: (tokens, stride); int4: NULL */
  int8_t *parts; /* int8: (tokens, 2, stride), high in -63 .. 63, low in -64 .. 63; int4: q itself,
                  * (tokens, 1, stride) */
  int16_t *sums; /* of each 32 columns of the parts */
  float *down;   /* int8: g / 8064 (tokens); int4: d (tokens, stride / 32); NaN where x is not
                  * finite */
  int64_t tokens;
  int64_t columns;
  int64_t stride;
} BdHeadTokens;

/* y is (tokens, rows); a block is 16 rows. */
typedef struct BdHeadKernels {
  void (*half)(const BdHalfTable *w, const float *x, int64_t tokens, float *y, int64_t first_row,
               int64_t last_row);
  void (*int8)(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first_row,
               int64_t last_row);
  void (*int4)(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first_block,
               int64_t last_block);
} BdHeadKernels;

/* Ranges are half-open and may run on different threads at once; y is (tokens, rows). */
typedef struct BdKernels {
  const char *name;
  int (*supported)(void);
  void (*quantize)(const BdInput *in, const BdTokens *out, int64_t first_token, int64_t last_token);
  void (*normalize)(const BdInput *in, const BdTokens *out, int64_t first_token,
                    int64_t last_token);
  /* out is (tokens, columns). */
  void (*gate)(const BdGate *in, float *out, int64_t first_token, int64_t last_token);
  void (*ternary)(const BdTernary *w, const BdTokens *in, float *y, int64_t first_block,
                  int64_t last_block);
  void (*ternary_float)(const BdTernary *w, const BdTokens *in, float *y, int64_t first_block,
                        int64_t last_block);
  /* As `ternary`, of weights in base 3. */
  void (*ternary_base3)(const BdTernary *w, const BdTokens *in, float *y, int64_t first_block,
                        int64_t last_block);
  /* The blocks of weights in base 3 in the layout of 2 bits, bd_packed_bytes in all: what many
   * tokens had better be multiplied by. */
  void (*unpack_base3)(const BdTernary *w, uint8_t *packed, int64_t first_block,
                       int64_t last_block);
  const BdHeadKernels *head;
  const BdAttentionKernels *attention;
  /* Whether threads that share a product had better divide its tokens than its rows (`ternary`). */
  int by_tokens;
} BdKernels;

/* The table of an instruction set, or of the best one this CPU has for NULL (once a process, the
 * environment variable BITDISTILL_ISA may name another). NULL when the name is unknown or the CPU
 * lacks it; bd_kernels_error() then says why. */
BD_API const BdKernels *bd_kernels(const char *isa);

/* Why bd_kernels(isa) returned NULL, "" if it did not; a string of static or thread storage. */
BD_API const char *bd_kernels_error(const char *isa);

/* Name of the i-th instruction set built into this library, best first; NULL past the end. */
BD_API const char *bd_isa_name(int i);

BD_API int bd_abi_version(void);

/* Blocks of 32 rows: the unit of `ternary`. */
BD_API int64_t bd_blocks(int64_t rows);

/* Bytes of `packed` of a (rows, columns) matrix. */
BD_API int64_t bd_packed_bytes(int64_t rows, int64_t columns);

/* The same in base 3. */
BD_API int64_t bd_base3_bytes(int64_t rows, int64_t columns);

/* Bytes of scratch memory for `tokens` tokens; activation_bits is 8 or 0 (fp32 activations). */
BD_API size_t bd_scratch_bytes(int64_t tokens, int64_t columns, int activation_bits);

/* Divides scratch memory (aligned to 8 bytes) into the arrays of a BdTokens. */
BD_API BdTokens bd_tokens(void *scratch, int64_t tokens, int64_t columns, int activation_bits);

/* The whole layer on the calling thread: x (tokens, columns) -> y (tokens, rows). Weights in base 3
 * need 8 activation bits, here and below. */
BD_API void bd_ternary_linear(const BdKernels *kernels, const BdTernary *w, const BdInput *in,
                              int activation_bits, void *scratch, float *y);

/* Threads, for a caller without a pool of its own: `threads` counts the calling one. NULL for fewer
 * than 1, or when the system has no more. Any thread may call with a pool at any time (a call that
 * finds it busy works alone); bd_pool_destroy only after the last call returned. */
typedef struct BdPool BdPool;
typedef void (*BdBody)(void *context, int64_t first, int64_t last);
BD_API BdPool *bd_pool_create(int threads);
BD_API void bd_pool_destroy(BdPool *pool);
BD_API int bd_pool_threads(const BdPool *pool);

/* body(context, first, last) on one part of [0, total) for each thread, all done on return. NULL is
 * the pool of the calling thread alone. */
BD_API void bd_pool_run(BdPool *pool, int64_t total, BdBody body, void *context);

/* `count` layers of one input (q, k and v; gate and up), which is normalised and quantised once:
 * y[i] (tokens, w[i].rows) from w[i], on a pool or, for NULL, on the calling thread. */
BD_API void bd_ternary_layers(const BdKernels *kernels, const BdTernary *w, int count,
                              const BdInput *in, int activation_bits, void *scratch, BdPool *pool,
                              float *const *y);

/* 1 if any 2-bit code among `bytes` packed bytes is 3. */
BD_API int bd_has_code_3(const uint8_t *packed, size_t bytes);

/* 1 if any of `bytes` bytes is none of the 243 that hold five trits. */
BD_API int bd_has_no_trits(const uint8_t *packed, size_t bytes);

/* Bytes of scratch memory for a head of 8 or 4 bits, and its division (aligned to 8 bytes). */
BD_API size_t bd_head_scratch_bytes(int64_t tokens, int64_t columns, int table_bits);
BD_API BdHeadTokens bd_head_tokens(void *scratch, int64_t tokens, int64_t columns, int table_bits);

/* x (tokens, columns) -> the tokens [first, last) of `out`. The same code on every CPU: it takes
 * microseconds beside a head's milliseconds. */
BD_API void bd_head_quantize(const float *x, const BdHeadTokens *out, int64_t first, int64_t last);

/* Rows `ids` of a table -> rows (count, columns); ids must lie in [0, table->rows). */
BD_API void bd_gather_int8(const BdTable *table, const int64_t *ids, int64_t count, float *rows);
BD_API void bd_gather_int4(const BdTable *table, const int64_t *ids, int64_t count, float *rows);

/* Bytes of a cache row of one position, and of scratch memory for rows [first, last). */
BD_API int64_t bd_cache_row_bytes(int64_t head_size, int64_t cache_bits);
BD_API size_t bd_attention_scratch_bytes(const BdAttention *a, int64_t first_row, int64_t last_row);

/* `keep` and `attend` of `tokens` tokens on the calling thread; 0 where memory ran out. */
BD_API int bd_attention(const BdKernels *kernels, const BdAttention *a, int64_t tokens);

/* Blocks of 16 rows: the unit of `int4`. */
BD_API int64_t bd_table_blocks(int64_t rows);

#ifdef __cplusplus
}
#endif
#endif
