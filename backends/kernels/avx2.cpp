// The table of AVX2, F16C, FMA and BMI2. avx2_quantize.cpp, avx2_ternary.cpp, avx2_float.cpp,
// avx2_head.cpp and avx2_attention.cpp hold its functions; they are empty on processors other than
// x86-64.
#include "avx2.h"
#include "cpu.h"

#if BD_X86
namespace {

int supported() {
  const bitdistill::CpuFeatures cpu = bitdistill::cpu_features();
  // Every processor with AVX2 known to us has the rest.
  return cpu.avx2 && cpu.f16c && cpu.fma && cpu.bmi2;
}

namespace avx2 = bitdistill::avx2;

const BdKernels kTable = {"avx2",
                          supported,
                          avx2::quantize,
                          avx2::normalize,
                          avx2::gate,
                          avx2::ternary,
                          avx2::ternary_float,
                          avx2::ternary_base3,
                          avx2::unpack_base3,
                          &avx2::heads,
                          &avx2::attention,
                          1};

}  // namespace

namespace bitdistill {
const BdKernels *avx2_kernels() { return &kTable; }
}  // namespace bitdistill
#endif
