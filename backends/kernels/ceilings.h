// Loops whose operands stay in registers, one per instruction set; ceilings.cpp runs them. Each
// returns the operations (a multiply and an add are two) of `rounds` rounds.
#ifndef BITDISTILL_CEILINGS_H
#define BITDISTILL_CEILINGS_H

#include <stdint.h>

namespace bitdistill {
double avx2_fma_rounds(int64_t rounds);
double avx2_int8_rounds(int64_t rounds);
double avx_vnni_int8_rounds(int64_t rounds);
double avx512_fma_rounds(int64_t rounds);
double avx512_vnni_int8_rounds(int64_t rounds);
double amx_int8_rounds(int64_t rounds);
}  // namespace bitdistill
#endif
