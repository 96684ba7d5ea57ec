// Prefill by tables of 16 tokens, in AVX2.
#include "avx2.h"

#if BD_X86

namespace {

struct Lanes {
  using Type = __m256i;
  static constexpr int kTokens = 16;
  static constexpr int kEntryBits = 6;
  static constexpr int kStart[4] = {0, 205, 410, 615};  // of the tables, in cache lines
  static constexpr int kFewest = 12;                    // tokens that are worth a tile
  static constexpr int kFewestBlocks = 8;

  static Type zero() { return _mm256_setzero_si256(); }
  static Type load(const void *p) { return _mm256_load_si256(static_cast<const Type *>(p)); }
  static void store(void *p, Type v) { _mm256_store_si256(static_cast<Type *>(p), v); }
  static Type add(Type a, Type b) { return _mm256_add_epi16(a, b); }
  static Type subtract(Type a, Type b) { return _mm256_sub_epi16(a, b); }
};

}  // namespace

#include "lookup.h"

int64_t bitdistill::avx2::lookup(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                                 int64_t last) {
  return by_lookup(w, in, y, first, last);
}
#endif
