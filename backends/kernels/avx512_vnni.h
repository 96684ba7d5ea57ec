// What the AVX-512 files share.
#ifndef BITDISTILL_AVX512_VNNI_H
#define BITDISTILL_AVX512_VNNI_H

#include "common.h"

// GCC 12 takes the deliberately undefined operands in its own AVX-512 headers for a mistake.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#if BD_X86
namespace bitdistill {
namespace avx512_vnni {
void ternary_base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last);
extern const BdHeadKernels heads;
}  // namespace avx512_vnni
}  // namespace bitdistill
#endif
#endif
