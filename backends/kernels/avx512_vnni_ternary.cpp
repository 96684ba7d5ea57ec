// AVX-512 VNNI: vpdpbusd on 512 bits, two vectors to a block of 32 rows.
#include <immintrin.h>

namespace {

struct Vector {
  using Type = __m512i;
  static constexpr int kRows = 16;
  static constexpr int kSums = 4;     // one for each weight: eight independent sums for one token
  static constexpr int kTokens = 12;  // 24 sums of 32 registers

  static Type load(const void *p) { return _mm512_loadu_si512(p); }
  static void store(void *p, Type v) { _mm512_storeu_si512(p, v); }
  static Type every(int bits) { return _mm512_set1_epi32(bits); }
  static Type both(Type a, Type b) { return _mm512_and_si512(a, b); }
  static Type add(Type a, Type b) { return _mm512_add_epi32(a, b); }
  template <int N>
  static Type right(Type a) {
    return _mm512_srli_epi16(a, N);
  }
  template <int N>
  static Type divide(Type a) {
    return _mm512_maskz_srai_epi32(0xffff, a, N);  // GCC 12 warns of its own unmasked one
  }
  static Type dot(Type sum, Type codes, Type q) { return _mm512_dpbusd_epi32(sum, codes, q); }
};

}  // namespace

#include "vnni.h"
#include "x86_tables.h"

void bitdistill::avx512_vnni_ternary(const BdTernary *w, const BdTokens *in, float *y,
                                     int64_t first, int64_t last) {
  in->tokens == 1 ? one_token(w, in, y, first, last) : several_tokens(w, in, y, first, last);
}
