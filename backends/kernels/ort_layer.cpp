// DecoderLayer: one pre-norm decoder layer of an LLM, the ternary products, attention and residuals
// of which are those of TernaryLinear and Attention:
//
//   h = X + o_proj(attention(qkv_proj(X)));  Y = h + down_proj(act(gate) * up of gate_up_proj(h))
//
// A token's loops are of a few dozen microseconds each: in one node the threads stay together for
// all of them (team.h), and little is left for the runtime to do between nodes.
//
// Inputs      X float (B, T, hidden_size); past_key, past_value, seqlens_k, total_sequence_length,
//             frequencies, q_norm and k_norm as of Attention; then constants, of qkv_proj, o_proj,
//             gate_up_proj and down_proj in turn: W, scale (the rows of one are N / its count),
//             norm_weight (optional) and bias (optional) as of TernaryLinear
// Outputs     Y float (B, T, hidden_size), present_key, present_value
// Attributes  those of Attention; hidden_size, intermediate_size, head_size; layout,
//             activation_bits, activation; epsilon of the norms before qkv_proj and gate_up_proj
//             (and of queries and keys), added_epsilon of those before o_proj and down_proj
#include <stdio.h>

#include <initializer_list>

#include "ort_layer.h"

namespace bitdistill {
namespace {

constexpr const char *kName = "DecoderLayer";
constexpr const char *kPartNames[kParts] = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"};
constexpr size_t kInputs = kOwnInputs + kParts * kPerPart;

struct Size {
  int64_t rows, columns;
};

Size size_of(const LayerNode &k, size_t part) {
  const int64_t heads = k.attention.heads, keys = k.attention.kv_heads;
  switch (part) {
    case kQkv:
      return {(heads + 2 * keys) * k.head, k.hidden};
    case kOutput:
      return {k.hidden, heads * k.head};
    case kGateUp:
      return {2 * k.wide, k.hidden};
    default:
      return {k.hidden, k.wide};
  }
}

// A matrix of the layer: as a TernaryLinear's, but its sizes are the layer's.
ort::Status *read_part(LayerNode *k, const ort::KernelInfo *info, size_t part, float epsilon) {
  TernaryNode *t = &k->parts[part];
  t->api = k->api, t->kernels = k->kernels, t->epsilon = epsilon;
  snprintf(t->name, sizeof t->name, "%.120s %s", k->name, kPartNames[part]);
  const Size size = size_of(*k, part);
  t->rows = size.rows, t->columns = size.columns;
  BD_TRY(read_form(t, info));
  const size_t base = kOwnInputs + part * kPerPart - kW;
  Tensor scale;
  BD_TRY(read_constant(k->api, info, base + kScale, &scale));
  const int64_t count = scale.present && scale.rank == 1 ? scale.dims[0] : 0;
  t->scale_rows = count > 0 && t->rows % count == 0 ? t->rows / count : 1;
  BD_TRY(check_sizes(*t));
  for (size_t input = kW; input < kTernaryConstants; ++input)
    BD_TRY(keep_constant(t, info, base + input, input));
  if (!t->constants[kW].present || !t->constants[kScale].present)
    return refuse(k->api, "%s: W and scale must be constant; export the model again", t->name);
  if (t->constants[kNorm].present && !(epsilon >= 0))
    return refuse(k->api, "%s: its norm needs an epsilon >= 0, got %g; export the model again",
                  t->name, static_cast<double>(epsilon));
  return part == kDown ? read_activation(t, info) : nullptr;
}

ort::Status *make(LayerNode *k, const ort::KernelInfo *info, const char *op) {
  AttentionNode *a = &k->attention;
  a->api = k->api, a->kernels = k->kernels, a->in_layer = true;
  read_name(k->api, info, op, k->name);
  read_name(k->api, info, op, a->name);
  BD_TRY(read_node(a, info));
  BD_TRY(read_int(k->api, info, k->name, "hidden_size", &k->hidden));
  BD_TRY(read_int(k->api, info, k->name, "intermediate_size", &k->wide));
  BD_TRY(read_int(k->api, info, k->name, "head_size", &k->head));
  for (const int64_t size : {k->hidden, k->wide, k->head, a->heads, a->kv_heads})
    if (size < 1 || size > BD_MAX_COLUMNS)
      return refuse(k->api, "%s: a size of %lld is not that of a model; export it again", k->name,
                    static_cast<long long>(size));
  float added = 0;
  BD_TRY(read_float(k->api, info, k->name, "added_epsilon", &added));
  for (size_t part = 0; part < kParts; ++part)
    BD_TRY(read_part(k, info, part, part == kQkv || part == kGateUp ? a->epsilon : added));
  if (k->parts[kDown].activation == 0)
    return refuse(k->api, "%s: the attribute activation is missing; export the model again",
                  k->name);
  return nullptr;
}

ort::Status *compute(void *kernel, ort::KernelContext *context) noexcept {
  return run_layer(*static_cast<const LayerNode *>(kernel), context);
}

ort::Status *infer(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  const ort::Api *api = static_cast<const Op *>(op)->api;
  int64_t hidden = 0;
  BD_TRY(infer_int(api, context, "hidden_size", &hidden));
  return infer_output(api, context, 1, hidden);
}

template <ort::ElementType Type>
ort::ElementType input_type(const ort::CustomOp *, size_t index) {
  if (index == 0) return ort::kFloat;
  if (index < kOwnInputs) return attention_input_type(index + (kPastKey - 1), Type);
  return (index - kOwnInputs) % kPerPart == 0 ? ort::kUint8 : ort::kFloat;
}

ort::Characteristic characteristic(const ort::CustomOp *, size_t index) {
  const size_t input = index < kOwnInputs ? index + (kPastKey - 1) : 0;
  const bool norm = input == kQNorm || input == kKNorm;
  return norm || (index >= kOwnInputs && (index - kOwnInputs) % kPerPart >= kNorm - kW)
             ? ort::kOptional
             : ort::kRequired;
}

template <ort::ElementType Type>
void fill(Op *op, const ort::Api *api) {
  fill_common(op, api);
  op->GetName = [](const ort::CustomOp *) { return kName; };
  op->GetInputTypeCount = [](const ort::CustomOp *) -> size_t { return kInputs; };
  op->GetInputCharacteristic = characteristic;
  op->GetInputType = input_type<Type>;
  op->GetOutputTypeCount = [](const ort::CustomOp *) -> size_t { return kAttentionOutputs; };
  op->GetOutputType = attention_output_type<Type>;
  op->KernelComputeV2 = compute;
  fill_node<LayerNode, make>(op);
  op->InferOutputShape = infer_shapes<infer>;
}

}  // namespace

void fill_layer(Op (&ops)[3], const ort::Api *api) {
  fill<ort::kFloat>(&ops[0], api);
  fill<ort::kFloat16>(&ops[1], api);
  fill<ort::kInt8>(&ops[2], api);
}

}  // namespace bitdistill
