/* What the benchmark measures in C, beside the kernels: the machine's ceilings, and layers without
 * the cost of a call from Python. */
#ifndef BITDISTILL_BENCH_H
#define BITDISTILL_BENCH_H

#include "bitdistill_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Seconds of one pass of a layer over all `copies` (same shape, own weights) on a pool: x is
 * quantised anew for each. */
BD_API double bd_time_ternary(const BdKernels *kernels, const BdTernary *copies, int count,
                              const BdInput *in, void *scratch, BdPool *pool, float *y);

/* Seconds to read `count` bytes once: the threads of a pool take parts of a megabyte as they come,
 * and read a part at `streams` places in turn, each fetched `ahead` bytes ahead (0: left to the
 * processor). */
BD_API double bd_time_read(const uint8_t *bytes, int64_t count, int64_t streams, int64_t ahead,
                           BdPool *pool);

/* Operations a second of all threads of a pool together over some 5 ms of a core: fp32 fused
 * multiply-adds, or products of int8 and their sums as the kernels of `isa` form them, held in
 * registers. 0 where `isa` has no such loop here. */
BD_API double bd_rate_fma(const char *isa, BdPool *pool);
BD_API double bd_rate_int8(const char *isa, BdPool *pool);

#ifdef __cplusplus
}
#endif
#endif
