// How a product of a few tokens is divided where a piece costs next to nothing to hand out: a long
// piece for each thread, whose weights come from memory in unbroken streams, then short ones, which
// even out what the threads differ by.
#ifndef BITDISTILL_PIECES_H
#define BITDISTILL_PIECES_H

#include <stdint.h>

namespace bitdistill {

class Pieces {
 public:
  Pieces(int64_t blocks, int64_t threads)
      : blocks_(blocks),
        threads_(threads),
        long_(blocks * 3 / 4 / threads / kStreams * kStreams),
        short_(whole_streams((blocks - long_ * threads + 2 * threads - 1) / (2 * threads))) {}

  int64_t count() const {
    return (long_ > 0 ? threads_ : 0) + (blocks_ - long_ * threads_ + short_ - 1) / short_;
  }

  // The first block of a piece; of the one behind the last, how many blocks there are.
  int64_t first(int64_t piece) const {
    if (long_ > 0 && piece <= threads_) return long_ * piece;
    const int64_t index = long_ > 0 ? piece - threads_ : piece;
    const int64_t block = long_ * threads_ + index * short_;
    return block < blocks_ ? block : blocks_;
  }

 private:
  static constexpr int64_t kStreams = 4;  // blocks that a kernel reads side by side

  static int64_t whole_streams(int64_t blocks) {
    const int64_t whole = (blocks + kStreams - 1) / kStreams * kStreams;
    return whole > 0 ? whole : kStreams;
  }

  int64_t blocks_, threads_;
  int64_t long_, short_;
};

}  // namespace bitdistill
#endif
