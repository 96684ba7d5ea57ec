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

// Every check of W, scale, norm_weight or bias but that of the codes, which cost a pass over the
// weights.
ort::Status *check_constant(const TernaryNode &k, size_t input, const Tensor &tensor);

// One call.
ort::Status *run_ternary(const TernaryNode &k, ort::KernelContext *context);

}  // namespace bitdistill
#endif
