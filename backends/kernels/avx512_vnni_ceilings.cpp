// Ceilings of AVX-512: fused multiply-adds, and vpdpbusd on 512 bits.
#include "ceilings_x86.h"

double bitdistill::avx512_fma_rounds(int64_t rounds) {
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(0.001f);
  return rounds_of(rounds, b, 32, [=](__m512 sum) { return _mm512_fmadd_ps(sum, a, b); });
}

double bitdistill::avx512_vnni_int8_rounds(int64_t rounds) {
  const __m512i a = _mm512_set1_epi8(1);
  return rounds_of(rounds, a, 128, [=](__m512i sum) { return _mm512_dpbusd_epi32(sum, a, a); });
}
