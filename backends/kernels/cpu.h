// What the CPU and the operating system both allow. Read once; a row here per feature a kernel
// needs.
#ifndef BITDISTILL_CPU_H
#define BITDISTILL_CPU_H

namespace bitdistill {
struct CpuFeatures {
  bool avx2;
  bool f16c;
  bool fma;
  bool bmi2;
  bool avx_vnni;
  bool avx512_vnni;  // with F, BW, DQ and VL
  bool amx;          // AMX-INT8, and the system's permission to use it
  bool dot_product;  // of Armv8.2
};
CpuFeatures cpu_features();
}  // namespace bitdistill
#endif
