// A node of the operator DecoderLayer.
#ifndef BITDISTILL_ORT_LAYER_H
#define BITDISTILL_ORT_LAYER_H

#include <atomic>

#include "ort_attention.h"
#include "ort_ternary.h"

namespace bitdistill {

enum Part : size_t { kQkv, kOutput, kGateUp, kDown, kParts };
constexpr size_t kScales = kAttentionInputs - kPastKey + 1;  // behind X and those of Attention
enum PartInput : size_t { kPartW, kPartNorm, kPartBias, kPartInputs };

// Where an input of a matrix is found among those of the operator.
inline size_t place_of(size_t part, size_t input) {
  return kScales + 1 + part * kPartInputs + input;
}

struct LayerNode {
  const ort::Api *api;
  const BdKernels *kernels;
  int64_t hidden, wide, head;
  int activation;
  mutable std::atomic<bool> asked{false};  // whether absent norms and biases are fed
  AttentionNode attention;
  TernaryNode parts[kParts];
  char name[kNameSize];
};

// One call of the operator.
ort::Status *run_layer(const LayerNode &k, ort::KernelContext *context);

}  // namespace bitdistill
#endif
