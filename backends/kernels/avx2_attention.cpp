// AVX2 with F16C and fused multiply-add: attention over vectors of 8 floats.
#include "attention_tile.h"
#include "avx2.h"

#if BD_X86
namespace {

struct Avx2 {
  using F = __m256;
  static constexpr int kWidth = 8, kSums = 8;

  static F load(const float *x) { return _mm256_loadu_ps(x); }
  static F load(const uint16_t *x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
  }
  static F load(const int8_t *x) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(x));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static void prefetch(const char *p) { _mm_prefetch(p, _MM_HINT_T0); }
  static void store(float *y, F x) { _mm256_storeu_ps(y, x); }
  static void store_half(uint16_t *y, F x) {  // a NaN is the second operand, and so kept
    x = _mm256_max_ps(all(-kLargestHalf), _mm256_min_ps(all(kLargestHalf), x));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(y), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static F zero() { return _mm256_setzero_ps(); }
  static F all(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }

  // y * 2^n, n being the low bits of t.
  static F times_power(F y, F t) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(t), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
  }
  static F zero_below(F y, F x, float least) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, all(least), _CMP_LT_OQ), y);
  }
  static float largest(F x) {
    float lanes[8];
    store(lanes, x);
    for (int i = 1; i < 8; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }

  // Four dot products of 16 sums each: lanes + 8, then + 4, + 2 and + 1.
  static void fold(const F (&lanes)[2][4], float *out) {
    F eight[4];
    for (int p = 0; p < 4; ++p) eight[p] = add(lanes[0][p], lanes[1][p]);
    F four[2];  // of two products each: p and p + 2
    for (int p = 0; p < 2; ++p)
      four[p] = add(_mm256_permute2f128_ps(eight[p], eight[p + 2], 0x20),
                    _mm256_permute2f128_ps(eight[p], eight[p + 2], 0x31));
    const F two =
        add(_mm256_shuffle_ps(four[0], four[1], 0x44), _mm256_shuffle_ps(four[0], four[1], 0xee));
    const F one = add(_mm256_shuffle_ps(two, two, 0x88), _mm256_shuffle_ps(two, two, 0xdd));
    _mm_storeu_ps(out, _mm_movelh_ps(_mm256_castps256_ps128(one), _mm256_extractf128_ps(one, 1)));
  }
};

}  // namespace

namespace bitdistill {
namespace avx2 {
const BdAttentionKernels attention = {keep<Avx2>, attend<Avx2>};
}  // namespace avx2
}  // namespace bitdistill
#endif
