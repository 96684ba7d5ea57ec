// Prefill by tables: a packed byte holds four trits of one column residue, so for a tile of tokens
// the 81 sums of those four activations, one vector of int16 a byte value, are formed once, and
// every output row then adds the vector that its byte selects: one load and add for four products
// of each token, where vpdpbusd or vpmaddubsw need one instruction for each four of eight or
// sixteen rows. Pays from some hundred rows on, over which the tables are shared. Loads are what
// binds, so two groups of 16 columns share one pass over the rows' sums.
//
// avx2_lookup.cpp includes this after defining `Lanes`, of 16 int16 lanes.
//
// Exactness. A table holds sums of four products of -128..127 and -1..1, in [-512, 512]; 63 of them
// fit int16, and kFlush groups of 16 columns add 4 * 14 = 56 before they go to int32. There
// |q . t| <= 128 * 2^17 = 2^24. Entries of bytes that hold a code 3 are left from earlier use: such
// weights give some result, never a fault.
#ifndef BITDISTILL_LOOKUP_H
#define BITDISTILL_LOOKUP_H

#include <immintrin.h>

#include "rows.h"
#include "work_memory.h"

namespace {

using Type = Lanes::Type;

constexpr int kTokens = Lanes::kTokens;
constexpr int kPass = 2;                 // groups
constexpr int kVector = 2 * kTokens;     // bytes
constexpr int kEntry = kPass * kVector;  // of a byte value: the sums of each group
constexpr int64_t kMostBlocks = 64;      // of 32 rows: their sums stay in the L2 cache
constexpr int64_t kFlush = 14;           // groups, whole passes
constexpr int64_t kAhead = 8;            // blocks whose bytes are fetched before their turn
constexpr int kLine = 64;

// The tables start where they spread over the sets of an L1 cache; of the last, every byte value is
// addressed.
constexpr int kTableBytes = Lanes::kStart[3] * kLine + 256 * kEntry;

struct Work {
  alignas(64) char tables[kTableBytes];
  alignas(64) int16_t columns[BD_BLOCK_COLUMNS][kTokens];
  alignas(64) int16_t narrow[kMostBlocks * BD_BLOCK_ROWS][kTokens];
  alignas(64) int32_t wide[kMostBlocks * BD_BLOCK_ROWS][kTokens];
  alignas(64) int32_t dots[kTokens][BD_BLOCK_ROWS];
};

// ---- the tables of one group of columns ----

// 16 tokens x 16 columns of bytes -> columns x tokens.
inline void transpose_bytes(const int8_t *q, int64_t stride, int64_t count, int16_t *out) {
  __m128i a[16], b[16];
  for (int64_t t = 0; t < 16; ++t)
    a[t] = t < count ? _mm_loadu_si128(reinterpret_cast<const __m128i *>(q + t * stride))
                     : _mm_setzero_si128();
  // Each pass is a perfect shuffle of the 256 bytes; four of them transpose.
  for (int pass = 0; pass < 2; ++pass) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
      a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    }
  }
  for (int k = 0; k < 16; ++k)
    _mm256_store_si256(reinterpret_cast<__m256i *>(out + k * kTokens), _mm256_cvtepi8_epi16(a[k]));
}

// table[c0 + 4 c1 + 16 c2 + 64 c3] = sum of (c_s - 1) x_s.
inline void fill_table(const int16_t (*x)[kTokens], char *table) {
  const Type x0 = Lanes::load(x[0]), x1 = Lanes::load(x[4]), x2 = Lanes::load(x[8]),
             x3 = Lanes::load(x[12]);
  Type sum3 = Lanes::subtract(Lanes::zero(), Lanes::add(Lanes::add(x0, x1), Lanes::add(x2, x3)));
  for (int c3 = 0; c3 < 3; ++c3, sum3 = Lanes::add(sum3, x3)) {
    Type sum2 = sum3;
    for (int c2 = 0; c2 < 3; ++c2, sum2 = Lanes::add(sum2, x2)) {
      Type sum1 = sum2;
      for (int c1 = 0; c1 < 3; ++c1, sum1 = Lanes::add(sum1, x1)) {
        char *entry = table + (4 * c1 + 16 * c2 + 64 * c3) * kEntry;
        const Type next = Lanes::add(sum1, x0);
        Lanes::store(entry, sum1);
        Lanes::store(entry + kEntry, next);
        Lanes::store(entry + 2 * kEntry, Lanes::add(next, x0));
      }
    }
  }
}

