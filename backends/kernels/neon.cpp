// The NEON table. neon_quantize.cpp, neon_ternary.cpp, neon_head.cpp and neon_attention.cpp
// hold its functions.
#include "neon.h"
#include "cpu.h"

#if BD_ARM
namespace {

int supported() { return bitdistill::cpu_features().dot_product; }

namespace neon = bitdistill::neon;

const BdKernels kTable = {"neon",
                          supported,
                          neon::quantize,
                          neon::normalize,
                          neon::gate,
                          neon::ternary,
                          neon::ternary_float,
                          neon::ternary_base3,
                          neon::unpack_base3,
                          &neon::heads,
                          &neon::attention,
                          0};

}  // namespace

namespace bitdistill {
const BdKernels *neon_kernels() { return &kTable; }
}  // namespace bitdistill
#endif
