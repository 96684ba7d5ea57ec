// Fetching of memory while other memory is being used. Internal linkage, as common.h explains.
#ifndef BITDISTILL_ATTENTION_FETCH_H
#define BITDISTILL_ATTENTION_FETCH_H

#include <stdint.h>

namespace {

// A line at a time from four places of it in turn: a core gets more from several pages at once than
// from one.
template <class I>
class Fetch {
 public:
  Fetch() : memory_(nullptr), apart_(0), left_(0) {}  // nothing
  Fetch(const char *memory, int64_t bytes)
      : memory_(memory), apart_((bytes / kPlaces + kLine) / kLine * kLine), left_(apart_) {}

  // As many bytes more, to whole rounds of the places.
  void advance(int64_t bytes) {
    for (; bytes > 0 && left_ > 0; bytes -= kPlaces * kLine, left_ -= kLine, memory_ += kLine)
      for (int place = 0; place < kPlaces; ++place) I::prefetch(memory_ + place * apart_);
  }

 private:
  static constexpr int64_t kLine = 64;
  static constexpr int kPlaces = 4;
  const char *memory_;
  int64_t apart_, left_;
};

}  // namespace
#endif
