#include "ort_rotary.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <mutex>
#include <new>

namespace bitdistill {
namespace {
std::mutex mutex;
Rotary *tables = nullptr;
}  // namespace

bool Rotary::equals(const float *frequencies, int64_t n, float by, int64_t most) const {
  return n == count && by == scale && most == context &&
         memcmp(memory, frequencies, static_cast<size_t>(n) * sizeof(float)) == 0;
}

Rotary *Rotary::make(const float *frequencies, int64_t count, float scale, int64_t context) {
  Rotary *r = new (std::nothrow) Rotary();
  if (r == nullptr) return nullptr;
  const size_t floats = static_cast<size_t>(count * (1 + 2 * context));
  r->memory = static_cast<float *>(calloc(floats, sizeof(float)));
  if (r->memory == nullptr) {
    delete r;
    return nullptr;
  }
  memcpy(r->memory, frequencies, static_cast<size_t>(count) * sizeof(float));
  r->count = count, r->context = context, r->scale = scale;
  return r;
}

Rotary *Rotary::acquire(const float *frequencies, int64_t count, float scale, int64_t context) {
  const std::lock_guard<std::mutex> lock(mutex);
  Rotary *r = tables;
  while (r != nullptr && !r->equals(frequencies, count, scale, context)) r = r->next;
  if (r == nullptr) {
    r = make(frequencies, count, scale, context);
    if (r == nullptr) return nullptr;
    r->next = tables;
    tables = r;
  }
  ++r->users;
  return r;
}

void Rotary::release(Rotary *rotary) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (rotary == nullptr || --rotary->users > 0) return;
  Rotary **place = &tables;
  while (*place != rotary) place = &(*place)->next;
  *place = rotary->next;
  free(rotary->memory);
  delete rotary;
}

RotaryTable Rotary::rows(int64_t positions) {
  const std::lock_guard<std::mutex> lock(mutex);
  float *cosines = memory + count, *sines = cosines + context * count;
  for (; filled < positions; ++filled)
    for (int64_t i = 0; i < count; ++i) {
      const double angle = static_cast<double>(static_cast<float>(filled) * memory[i]);
      cosines[filled * count + i] = static_cast<float>(::cos(angle) * static_cast<double>(scale));
      sines[filled * count + i] = static_cast<float>(::sin(angle) * static_cast<double>(scale));
    }
  return {cosines, sines};
}

}  // namespace bitdistill
