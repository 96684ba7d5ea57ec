// TernaryLinear: Y = ternary(quantize(norm(X))) as bitdistill_kernels.h specifies; with
// `activation` of act(gate) * up in the place of X, and with `residual` added to Y last.
//
// Inputs      X float (..., K), or with `activation` (..., 2 K): gate and up side by side;
//             W uint8 (ceil(N/32), ceil(K/16), 32, 4) in layout 1,
//             (ceil(N/32), ceil(K/20), 32, 4) in layout 2, five trits a byte;
//             scale float (N / scale_rows), one for every scale_rows rows in turn;
//             norm_weight float (K), optional; bias float (N), optional;
//             up float (..., K), optional: X is then the gate alone;
//             residual float (..., N), optional
// Attributes  N, K, scale_rows (divides N), layout (1 or 2), activation_bits (8, or 0 in
//             layout 1), epsilon (needed with norm_weight), activation ("silu" or "gelu_tanh",
//             optional)
#include "ort_ternary.h"

#include <math.h>
#include <string.h>

namespace bitdistill {
namespace {

Expected expected(const TernaryNode &k, size_t input) {
  const int64_t width = k.base3 ? BD_BASE3_COLUMNS : BD_BLOCK_COLUMNS;
  const int64_t groups = (k.columns + width - 1) / width;
  switch (input) {
    case kW:
      return {"W", ort::kUint8, 4, {bd_blocks(k.rows), groups, BD_BLOCK_ROWS, 4}};
    case kScale:
      return {"scale", ort::kFloat, 1, {k.rows / k.scale_rows}};
    case kNorm:
      return {"norm_weight", ort::kFloat, 1, {k.columns}};
    default:
      return {"bias", ort::kFloat, 1, {k.rows}};
  }
}

ort::Status *read_attributes(TernaryNode *k, const ort::KernelInfo *info) {
  BD_TRY(read_int(k->api, info, k->name, "N", &k->rows));
  BD_TRY(read_int(k->api, info, k->name, "K", &k->columns));
  BD_TRY(read_int(k->api, info, k->name, "scale_rows", &k->scale_rows));
  BD_TRY(read_form(k, info));
  BD_TRY(check_sizes(*k));
  BD_TRY(read_activation(k->api, k->name, info, &k->activation));
  ort::Status *status = k->api->KernelInfoGetAttribute_float(info, "epsilon", &k->epsilon);
  if (status != nullptr) {
    k->api->ReleaseStatus(status);
    k->epsilon = NAN;
  }
  return nullptr;
}

ort::Status *check_codes(const TernaryNode &k, const uint8_t *packed) {
  const int64_t bytes = (k.base3 ? bd_base3_bytes : bd_packed_bytes)(k.rows, k.columns);
  if ((k.base3 ? bd_has_no_trits : bd_has_code_3)(packed, static_cast<size_t>(bytes)) == 0)
    return nullptr;
  return refuse(k.api, "%s: W holds %s, so it is not a packed ternary matrix; %s", k.name,
                k.base3 ? "a byte without five trits" : "the code 3",
                "the file is damaged: export the model again");
}

ort::Status *make(TernaryNode *k, const ort::KernelInfo *info, const char *op) {
  read_name(k->api, info, op, k->name);
  BD_TRY(read_attributes(k, info));
  for (size_t input = kW; input < kTernaryConstants; ++input)
    BD_TRY(keep_constant(k, info, input, input));
  return nullptr;
}

ort::Status *compute(void *kernel, ort::KernelContext *context) noexcept {
  return run_ternary(*static_cast<const TernaryNode *>(kernel), context);
}

ort::Status *infer(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  const ort::Api *api = static_cast<const Op *>(op)->api;
  int64_t rows = 0;
  BD_TRY(infer_int(api, context, "N", &rows));
  return infer_output(api, context, 1, rows);
}

const char *name(const ort::CustomOp *) { return "TernaryLinear"; }
size_t input_count(const ort::CustomOp *) { return kTernaryInputs; }

ort::ElementType input_type(const ort::CustomOp *, size_t index) {
  return index == kW ? ort::kUint8 : ort::kFloat;
}

ort::Characteristic characteristic(const ort::CustomOp *, size_t index) {
  return index >= kNorm ? ort::kOptional : ort::kRequired;
}

}  // namespace

ort::Status *read_form(TernaryNode *k, const ort::KernelInfo *info) {
  int64_t layout = 0;
  int64_t bits = 0;
  BD_TRY(read_int(k->api, info, k->name, "layout", &layout));
  BD_TRY(read_int(k->api, info, k->name, "activation_bits", &bits));
  k->base3 = layout == BD_BASE3_LAYOUT_VERSION;
  if (layout != BD_LAYOUT_VERSION && !k->base3)
    return refuse(k->api,
                  "%s: weight layout %lld is not known here (this library reads %d, %d); %s",
                  k->name, static_cast<long long>(layout), BD_LAYOUT_VERSION,
                  BD_BASE3_LAYOUT_VERSION, "export the model again or install a newer bitdistill");
  if (bits != 8 && bits != 0)
    return refuse(k->api, "%s: activation_bits must be 8 or 0, got %lld", k->name,
                  static_cast<long long>(bits));
  if (k->base3 && bits == 0)
    return refuse(k->api, "%s: weight layout 2 needs activation_bits 8; %s", k->name,
                  "export the model again with 2 bits a weight");
  k->bits = static_cast<int>(bits);
  return nullptr;
}

ort::Status *check_sizes(const TernaryNode &k) {
  if (k.columns < 1 || k.columns > BD_MAX_COLUMNS || k.rows < 1 || k.rows > INT32_MAX)
    return refuse(k.api, "%s: N = %lld, K = %lld is out of range (K at most %d)", k.name,
                  static_cast<long long>(k.rows), static_cast<long long>(k.columns),
                  BD_MAX_COLUMNS);
  if (k.scale_rows < 1 || k.rows % k.scale_rows != 0)
    return refuse(k.api, "%s: scale_rows = %lld must be at least 1 and divide N = %lld", k.name,
                  static_cast<long long>(k.scale_rows), static_cast<long long>(k.rows));
  return nullptr;
}

ort::Status *read_activation(const ort::Api *api, const char *name, const ort::KernelInfo *info,
                             int *activation) {
  char text[32] = "";
  size_t size = sizeof text;
  ort::Status *status = api->KernelInfoGetAttribute_string(info, "activation", text, &size);
  if (status != nullptr) {
    api->ReleaseStatus(status);
    if (size == sizeof text) return nullptr;  // absent: a text too long would have set its size
  }
  *activation = strcmp(text, "silu") == 0        ? BD_SILU
                : strcmp(text, "gelu_tanh") == 0 ? BD_GELU_TANH
                                                 : 0;
  if (*activation != 0) return nullptr;
  return refuse(api, "%s: activation must be silu or gelu_tanh, got '%s'; %s", name, text,
                "export the model again or install a newer bitdistill");
}

ort::Status *keep_constant(TernaryNode *k, const ort::KernelInfo *info, size_t index,
                           size_t input) {
  Tensor tensor;
  BD_TRY(read_constant(k->api, info, index, &tensor));
  if (!tensor.present) return nullptr;
  BD_TRY(check_constant(*k, input, tensor));
  if (input == kW) BD_TRY(check_codes(*k, static_cast<const uint8_t *>(tensor.data)));
  k->constants[input] = tensor;  // the runtime keeps it where it is for as long as the kernel
  return nullptr;
}

ort::Status *check_constant(const TernaryNode &k, size_t input, const Tensor &tensor) {
  BD_TRY(check_tensor(k.api, k.name, tensor, expected(k, input)));
  if (input != kScale) return nullptr;
  return check_scales(k.api, k.name, tensor.floats(), k.rows / k.scale_rows);
}

void fill_ternary(Op *op, const ort::Api *api) {
  fill_common(op, api);
  op->GetName = name;
  op->GetInputTypeCount = input_count;
  op->GetInputType = input_type;
  op->GetInputCharacteristic = characteristic;
  op->KernelComputeV2 = compute;
  fill_node<TernaryNode, make>(op);
  op->InferOutputShape = infer_shapes<infer>;
}

}  // namespace bitdistill
