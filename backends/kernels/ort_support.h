// What both operators need: errors as statuses (nothing throws), checked tensors, scratch memory,
// the parallel loop, and the schema callbacks that an operator table shares.
#ifndef BITDISTILL_ORT_SUPPORT_H
#define BITDISTILL_ORT_SUPPORT_H

#include <new>

#include "bitdistill_kernels.h"
#include "ort_abi.h"
#include "scratch.h"
#include "team.h"

namespace bitdistill {

#define BD_TRY(expression)                                       \
  do {                                                           \
    if (ort::Status *bd_status = (expression)) return bd_status; \
  } while (false)

constexpr size_t kMaxRank = 8;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
ort::Status *refuse(const ort::Api *api, const char *format, ...);

// A tensor as the runtime holds it; `present` is false for an optional input that is absent.
struct Tensor {
  bool present;
  const void *data;
  ort::ElementType type;
  size_t rank;
  int64_t dims[kMaxRank];

  const float *floats() const { return static_cast<const float *>(data); }
};

// What a tensor must be. A rank of 0 leaves the dimensions open.
struct Expected {
  const char *name;
  ort::ElementType type;
  size_t rank;
  int64_t dims[kMaxRank];
};

// "Op 'node'", or "Op" for a node without a name, or with one too long for messages.
constexpr size_t kNameSize = 160;
void read_name(const ort::Api *api, const ort::KernelInfo *info, const char *op,
               char (&name)[kNameSize]);

// An integer attribute that must be there.
ort::Status *read_int(const ort::Api *api, const ort::KernelInfo *info, const char *op,
                      const char *attribute, int64_t *out);

// The same of a number.
ort::Status *read_float(const ort::Api *api, const ort::KernelInfo *info, const char *op,
                        const char *attribute, float *out);

// Scales must be finite and not negative.
ort::Status *check_scales(const ort::Api *api, const char *op, const float *scale, int64_t count);

ort::Status *read_tensor(const ort::Api *api, const ort::Value *value, Tensor *out);
ort::Status *read_input(const ort::Api *api, const ort::KernelContext *context, size_t index,
                        Tensor *out);
ort::Status *read_constant(const ort::Api *api, const ort::KernelInfo *info, size_t index,
                           Tensor *out);
ort::Status *check_tensor(const ort::Api *api, const char *op, const Tensor &tensor,
                          const Expected &expected);

// Allocates an output.
ort::Status *allocate(const ort::Api *api, ort::KernelContext *context, size_t output,
                      const int64_t *dims, size_t rank, void **data);

// Allocates output 0: the first `rank` dimensions of x, then `last`.
ort::Status *make_output(const ort::Api *api, ort::KernelContext *context, const Tensor &x,
                         size_t rank, int64_t last, float **out);

// Tokens of x, which must end in `columns`; `what` names these in the error.
ort::Status *check_activations(const ort::Api *api, const char *op, const Tensor &x,
                               const char *what, int64_t columns, int64_t *tokens);

inline size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Where the loops of a call run.
struct Threads {
  const ort::Api *api;
  const ort::KernelContext *context;
  Team *team = nullptr;  // none: each loop asks the runtime for its threads
};

// Runs body(first, last) over [0, total) in fixed chunks on the runtime's own thread pool. Results
// do not depend on the chunks or threads: every output element is computed whole by one call.
template <class Body>
ort::Status *parallel(const Threads &threads, int64_t total, int64_t chunk, const Body &body) {
  if (total <= chunk) {
    body(static_cast<int64_t>(0), total);
    return nullptr;
  }
  struct Loop {
    const Body *body;
    int64_t total, chunk;
  } loop = {&body, total, chunk};
  const auto run = [](void *data, size_t index) {
    const Loop &l = *static_cast<const Loop *>(data);
    const int64_t first = static_cast<int64_t>(index) * l.chunk;
    const int64_t last = first + l.chunk < l.total ? first + l.chunk : l.total;
    (*l.body)(first, last);
  };
  const auto chunks = static_cast<size_t>((total + chunk - 1) / chunk);
  if (threads.team != nullptr) {
    threads.team->run(run, &loop, chunks);
    return nullptr;
  }
  return threads.api->KernelContext_ParallelFor(threads.context, run, chunks, 0, &loop);
}

// Units for one task, so that a task lasts long enough to be worth handing to a thread.
int64_t chunk_of(double nanoseconds_per_unit);

// The runtime does not tell how many threads it has: as many as there are processors, or fewer.
int64_t processors();

// Units for one of `parts` tasks a processor. Weights that come from memory are read in several
// streams, each of which should be long.
int64_t share_of(int64_t units, int64_t parts);

// An operator's table for the runtime, and the interface it was made for (shape inference gets no
// other way to it).
struct Op : ort::CustomOp {
  const ort::Api *api;
};

// Fills the callbacks that do not differ between operators.
void fill_common(Op *op, const ort::Api *api);

// Shape inference: output 0 is float, of the dimensions of input 0 without the last `dropped`, then
// `last`.
ort::Status *infer_output(const ort::Api *api, ort::ShapeContext *context, size_t dropped,
                          int64_t last);

// An integer attribute in shape inference.
ort::Status *infer_int(const ort::Api *api, const ort::ShapeContext *context, const char *attribute,
                       int64_t *out);

// How the runtime makes an operator's node and ends it. `Make` reads a new one's attributes and
// constants; it is told the operator's name.
template <class Node, ort::Status *(*Make)(Node *, const ort::KernelInfo *, const char *)>
ort::Status *create_node(const ort::CustomOp *op, const ort::Api *api, const ort::KernelInfo *info,
                         void **out) noexcept {
  const char *name = op->GetName(op);
  Node *node = new (std::nothrow) Node();
  if (node == nullptr) return refuse(api, "%s: out of memory", name);
  node->api = api;
  node->kernels = bd_kernels(nullptr);
  ort::Status *status = node->kernels == nullptr ? refuse(api, "%s", bd_kernels_error(nullptr))
                                                 : Make(node, info, name);
  if (status != nullptr)
    delete node;
  else
    *out = node;
  return status;
}

template <class Node, ort::Status *(*Make)(Node *, const ort::KernelInfo *, const char *)>
void fill_node(Op *op) {
  op->CreateKernelV2 = create_node<Node, Make>;
  op->KernelDestroy = [](void *node) noexcept { delete static_cast<Node *>(node); };
}

// Shape inference as the runtime calls it, which does not look at the status and would never
// release it. What a model lacks is refused when its kernels are made, or when they run.
template <ort::Status *(*Infer)(const ort::CustomOp *, ort::ShapeContext *)>
ort::Status *infer_shapes(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  ort::Status *status = Infer(op, context);
  if (status != nullptr) static_cast<const Op *>(op)->api->ReleaseStatus(status);
  return nullptr;
}

// Of these two an operator for each type of the cache: float, float16 and int8.
void fill_attention(Op (&ops)[3], const ort::Api *api);
void fill_layer(Op (&ops)[3], const ort::Api *api);
void fill_ternary(Op *op, const ort::Api *api);
void fill_head(Op *op, const ort::Api *api);
void fill_quantized_head(Op *op, const ort::Api *api);
void fill_quantized_embedding(Op *op, const ort::Api *api);

}  // namespace bitdistill
#endif
