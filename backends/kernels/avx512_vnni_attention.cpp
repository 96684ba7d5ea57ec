// AVX-512: attention over vectors of 16 floats.
#include <immintrin.h>

#include "attention_tile.h"
#include "x86_tables.h"

namespace {

struct Avx512 {
  using F = __m512;
  static constexpr int kWidth = 16, kSums = 16;

  static F load(const float *x) { return _mm512_loadu_ps(x); }
  static F load(const uint16_t *x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(x)));
  }
  static F load(const int8_t *x) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(x));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
  }
  static void prefetch(const char *p) { _mm_prefetch(p, _MM_HINT_T0); }
  static void store(float *y, F x) { _mm512_storeu_ps(y, x); }
  static void store_half(uint16_t *y, F x) {  // a NaN is the second operand, and so kept
    x = _mm512_max_ps(all(-kLargestHalf), _mm512_min_ps(all(kLargestHalf), x));
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(y),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static F zero() { return _mm512_setzero_ps(); }
  static F all(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  // y * 2^n, n being the low bits of t.
  static F times_power(F y, F t) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(t), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(y), exponent));
  }
  static F zero_below(F y, F x, float least) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(least), _CMP_NLT_UQ), y);
  }
  static float largest(F x) {
    float lanes[16];
    store(lanes, x);
    for (int i = 1; i < 16; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }

  // Four dot products of 16 sums each: lanes + 8, then + 4, + 2 and + 1.
  static void fold(const F (&lanes)[1][4], float *out) {
    __m512 eight[2];  // of two products each: p and p + 2
    for (int p = 0; p < 2; ++p)
      eight[p] = add(_mm512_shuffle_f32x4(lanes[0][p], lanes[0][p + 2], 0x44),
                     _mm512_shuffle_f32x4(lanes[0][p], lanes[0][p + 2], 0xee));
    const __m512 low = _mm512_shuffle_f32x4(eight[0], eight[1], 0x88);
    const __m512 four = add(low, _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
    // four holds products 0, 2, 1 and 3, of four sums each
    const __m512 two = add(four, _mm512_shuffle_ps(four, four, 0xee));
    const __m512 one = add(two, _mm512_shuffle_ps(two, two, 0x55));
    const __m512i places = _mm512_setr_epi32(0, 8, 4, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(places, one)));
  }
};

}  // namespace

namespace bitdistill {
const BdAttentionKernels avx512_vnni_attention = {keep<Avx512>, attend<Avx512>};
}  // namespace bitdistill
