// The AVX-512 VNNI table: its own heads and base-3 product (avx512_vnni_head.cpp,
// avx512_vnni_base3.cpp), the rest as in AVX2.
#include "avx512_vnni.h"
#include "avx2.h"
#include "cpu.h"

#if BD_X86
namespace {

int supported() {
  const bitdistill::CpuFeatures cpu = bitdistill::cpu_features();
  return cpu.avx2 && cpu.f16c && cpu.avx512_vnni;
}

namespace avx2 = bitdistill::avx2;

const BdKernels kTable = {"avx512-vnni",
                          supported,
                          avx2::quantize,
                          avx2::normalize,
                          avx2::ternary,
                          avx2::ternary_float,
                          bitdistill::avx512_vnni::ternary_base3,
                          &bitdistill::avx512_vnni::heads};

}  // namespace

namespace bitdistill {
const BdKernels *avx512_vnni_kernels() { return &kTable; }
}  // namespace bitdistill
#endif
