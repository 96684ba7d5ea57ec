// A node of the operator Attention, and what one call of it was given, checked.
#ifndef BITDISTILL_ORT_ATTENTION_H
#define BITDISTILL_ORT_ATTENTION_H

#include "ort_rotary.h"
#include "ort_support.h"

namespace bitdistill {

enum AttentionInput : size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kLengths,
  kTotal,
  kAttentionConstants,  // from here on: what may be read once
  kFrequencies = kAttentionConstants,
  kQNorm,
  kKNorm,
  kAttentionInputs
};
enum AttentionOutput : size_t { kY, kPresentKey, kPresentValue, kAttentionOutputs };

struct AttentionNode {
  AttentionNode() = default;
  AttentionNode(const AttentionNode &) = delete;
  AttentionNode &operator=(const AttentionNode &) = delete;
  ~AttentionNode() { Rotary::release(rotary); }

  const ort::Api *api;
  const BdKernels *kernels;
  int64_t heads, kv_heads, window;
  int64_t context;
  float scale, epsilon;
  bool in_layer;  // of a DecoderLayer: no inputs for query, key and value but the layer's own
  Rotary *rotary;
  Tensor constants[kAttentionInputs];  // those that are not constant stay absent
  char name[kNameSize];
};

// One call: sizes, and where each sequence's parts begin.
struct AttentionCall {
  Tensor in[kAttentionInputs];
  int64_t batch, tokens, size, past_room, room, total;
  ort::ElementType type;
  int64_t bits;
  const float *q, *k, *v;
  int64_t q_stride, kv_stride;  // floats from a token to the next
  char *present[2];
  float *y;  // a head's results may lie where its queries were
  int64_t y_stride;
  RotaryTable rotary;

  const int32_t *lengths() const { return static_cast<const int32_t *>(in[kLengths].data); }
  bool prompt() const { return tokens == total; }
  int64_t past(int64_t b) const { return prompt() ? 0 : lengths()[b] + 1 - tokens; }
  int64_t given(int64_t b) const { return prompt() ? lengths()[b] + 1 : tokens; }
  int64_t row_bytes() const { return bd_cache_row_bytes(size, bits); }
};

// Where an input of Attention is found among those of the operator.
inline size_t place_of(const AttentionNode &k, size_t input) {
  return k.in_layer ? input - (kPastKey - 1) : input;
}

// The attributes and constants of a node.
ort::Status *read_node(AttentionNode *k, const ort::KernelInfo *info);

// The inputs of a call, refused where they do not belong together; outputs are left open. Of a
// layer the query is there already.
ort::Status *read_call(const AttentionNode &k, const ort::KernelContext *context, AttentionCall *c);

// Outputs 1 and 2.
ort::Status *make_presents(const AttentionNode &k, ort::KernelContext *context, AttentionCall *c);

// Of a call with tokens: how many tiles a key head has, and whether its keys and values are kept in
// a loop before that over the tiles.
inline int64_t tiles_of(const AttentionNode &k, const AttentionCall &c) {
  return (c.tokens * (k.heads / k.kv_heads) + BD_TILE_ROWS - 1) / BD_TILE_ROWS;
}
inline bool keeps_first(const AttentionNode &k, const AttentionCall &c) {
  return tiles_of(k, c) > 1;
}

// Queries, keys and values side by side in `packed`.
void take_packed(const AttentionNode &k, const float *packed, AttentionCall *c);

// Fill the cache, if that comes first, and then y (and else the cache).
ort::Status *keep_all(const AttentionNode &k, const Threads &threads, AttentionCall *c);
ort::Status *attend_all(const AttentionNode &k, const Threads &threads, const AttentionCall &c);

// Types of inputs and outputs that are of the cache's type or integers; float otherwise.
ort::ElementType attention_input_type(size_t input, ort::ElementType cache);

template <ort::ElementType Cache>
ort::ElementType attention_output_type(const ort::CustomOp *, size_t output) {
  return output == kY ? ort::kFloat : Cache;
}

}  // namespace bitdistill
#endif
