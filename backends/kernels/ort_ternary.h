// A node of the operator TernaryLinear, and what its inputs must be.
#ifndef BITDISTILL_ORT_TERNARY_H
#define BITDISTILL_ORT_TERNARY_H

#include "ort_support.h"

namespace bitdistill {

enum TernaryInput : size_t {
  kX,
  kW,
  kScale,
  kNorm,
  kBias,
  kTernaryConstants,  // before it: what may be read and checked once
  kUp = kTernaryConstants,
  kResidual,
  kTernaryInputs
};

struct TernaryNode {
  const ort::Api *api;
  const BdKernels *kernels;
  int64_t rows;
  int64_t columns;
  int64_t scale_rows;
  bool base3;
  int bits;
  int activation;                       // BD_SILU, BD_GELU_TANH or 0
  float epsilon;                        // NaN: not given
  Tensor constants[kTernaryConstants];  // checked; those that are not constant stay absent
  char name[kNameSize];                 // "TernaryLinear 'node name'"
};

constexpr int64_t kFewTokens = 8;  // below, tasks of rows alone; from here on, of tokens too

// One product: inputs that belong together, and room for it. A residual may lie where y does.
struct TernaryCall {
  Tensor in[kTernaryInputs];
  int64_t tokens;
  int64_t stride;  // floats from a token of X to the next
  float *y;

  const float *floats(size_t input) const { return in[input].floats(); }
};

// Every check of W, scale, norm_weight or bias but that of the codes, which cost a pass over the
// weights.
ort::Status *check_constant(const TernaryNode &k, size_t input, const Tensor &tensor);

// The attribute activation, where there is one.
ort::Status *read_activation(const ort::Api *api, const char *name, const ort::KernelInfo *info,
                             int *activation);

// The attributes layout and activation_bits, and whether rows and columns are those of a matrix.
ort::Status *read_form(TernaryNode *k, const ort::KernelInfo *info);
ort::Status *check_sizes(const TernaryNode &k);

// Input `index` of the operator as input `input` of a TernaryLinear, checked and kept if it is
// constant.
ort::Status *keep_constant(TernaryNode *k, const ort::KernelInfo *info, size_t index, size_t input);

// Rows of a matrix that are multiplied by themselves, whole blocks or up to the last: all of them,
// or a matrix of a stack. `update` is BdTernary's; y is (tokens, count).
struct Rows {
  int64_t first, count;
  int update;
};

// A call's tokens, which are some: made ready, then multiplied by rows. `memory` has product_bytes
// of the most rows.
size_t product_bytes(const TernaryNode &k, int64_t rows, int64_t tokens);
ort::Status *prepare_tokens(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                            void *memory);
ort::Status *multiply_rows(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                           const Rows &rows, void *memory);

// One call of the operator.
ort::Status *run_ternary(const TernaryNode &k, ort::KernelContext *context);

}  // namespace bitdistill
#endif
