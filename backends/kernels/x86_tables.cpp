// Compiled without machine flags: it asks whether the CPU has them.
#include "x86_tables.h"

#include "avx2.h"
#include "cpu.h"

#if BD_X86
namespace {

using Supported = int (*)();
using Ternary = decltype(BdKernels::ternary);

[[maybe_unused]] BdKernels over_avx2(const char *name, Supported supported, Ternary ternary) {
  BdKernels table = *bitdistill::avx2_kernels();
  table.name = name;
  table.supported = supported;
  table.ternary = ternary;
  table.by_tokens = 0;
  return table;
}

[[maybe_unused]] int has_avx2() { return bitdistill::avx2_kernels()->supported(); }

}  // namespace

namespace bitdistill {

#if defined(BD_AVX_VNNI)
const BdKernels *avx_vnni_kernels() {
  static const BdKernels table = over_avx2(
      "avx-vnni", [] { return has_avx2() && cpu_features().avx_vnni ? 1 : 0; }, avx_vnni_ternary);
  return &table;
}
#endif

#if defined(BD_AVX512_VNNI)
namespace {

// One token is bound by memory and by decoding, for which AVX2 has loops that fetch several blocks
// at once: 1.2 times as fast with five trits a byte, 1.5 times with a 4-bit head (NOTES.md).
void base3(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  (in->tokens == 1 ? avx2::ternary_base3 : avx512_vnni_ternary_base3)(w, in, y, first, last);
}

void head4(const BdTable *w, const BdHeadTokens *in, float *y, int64_t first, int64_t last) {
  (in->tokens == 1 ? avx2::head4 : avx512_vnni_heads.int4)(w, in, y, first, last);
}

BdKernels with_avx512_vnni(const char *name, Supported supported, Ternary ternary) {
  static const BdHeadKernels heads = {avx512_vnni_heads.half, avx512_vnni_heads.int8, head4};
  BdKernels table = over_avx2(name, supported, ternary);
  table.ternary_base3 = base3;
  table.head = &heads;
  table.attention = &avx512_vnni_attention;
  return table;
}

}  // namespace

const BdKernels *avx512_vnni_kernels() {
  static const BdKernels table = with_avx512_vnni(
      "avx512-vnni", [] { return has_avx2() && cpu_features().avx512_vnni ? 1 : 0; },
      avx512_vnni_ternary);
  return &table;
}
#endif

#if defined(BD_AMX)
const BdKernels *amx_kernels() {
  static const BdKernels table = with_avx512_vnni(
      "amx", [] { return avx512_vnni_kernels()->supported() && cpu_features().amx ? 1 : 0; },
      amx_ternary);
  return &table;
}
#endif

}  // namespace bitdistill
#endif
