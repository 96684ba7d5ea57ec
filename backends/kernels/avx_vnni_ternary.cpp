// AVX-VNNI: vpdpbusd on 256 bits, for client processors without AVX-512. Compiled for AVX-512VL
// instead of AVX-VNNI, the same source takes the other encoding of the instruction: so a test
// checks it on processors that have only that one.
#include <immintrin.h>

namespace {

struct Vector {
  using Type = __m256i;
  static constexpr int kRows = 8;
  static constexpr int kSums = 2;    // 16 registers: sums of weights 1 and 4 for four vectors
  static constexpr int kTokens = 6;  // 12 sums, two vectors of codes, a mask and a quad

  static Type load(const void *p) { return _mm256_loadu_si256(static_cast<const Type *>(p)); }
  static void store(void *p, Type v) { _mm256_storeu_si256(static_cast<Type *>(p), v); }
  static Type every(int bits) { return _mm256_set1_epi32(bits); }
  static Type both(Type a, Type b) { return _mm256_and_si256(a, b); }
  static Type add(Type a, Type b) { return _mm256_add_epi32(a, b); }
  template <int N>
  static Type right(Type a) {
    return _mm256_srli_epi16(a, N);
  }
  template <int N>
  static Type divide(Type a) {
    return _mm256_srai_epi32(a, N);
  }
  static Type dot(Type sum, Type codes, Type q) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sum, codes, q);
#else
    return _mm256_dpbusd_avx_epi32(sum, codes, q);
#endif
  }
};

}  // namespace

#include "vnni.h"
#include "x86_tables.h"

void bitdistill::avx_vnni_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                                  int64_t last) {
  in->tokens == 1 ? one_token(w, in, y, first, last) : several_tokens(w, in, y, first, last);
}
