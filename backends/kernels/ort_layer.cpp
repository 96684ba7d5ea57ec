// DecoderLayer: one pre-norm decoder layer of an LLM, the ternary products, attention and residuals
// of which are those of TernaryLinear and Attention:
//
//   h = X + o_proj(attention(qkv_proj(X)));  Y = h + down_proj(act(gate) * up of gate_up_proj(h))
//
// A token's loops are of a few dozen microseconds each: in one node the threads stay together for
// all of them (team.h), and little is left for the runtime to do between nodes.
//
// Inputs      X float (B, T, hidden_size); past_key, past_value, seqlens_k, total_sequence_length,
//             frequencies, q_norm and k_norm as of Attention; then constants: scale float, of the
//             rows of qkv_proj (one for those of each key head's worth of rows), o_proj (one),
//             gate_up_proj (two) and down_proj (one); and of these four in turn W, norm_weight
//             (optional) and bias (optional) as of TernaryLinear
// Outputs     Y float (B, T, hidden_size), present_key, present_value
// Attributes  those of Attention; hidden_size, intermediate_size, head_size; layout,
//             activation_bits, activation; epsilon of the norms before qkv_proj and gate_up_proj
//             (and of queries and keys), added_epsilon of those before o_proj and down_proj.
//             intermediate_size is a multiple of 32, the rows of a block.
#include <stdio.h>

#include <initializer_list>

#include "ort_layer.h"

namespace bitdistill {
namespace {

constexpr const char *kName = "DecoderLayer";
constexpr const char *kPartNames[kParts] = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"};
constexpr size_t kInputs = kScales + 1 + kParts * kPartInputs;

struct Size {
  int64_t rows, columns, scales;
};

Size size_of(const LayerNode &k, size_t part) {
  const int64_t heads = k.attention.heads, keys = k.attention.kv_heads;
  switch (part) {
    case kQkv:
      return {(heads + 2 * keys) * k.head, k.hidden, heads / keys + 2};
    case kOutput:
      return {k.hidden, heads * k.head, 1};
    case kGateUp:
      return {2 * k.wide, k.hidden, 2};
    default:
      return {k.hidden, k.wide, 1};
  }
}

// A matrix of the layer, but for its constants.
ort::Status *size_part(LayerNode *k, const ort::KernelInfo *info, size_t part, float epsilon) {
  TernaryNode *t = &k->parts[part];
  t->api = k->api, t->kernels = k->kernels, t->epsilon = epsilon;
  snprintf(t->name, sizeof t->name, "%.120s %s", k->name, kPartNames[part]);
  const Size size = size_of(*k, part);
  t->rows = size.rows, t->columns = size.columns, t->scale_rows = size.rows / size.scales;
  BD_TRY(read_form(t, info));
  return check_sizes(*t);
}

// The scales of all matrices.
ort::Status *read_scales(const LayerNode &k, const ort::KernelInfo *info, Tensor *out) {
  BD_TRY(read_constant(k.api, info, kScales, out));
  if (!out->present)
    return refuse(k.api, "%s: scale must be constant; export the model again", k.name);
  Expected expected = {"scale", ort::kFloat, 1, {0}};
  for (size_t part = 0; part < kParts; ++part) expected.dims[0] += size_of(k, part).scales;
  BD_TRY(check_tensor(k.api, k.name, *out, expected));
  return check_scales(k.api, k.name, out->floats(), expected.dims[0]);
}

// The constants of a matrix: as a TernaryLinear's, but its scales are the next of `scales`.
ort::Status *read_part(LayerNode *k, const ort::KernelInfo *info, size_t part,
                       const float **scales) {
  TernaryNode *t = &k->parts[part];
  t->constants[kScale].data = *scales;
  *scales += size_of(*k, part).scales;
  BD_TRY(keep_constant(t, info, place_of(part, kPartW), kW));
  BD_TRY(keep_constant(t, info, place_of(part, kPartNorm), kNorm));
  BD_TRY(keep_constant(t, info, place_of(part, kPartBias), kBias));
  if (!t->constants[kW].present)
    return refuse(k->api, "%s: W must be constant; export the model again", t->name);
  if (t->constants[kNorm].present && !(t->epsilon >= 0))
    return refuse(k->api, "%s: its norm needs an epsilon >= 0, got %g; export the model again",
                  t->name, static_cast<double>(t->epsilon));
  return nullptr;
}

// Of gate and up each is multiplied by itself, so that the one is activated where the other lands.
ort::Status *read_gate(LayerNode *k, const ort::KernelInfo *info) {
  BD_TRY(read_activation(k->api, k->name, info, &k->activation));
  if (k->activation == 0)
    return refuse(k->api, "%s: the attribute activation is missing; export the model again",
                  k->name);
  if (k->wide % BD_BLOCK_ROWS != 0)
    return refuse(k->api, "%s: intermediate_size = %lld must be a multiple of %d", k->name,
                  static_cast<long long>(k->wide), BD_BLOCK_ROWS);
  return nullptr;
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
    BD_TRY(size_part(k, info, part, part == kQkv || part == kGateUp ? a->epsilon : added));
  BD_TRY(read_gate(k, info));
  Tensor scales;
  BD_TRY(read_scales(*k, info, &scales));
  const float *next = scales.floats();
  for (size_t part = 0; part < kParts; ++part) BD_TRY(read_part(k, info, part, &next));
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

// Which one of its matrix an input behind the scales is.
size_t part_input(size_t index) { return (index - kScales - 1) % kPartInputs; }

template <ort::ElementType Type>
ort::ElementType input_type(const ort::CustomOp *, size_t index) {
  if (index == 0) return ort::kFloat;
  if (index < kScales) return attention_input_type(index + (kPastKey - 1), Type);
  return index > kScales && part_input(index) == kPartW ? ort::kUint8 : ort::kFloat;
}

ort::Characteristic characteristic(const ort::CustomOp *, size_t index) {
  const size_t input = index < kScales ? index + (kPastKey - 1) : 0;
  const bool norm = input == kQNorm || input == kKNorm;
  return norm || (index > kScales && part_input(index) != kPartW) ? ort::kOptional : ort::kRequired;
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
  // Y may lie where X does, whose sums with o_proj's products it holds first.
  op->GetMayInplace = [](int **inputs, int **outputs) -> size_t {
    static int first = 0;
    *inputs = *outputs = &first;
    return 1;
  };
  op->ReleaseMayInplace = [](int *, int *) {};
}

}  // namespace

void fill_layer(Op (&ops)[3], const ort::Api *api) {
  fill<ort::kFloat>(&ops[0], api);
  fill<ort::kFloat16>(&ops[1], api);
  fill<ort::kInt8>(&ops[2], api);
}

}  // namespace bitdistill
