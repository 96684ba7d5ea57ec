// Cosines and sines of rotary positions, made as far as positions are used: a table of the whole
// context would be 4 MB of file and memory for 8,192 positions of a head size of 128.
#ifndef BITDISTILL_ORT_ROTARY_H
#define BITDISTILL_ORT_ROTARY_H

#include <stdint.h>

namespace bitdistill {

struct RotaryTable {
  const float *cos, *sin;  // (positions, count)
};

// One table, shared by the layers that have its frequencies. Angles are rounded to fp32, as where
// the model was trained; their cosines are taken in fp64.
class Rotary {
 public:
  // The table of these frequencies, for positions below `context`; null when out of memory.
  static Rotary *acquire(const float *frequencies, int64_t count, float scale, int64_t context);
  static void release(Rotary *rotary);

  // Rows of [0, positions) are there afterwards. Any thread may call it.
  RotaryTable rows(int64_t positions);

 private:
  Rotary *next = nullptr;
  float *memory = nullptr;  // frequencies, cosines, sines; what is never written takes no memory
  int64_t count = 0, context = 0, filled = 0, users = 0;
  float scale = 0;

  bool equals(const float *frequencies, int64_t n, float by, int64_t most) const;
  static Rotary *make(const float *frequencies, int64_t count, float scale, int64_t context);
};

}  // namespace bitdistill
#endif
