// Ceilings of AVX2: fused multiply-adds, and vpmaddubsw whose int16 sums are added.
#include "common.h"

#if BD_X86
#include "ceilings_x86.h"

double bitdistill::avx2_fma_rounds(int64_t rounds) {
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(0.001f);
  return rounds_of(rounds, b, 16, [=](__m256 sum) { return _mm256_fmadd_ps(sum, a, b); });
}

double bitdistill::avx2_int8_rounds(int64_t rounds) {
  __m256i codes = _mm256_set1_epi8(1);
  const __m256i b = _mm256_set1_epi8(2);
  return rounds_of(rounds, b, 64, [&codes, b](__m256i sum) {
    BD_KEEP(codes);  // the product is the same each time: it would be formed once
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, b));
  });
}
#endif