inline void fill_tables(const BdTokens *in, int64_t token, int64_t count, int64_t g, int place,
                        Work *work) {
  const int8_t *q = in->q + token * in->stride + g * BD_BLOCK_COLUMNS;
  transpose_bytes(q, in->stride, count, &work->columns[0][0]);
  for (int j = 0; j < 4; ++j)
    fill_table(work->columns + j, work->tables + Lanes::kStart[j] * kLine + place * kVector);
}

// ---- the rows ----

template <int J>
inline Type entry_of(const char *tables, uint64_t bytes) {
  constexpr uint64_t kMask = 255u << Lanes::kEntryBits;
  constexpr int kShift = 8 * J - Lanes::kEntryBits;
  constexpr int kTurn = (kShift + 64) % 64;  // a rotation, which may leave its source as it is
  bytes = bytes >> kTurn | bytes << (64 - kTurn);
  return Lanes::load(tables + Lanes::kStart[J] * kLine + (bytes & kMask));
}

inline Type add_row(Type sum, const char *tables, uint64_t bytes) {
  sum = Lanes::add(sum, entry_of<0>(tables, bytes));
  sum = Lanes::add(sum, entry_of<1>(tables, bytes));
  sum = Lanes::add(sum, entry_of<2>(tables, bytes));
  return Lanes::add(sum, entry_of<3>(tables, bytes));
}

// The groups take turns: their entries lie in different halves of a line, and two loads of one half
// wait for each other.
template <int J>
inline Type add_both(Type sum, const char *tables, uint64_t first, uint64_t second) {
  sum = Lanes::add(sum, entry_of<J>(tables, first));
  BD_IN_ORDER(sum);
  sum = Lanes::add(sum, entry_of<J>(tables + kVector, second));
  BD_IN_ORDER(sum);
  return sum;
}

inline Type add_rows(Type sum, const char *tables, uint64_t first, uint64_t second) {
  sum = add_both<0>(sum, tables, first, second);
  sum = add_both<1>(sum, tables, first, second);
  sum = add_both<2>(sum, tables, first, second);
  return add_both<3>(sum, tables, first, second);
}

// Sums of G groups of one block, added to those of the groups before unless these are the First.
// Inlined, the loop would keep its pointers in memory.
template <int G, bool First>
BD_NOINLINE void add_groups(const uint8_t *w, const char *tables, int16_t (*sums)[kTokens]) {
  for (int r = 0; r < BD_BLOCK_ROWS; r += 2) {
    Type one = First ? Lanes::zero() : Lanes::load(sums[r]);
    Type two = First ? Lanes::zero() : Lanes::load(sums[r + 1]);
    uint64_t first, second;
    memcpy(&first, w + 4 * r, sizeof first);
    if constexpr (G == kPass) {
      memcpy(&second, w + BD_BLOCK_BYTES + 4 * r, sizeof second);
      one = add_rows(one, tables, first, second);
      two = add_rows(two, tables, first >> 32, second >> 32);
    } else {
      one = add_row(one, tables, first);
      two = add_row(two, tables, first >> 32);
    }
    Lanes::store(sums[r], one);
    Lanes::store(sums[r + 1], two);
  }
}

template <bool First>
void widen(Work *work, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int t = 0; t < kTokens; ++t)
      work->wide[r][t] = (First ? 0 : work->wide[r][t]) + work->narrow[r][t];
}

