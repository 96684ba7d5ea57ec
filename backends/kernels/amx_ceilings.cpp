// Ceiling of AMX-INT8: products of two pairs of tiles that stay loaded.
#include <immintrin.h>

#include "ceilings.h"

double bitdistill::amx_int8_rounds(int64_t rounds) {
  alignas(64) uint8_t config[64] = {1};  // palette 1; eight tiles of 16 rows x 64 bytes
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;
    config[48 + i] = 16;
  }
  _tile_loadconfig(config);
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(rounds) * 4 * 2 * 16 * 16 * 64;
}
