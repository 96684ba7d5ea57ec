// The AMX instructions that the kernel uses, in plain C++: the tile kernel can then be checked on
// any processor with AVX-512. Included before amx_ternary.cpp by emulated_driver.cpp.
#ifndef AMX_EMULATED_H
#define AMX_EMULATED_H

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace amx {

struct State {
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
inline thread_local State state;

inline void require(bool good, const char *what) {
  if (good) return;
  std::printf("AMX would fault: %s\n", what);
  std::exit(1);
}

inline void configure(const void *config) {
  const uint8_t *bytes = static_cast<const uint8_t *>(config);
  require(bytes[0] == 1, "palette");
  std::memset(&state, 0, sizeof state);
  std::memcpy(state.row_bytes, bytes + 16, sizeof state.row_bytes);
  std::memcpy(state.rows, bytes + 48, sizeof state.rows);
  for (int i = 0; i < 8; ++i)
    require(state.rows[i] <= 16 && state.row_bytes[i] <= 64 &&
                (state.rows[i] == 0) == (state.row_bytes[i] == 0),
            "tile shape");
}

inline void load(int tile, const void *p, int64_t stride) {
  require(state.rows[tile] != 0, "load of a tile without a shape");
  std::memset(state.data[tile], 0, sizeof state.data[tile]);
  for (int r = 0; r < state.rows[tile]; ++r)
    std::memcpy(state.data[tile][r], static_cast<const char *>(p) + r * stride,
                state.row_bytes[tile]);
}

inline void store(int tile, void *p, int64_t stride) {
  require(state.rows[tile] != 0, "store of a tile without a shape");
  for (int r = 0; r < state.rows[tile]; ++r)
    std::memcpy(static_cast<char *>(p) + r * stride, state.data[tile][r], state.row_bytes[tile]);
}

inline void multiply(int c, int a, int b) {
  require(state.rows[c] == state.rows[a] && state.row_bytes[c] == state.row_bytes[b] &&
              state.row_bytes[a] == 4 * state.rows[b],
          "shapes of a product");
  for (int m = 0; m < state.rows[c]; ++m)
    for (int k = 0; k < state.row_bytes[a] / 4; ++k)
      for (int n = 0; n < state.row_bytes[c] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, &state.data[c][m][4 * n], sizeof sum);
        for (int j = 0; j < 4; ++j)
          sum += static_cast<int8_t>(state.data[a][m][4 * k + j]) * state.data[b][k][4 * n + j];
        std::memcpy(&state.data[c][m][4 * n], &sum, sizeof sum);
      }
}

}  // namespace amx

// macros already in GCC's header
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define BD_AMX_EMULATED
#define _tile_loadconfig amx::configure
#define _tile_release() static_cast<void>(0)
#define _tile_loadd amx::load
#define _tile_stored amx::store
#define _tile_dpbsud amx::multiply
#endif
