// A node of the operator DecoderLayer.
#ifndef BITDISTILL_ORT_LAYER_H
#define BITDISTILL_ORT_LAYER_H

#include "ort_attention.h"
#include "ort_ternary.h"

namespace bitdistill {

enum Part : size_t { kQkv, kOutput, kGateUp, kDown, kParts };
constexpr size_t kOwnInputs = kAttentionInputs - kPastKey + 1;  // X, and those of Attention
constexpr size_t kPerPart = kTernaryConstants - kW;             // constants of a matrix

struct LayerNode {
  const ort::Api *api;
  const BdKernels *kernels;
  int64_t hidden, wide, head;
  AttentionNode attention;
  TernaryNode parts[kParts];
  char name[kNameSize];
};

// One call of the operator.
ort::Status *run_layer(const LayerNode &k, ort::KernelContext *context);

}  // namespace bitdistill
#endif
