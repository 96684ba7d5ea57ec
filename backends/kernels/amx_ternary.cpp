// AMX-INT8: tiles of 16 tokens x 64 columns times 64 columns x 16 rows, for the large M of prefill;
// fewer tokens take the AVX-512 VNNI path.
//
// A row of a weight tile is 16 output rows x 4 columns: 64 bytes of the packed layout, shifted and
// masked. So a block of 32 rows is unpacked, kChunk columns at a time, into the bytes that the tile
// loads want, once for kSpan tokens; the int32 sums of those wait in memory between chunks.
// int32 holds them: 2^17 products of 3 * 128 are below 2^26.
#include <immintrin.h>

#include "rows.h"
#include "x86_tables.h"

#if defined(__AMX_INT8__) || defined(__AMXINT8__) || defined(BD_AMX_EMULATED)  // GCC, clang
namespace {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 64;    // of a tile row: 64 columns of a token, or 16 rows x 4 columns
constexpr int64_t kChunk = 1024;  // columns unpacked at once: 32 KiB
constexpr int64_t kSpan = 256;    // tokens for which they are unpacked once: 32 KiB of sums
constexpr int64_t kFewest = 16;   // tokens from which tiles are worth their set-up

// Tiles 0..3 are sums (token half, row half) in order; 4, 5 tokens; 6, 7 weights.
struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure(int64_t tokens) {
  const uint8_t first = static_cast<uint8_t>(smaller(tokens, kTileRows));
  const uint8_t second = static_cast<uint8_t>(tokens > kTileRows ? tokens - kTileRows : 0);
  const uint8_t rows[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
  Config config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = rows[i];
    config.row_bytes[i] = rows[i] != 0 ? kTileBytes : 0;
  }
  _tile_loadconfig(&config);
}

struct Work {
  alignas(64) uint8_t codes[2][kChunk / 4][kTileBytes];  // (row half, column quad, 16 rows x 4)
  alignas(64) int32_t sums[kSpan][BD_BLOCK_ROWS];
};

// Unpacks `groups` groups of 16 columns; the tile that they do not fill ends in zeros.
void unpack(const uint8_t *packed, int64_t groups, Work *work) {
  const __m512i low = _mm512_set1_epi8(3);
  for (int half = 0; half < 2; ++half) {
    uint8_t (*out)[kTileBytes] = work->codes[half];
    for (int64_t g = 0; g < groups; ++g) {
      const __m512i a = _mm512_loadu_si512(packed + g * BD_BLOCK_BYTES + kTileBytes * half);
      _mm512_store_si512(*out++, _mm512_and_si512(a, low));
      _mm512_store_si512(*out++, _mm512_and_si512(_mm512_srli_epi16(a, 2), low));
      _mm512_store_si512(*out++, _mm512_and_si512(_mm512_srli_epi16(a, 4), low));
      _mm512_store_si512(*out++, _mm512_and_si512(_mm512_srli_epi16(a, 6), low));
    }
    for (int64_t g = groups; g % 4 != 0; ++g)
      for (int s = 0; s < 4; ++s) _mm512_store_si512(*out++, _mm512_setzero_si512());
  }
}

// Adds the products of 17..32 tokens (as configured) and `steps` times 64 columns to their sums.
void two_tiles(const int8_t *q, int64_t stride, int64_t steps, const Work *work,
               int32_t (*sums)[BD_BLOCK_ROWS]) {
  constexpr int kSumBytes = BD_BLOCK_ROWS * 4;
  _tile_loadd(0, sums[0], kSumBytes);
  _tile_loadd(1, sums[0] + 16, kSumBytes);
  _tile_loadd(2, sums[kTileRows], kSumBytes);
  _tile_loadd(3, sums[kTileRows] + 16, kSumBytes);
  for (int64_t i = 0; i < steps; ++i, q += kTileBytes) {
    _tile_loadd(6, work->codes[0][kTileRows * i], kTileBytes);
    _tile_loadd(4, q, stride);
    _tile_loadd(7, work->codes[1][kTileRows * i], kTileBytes);
    _tile_loadd(5, q + kTileRows * stride, stride);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, sums[0], kSumBytes);
  _tile_stored(1, sums[0] + 16, kSumBytes);
  _tile_stored(2, sums[kTileRows], kSumBytes);
  _tile_stored(3, sums[kTileRows] + 16, kSumBytes);
}

// The same for 1..16 tokens.
void one_tile(const int8_t *q, int64_t stride, int64_t steps, const Work *work,
              int32_t (*sums)[BD_BLOCK_ROWS]) {
  constexpr int kSumBytes = BD_BLOCK_ROWS * 4;
  _tile_loadd(0, sums[0], kSumBytes);
  _tile_loadd(1, sums[0] + 16, kSumBytes);
  for (int64_t i = 0; i < steps; ++i, q += kTileBytes) {
    _tile_loadd(4, q, stride);
    _tile_loadd(6, work->codes[0][kTileRows * i], kTileBytes);
    _tile_loadd(7, work->codes[1][kTileRows * i], kTileBytes);
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
  }
  _tile_stored(0, sums[0], kSumBytes);
  _tile_stored(1, sums[0] + 16, kSumBytes);
}

// One chunk of columns for all tokens of a span. The shapes of the tiles are set only when they
// change: once a call for whole pairs of tiles, and around the remainder.
void add_chunk(const BdTokens *in, int64_t token, int64_t tokens, int64_t column, int64_t steps,
               Work *work) {
  const int64_t whole = tokens / (2 * kTileRows) * (2 * kTileRows);
  const int8_t *q = in->q + token * in->stride + column;
  for (int64_t t = 0; t < whole; t += 2 * kTileRows)
    two_tiles(q + t * in->stride, in->stride, steps, work, work->sums + t);
  const int64_t rest = tokens - whole;
  if (rest == 0) return;
  configure(rest);
  (rest > kTileRows ? two_tiles : one_tile)(q + whole * in->stride, in->stride, steps, work,
                                            work->sums + whole);
  configure(2 * kTileRows);
}

void span_of_block(const BdTernary *w, const BdTokens *in, int64_t block, int64_t token,
                   int64_t tokens, Work *work, float *y) {
  const int64_t groups = groups_of(w->columns);
  constexpr int64_t kChunkGroups = kChunk / BD_BLOCK_COLUMNS;
  memset(work->sums, 0, static_cast<size_t>(tokens) * sizeof work->sums[0]);
  for (int64_t g = 0; g < groups; g += kChunkGroups) {
    const int64_t count = smaller(kChunkGroups, groups - g);
    unpack(block_bytes(w, block) + g * BD_BLOCK_BYTES, count, work);
    add_chunk(in, token, tokens, g * BD_BLOCK_COLUMNS, (count + 3) / 4, work);
  }
  for (int64_t t = 0; t < tokens; ++t)
    write_rows(w, block, work->sums[t], in->sum[token + t], in->down[token + t],
               y + (token + t) * w->rows);
}

}  // namespace

void bitdistill::amx_ternary(const BdTernary *w, const BdTokens *in, float *y, int64_t first,
                             int64_t last) {
  if (in->tokens < kFewest) return avx512_vnni_ternary(w, in, y, first, last);
  Work work;
  configure(2 * kTileRows);
  for (int64_t block = first; block < last; ++block)
    for (int64_t token = 0; token < in->tokens; token += kSpan)
      span_of_block(w, in, block, token, smaller(kSpan, in->tokens - token), &work, y);
  _tile_release();
}
#endif
