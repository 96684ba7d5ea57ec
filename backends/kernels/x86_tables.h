// The x86-64 tables beyond AVX2. Each is the AVX2 table with another product of int8 activations
// and trits, and with AVX-512 other heads; CMake defines BD_AVX_VNNI, BD_AVX512_VNNI and BD_AMX
// where the compiler can build it.
#ifndef BITDISTILL_X86_TABLES_H
#define BITDISTILL_X86_TABLES_H

#include "bitdistill_kernels.h"

// GCC 12 takes the deliberately undefined operands in its own AVX-512 headers for a mistake.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bitdistill {
const BdKernels *avx_vnni_kernels();
const BdKernels *avx512_vnni_kernels();
const BdKernels *amx_kernels();

void avx_vnni_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                      int64_t last);
void avx512_vnni_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                         int64_t last);
void avx512_vnni_ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                               int64_t last);
extern const BdHeadKernels avx512_vnni_heads;
extern const BdAttentionKernels avx512_vnni_attention;
void amx_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
}  // namespace bitdistill
#endif