// 8 rows x 8 tokens -> tokens x rows.
inline void transpose_sums(const int32_t *in, int32_t *out) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i)
    a[i] =
        _mm256_castsi256_ps(_mm256_load_si256(reinterpret_cast<const __m256i *>(in + i * kTokens)));
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0x44);
    a[4 * i + 1] = _mm256_shuffle_ps(b[4 * i], b[4 * i + 2], 0xee);
    a[4 * i + 2] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0x44);
    a[4 * i + 3] = _mm256_shuffle_ps(b[4 * i + 1], b[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(reinterpret_cast<float *>(out + i * BD_BLOCK_ROWS),
                     _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(reinterpret_cast<float *>(out + (i + 4) * BD_BLOCK_ROWS),
                     _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

void write_block(const BdTernary *w, const BdTokens *in, int64_t block, int64_t token,
                 int64_t count, const int32_t (*sums)[kTokens], Work *work, float *y) {
  for (int r = 0; r < BD_BLOCK_ROWS; r += 8)
    for (int t = 0; t < kTokens; t += 8) transpose_sums(&sums[r][t], &work->dots[t][r]);
  for (int64_t t = 0; t < count; ++t)
    write_rows(w, block, work->dots[t], 0, in->down[token + t], y + (token + t) * w->rows);
}

inline void fetch_pass(const uint8_t *packed) {
  for (int i = 0; i < kPass * BD_BLOCK_BYTES; i += kLine)
    _mm_prefetch(reinterpret_cast<const char *>(packed + i), _MM_HINT_T0);
}

// One tile of tokens and at most kMostBlocks blocks. Passes take a few bytes of every block, which
// memory gives in time only if all are fetched ahead, the first ones of a pass during the last.
void tile(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last,
          int64_t token, int64_t count, Work *work) {
  const int64_t groups = groups_of(w->columns), blocks = last - first;
  const int64_t step = groups * BD_BLOCK_BYTES;
  for (int64_t g = 0; g < groups; g += kPass) {
    const int pass = static_cast<int>(smaller(kPass, groups - g));
    for (int i = 0; i < pass; ++i) fill_tables(in, token, count, g + i, i, work);
    const bool fresh = g % kFlush == 0;
    const auto add = pass == kPass ? fresh ? add_groups<kPass, true> : add_groups<kPass, false>
                     : fresh       ? add_groups<1, true>
                                   : add_groups<1, false>;
    const uint8_t *packed = block_bytes(w, first) + g * BD_BLOCK_BYTES;
    for (int64_t b = 0; b < blocks; ++b, packed += step) {
      const int64_t next = b + kAhead < blocks ? 0 : kPass * BD_BLOCK_BYTES - blocks * step;
      fetch_pass(packed + kAhead * step + next);
      add(packed, work->tables, work->narrow + b * BD_BLOCK_ROWS);
    }
    if ((g + pass) % kFlush == 0 || g + pass == groups)
      (g < kFlush ? widen<true> : widen<false>)(work, blocks * BD_BLOCK_ROWS);
  }
  for (int64_t b = 0; b < blocks; ++b)
    write_block(w, in, first + b, token, count, work->wide + b * BD_BLOCK_ROWS, work, y);
}

// The tokens that fill tiles well enough; returns their number, 0 without work memory.
int64_t by_lookup(const BdTernary *w, const BdTokens *in, float *y, int64_t first, int64_t last) {
  const int64_t rest = in->tokens % kTokens;
  const int64_t tokens = in->tokens - (rest < Lanes::kFewest ? rest : 0);
  static_assert(kAhead <= Lanes::kFewestBlocks, "the blocks ahead are those of one pass more");
  if (tokens == 0 || last - first < Lanes::kFewestBlocks) return 0;
  Work *work = static_cast<Work *>(bitdistill::work_memory(sizeof(Work)));
  if (work == nullptr) return 0;
  const int64_t parts = (last - first + kMostBlocks - 1) / kMostBlocks;
  for (int64_t token = 0; token < tokens; token += kTokens)
    for (int64_t part = 0; part < parts; ++part)
      tile(w, in, y, first + (last - first) * part / parts,
           first + (last - first) * (part + 1) / parts, token, smaller(kTokens, tokens - token),
           work);
  return tokens;
}

}  // namespace
#endif
