// Ceiling of AVX-VNNI: vpdpbusd on 256 bits.
#include "ceilings_x86.h"

double bitdistill::avx_vnni_int8_rounds(int64_t rounds) {
  const __m256i a = _mm256_set1_epi8(1);
  return rounds_of(rounds, a, 64, [=](__m256i sum) { return _mm256_dpbusd_avx_epi32(sum, a, a); });
}
