// Checks kernels whose instructions this processor may lack, bit for bit against the scalar table:
// AMX by emulation, AVX-VNNI in the AVX-512 encoding of its instruction. All of it is compiled for
// AVX-512, so emulated_main.cpp looks first whether the processor has that.
#include <immintrin.h>

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "amx_emulated.h"
// after the emulation, which takes the place of its intrinsics
#include "amx_ternary.cpp"

namespace {

using Ternary = decltype(BdKernels::ternary);

struct Case {
  int64_t tokens, rows, columns;
};

// Heap arrays of the exact size, which the address sanitizer guards.
bool same(Ternary ternary, const Case &c, std::mt19937 &random) {
  const BdKernels *scalar = bd_kernels("scalar");
  std::vector<uint8_t> packed(static_cast<size_t>(bd_packed_bytes(c.rows, c.columns)));
  for (uint8_t &byte : packed) do
      byte = static_cast<uint8_t>(random());
    while (bd_has_code_3(&byte, 1) != 0);
  const std::unique_ptr<char[]> scratch(new char[bd_scratch_bytes(c.tokens, c.columns, 8)]);
  const BdTokens in = bd_tokens(scratch.get(), c.tokens, c.columns, 8);
  const bool extreme = random() % 2 != 0;
  for (int64_t t = 0; t < c.tokens; ++t) {
    in.sum[t] = 0;
    in.down[t] = 1.0f;
    for (int64_t k = 0; k < in.stride; ++k) {
      const int q = extreme ? (random() % 2 != 0 ? 127 : -128) : static_cast<int8_t>(random());
      in.q[t * in.stride + k] = static_cast<int8_t>(k < c.columns ? q : 0);
      in.sum[t] += in.q[t * in.stride + k];
    }
  }
  const std::vector<float> scale(static_cast<size_t>(c.rows), 1.0f);
  const BdTernary w = {packed.data(), scale.data(), nullptr, c.rows, c.columns, 0, 0};
  std::vector<float> expected(static_cast<size_t>(c.rows * c.tokens)), got(expected.size(), -1.0f);
  scalar->ternary(&w, &in, expected.data(), 0, bd_blocks(c.rows));
  ternary(&w, &in, got.data(), 0, bd_blocks(c.rows));
  if (got == expected) return true;
  std::printf("M %d N %d K %d DIFFERENT\n", static_cast<int>(c.tokens), static_cast<int>(c.rows),
              static_cast<int>(c.columns));
  return false;
}

bool compare(const char *name, Ternary ternary, const std::vector<Case> &cases) {
  std::mt19937 random(3);
  for (const Case &c : cases)
    if (!same(ternary, c, random)) return false;
  std::printf("%s: %d cases\n", name, static_cast<int>(cases.size()));
  return true;
}

std::vector<Case> small_cases() {
  std::vector<Case> cases;
  for (const int64_t tokens : {0, 1, 2, 5, 6, 7, 13, 16, 17, 31, 32, 33, 48, 63})
    for (const int64_t rows : {1, 31, 33, 64})
      for (const int64_t columns : {1, 16, 17, 63, 64, 65, 200})
        cases.push_back({tokens, rows, columns});
  return cases;
}

}  // namespace

int check_emulated();  // of emulated_main.cpp

int check_emulated() {
  std::vector<Case> cases = small_cases();
  cases.push_back({1, 33, 1 << 17});
  cases.push_back({17, 33, 65536});
  if (!compare("avx-vnni", bitdistill::avx_vnni_ternary, cases)) return 1;
  cases.push_back({255, 32, 64});
  cases.push_back({257, 33, 1040});
  cases.push_back({300, 32, 2049});
  return compare("amx", bitdistill::amx_ternary, cases) ? 0 : 1;
}
