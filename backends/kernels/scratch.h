// Memory for one call of an operator.
#ifndef BITDISTILL_SCRATCH_H
#define BITDISTILL_SCRATCH_H

#include <stddef.h>

namespace bitdistill {

// Memory of the calling thread that grows and is kept; a nested use gets memory of its own.
class Scratch {
 public:
  explicit Scratch(size_t bytes);
  ~Scratch();

  // Gives back what is kept and not in use, if it is a prompt's. Heads ask for it, as their threads
  // do of work memory: they come last, and what layers worked in would lie idle beside the logits.
  static void release();

  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  void *data() const { return data_; }  // null: out of memory

 private:
  void *data_;
  bool kept_;
};

}  // namespace bitdistill
#endif
