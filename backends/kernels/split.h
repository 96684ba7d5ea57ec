// How a product of several tokens is divided into parts, which threads take as they come: one that
// shares its core with other work takes fewer. Rows first, as long as a part keeps enough of them
// to share the tables of prefill, or the weights unpacked for it; then tokens. Where parts build
// tables (lookup.h), each share of the rows builds the same once more: there tokens alone are
// divided, if all threads get as many whole tiles, but for some rows at the end. Those are short
// parts, too short for tables: they take a quarter longer in all, and even out what the threads
// differ by, which halves of a product let wait for each other for a seventh of their time. The
// results do not depend on it: every output is computed whole by one call.
#ifndef BITDISTILL_SPLIT_H
#define BITDISTILL_SPLIT_H

#include <atomic>

#include "bitdistill_kernels.h"

namespace bitdistill {

// Tokens [first, last) of those that were made ready.
inline BdTokens some_tokens(const BdTokens &in, int64_t first, int64_t last) {
  BdTokens out = in;
  out.tokens = last - first;
  if (in.values != nullptr) {
    out.values += first * in.stride;
  } else {
    out.q += first * in.stride;
    out.down += first;
    out.sum += first;
  }
  return out;
}

class Split {
 public:
  // `shares` parts for each thread where they cost something, up to kTileShares where they do not.
  Split(int64_t tokens, int64_t blocks, int64_t threads, int64_t shares, bool by_tokens)
      : tokens_(tokens),
        blocks_(blocks),
        long_(blocks),
        token_parts_(within(tokens / kTile, kTileShares * threads)),
        block_parts_(1) {
    if (by_tokens && tokens % (kTile * threads) == 0) {
      if (threads > 1 && blocks >= 2 * kShortBlocks)
        long_ -= blocks / larger(kShortBlocks, 4 * token_parts_ / threads);
      block_parts_ = (long_ + kTableBlocks - 1) / kTableBlocks;
      return;
    }
    const int64_t parts = shares * threads;
    block_parts_ = within(blocks / kBlocks, parts);
    token_parts_ = within((parts + block_parts_ - 1) / block_parts_, tokens / kTokens);
    block_parts_ = within((parts + token_parts_ - 1) / token_parts_, blocks);
  }

  // Parts that are left, one after the other, the long ones first; `next` begins with 0. kernel is
  // BdKernels::ternary or BdKernels::ternary_float.
  template <class Kernel>
  void take(std::atomic<int64_t> *next, Kernel kernel, const BdTernary &w, const BdTokens &in,
            float *y) const {
    const int64_t parts = token_parts_ * block_parts_;
    const int64_t all = parts + (blocks_ - long_) * (tokens_ / kTile);
    for (int64_t part = next->fetch_add(1); part < all; part = next->fetch_add(1))
      if (part < parts) {
        const int64_t row = part % block_parts_, column = part / block_parts_;
        run(kernel, w, in, y, token_at(column), token_at(column + 1), long_ * row / block_parts_,
            long_ * (row + 1) / block_parts_);
      } else {
        const int64_t block = long_ + (part - parts) / (tokens_ / kTile);
        const int64_t token = (part - parts) % (tokens_ / kTile) * kTile;
        run(kernel, w, in, y, token, token + kTile, block, block + 1);
      }
  }

 private:
  static constexpr int64_t kBlocks = 32;  // of 32 rows: a part with fewer had better split tokens
  static constexpr int64_t kTokens = 32;
  static constexpr int64_t kTableBlocks = 64;  // tables are made for so many at once: lookup.h
  static constexpr int64_t kTile = 16;         // tokens of a tile: parts are whole tiles
  static constexpr int64_t kTileShares = 8;
  static constexpr int64_t kShortBlocks = 8;  // one of so many, or of fewer, is for short parts

  static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

  static int64_t within(int64_t value, int64_t most) {
    value = value < most ? value : most;
    return value < 1 ? 1 : value;
  }

  int64_t token_at(int64_t part) const {
    return part == token_parts_ ? tokens_ : tokens_ * part / token_parts_ / kTile * kTile;
  }

  template <class Kernel>
  static void run(Kernel kernel, const BdTernary &w, const BdTokens &in, float *y, int64_t token,
                  int64_t token_end, int64_t block, int64_t block_end) {
    const BdTokens some = some_tokens(in, token, token_end);
    kernel(&w, &some, y + token * w.rows, block, block_end);
  }

  int64_t tokens_, blocks_;
  int64_t long_;  // blocks of parts that are not short
  int64_t token_parts_, block_parts_;
};

}  // namespace bitdistill
#endif
