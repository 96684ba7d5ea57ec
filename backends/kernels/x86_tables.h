// The x86-64 tables beyond AVX2. Each is the AVX2 table with another product of int8 activations
// and trits; CMake defines BD_AVX_VNNI, BD_AVX512_VNNI and BD_AMX where the compiler can build it.
#ifndef BITDISTILL_X86_TABLES_H
#define BITDISTILL_X86_TABLES_H

#include "bitdistill_kernels.h"

namespace bitdistill {
const BdKernels *avx_vnni_kernels();
const BdKernels *avx512_vnni_kernels();
const BdKernels *amx_kernels();

void avx_vnni_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                      int64_t last);
void avx512_vnni_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                         int64_t last);
void amx_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
}  // namespace bitdistill
#endif
