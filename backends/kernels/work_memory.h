// Memory that a kernel needs beside its arguments.
#ifndef BITDISTILL_WORK_MEMORY_H
#define BITDISTILL_WORK_MEMORY_H

#include <stddef.h>

namespace bitdistill {
// At least `bytes` bytes aligned to 64, zero when new, kept for the calling thread until it ends;
// null when there is no memory. One use at a time: the next call may hand out the same bytes.
void *work_memory(size_t bytes);

// Of memory that a thread keeps, what a decoded token may need, and soon does again.
constexpr size_t kKeptBytes = 1 << 17;

// Gives back the calling thread's, which is not in use, if it is more than that.
void release_work_memory();
}  // namespace bitdistill
#endif
