// TernaryLinear: Y = ternary(quantize(norm(X))) as bitdistill_kernels.h specifies.
//
// Inputs      X float (..., K); W uint8 (ceil(N/32), ceil(K/16), 32, 4) in layout 1,
//             (ceil(N/32), ceil(K/20), 32, 4) in layout 2, five trits a byte;
//             scale float (N / scale_rows), one for every scale_rows rows in turn;
//             norm_weight float (K), optional; bias float (N), optional
// Attributes  N, K, scale_rows (divides N), layout (1 or 2), activation_bits (8, or 0 in
//             layout 1), epsilon (needed with norm_weight)
//
// A model stores one scale a matrix; the kernels take one a row. Where W and scale are constant the
// scales are expanded once, when the session is made.
#include <math.h>
#include <memory>
#include <new>
#include <thread>

#include "ort_support.h"
#include "split.h"

namespace bitdistill {
namespace {

enum Input : size_t { kX, kW, kScale, kNorm, kBias, kInputs };

constexpr int64_t kFewTokens = 8;  // below, small tasks of rows; from here on, large ones

struct Kernel {
  const ort::Api *api;
  const BdKernels *kernels;
  int64_t rows;
  int64_t columns;
  int64_t scale_rows;
  bool base3;
  int bits;
  float epsilon;  // NaN: not given
  bool checked[kInputs];
  std::unique_ptr<float[]> row_scales;  // (rows); null: expanded for each call
  char name[kNameSize];                 // "TernaryLinear 'node name'"
};

Expected expected(const Kernel &k, size_t input) {
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

ort::Status *read_attributes(Kernel *k, const ort::KernelInfo *info) {
  int64_t layout = 0;
  int64_t bits = 0;
  BD_TRY(read_int(k->api, info, k->name, "N", &k->rows));
  BD_TRY(read_int(k->api, info, k->name, "K", &k->columns));
  BD_TRY(read_int(k->api, info, k->name, "scale_rows", &k->scale_rows));
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
  if (k->columns < 1 || k->columns > BD_MAX_COLUMNS || k->rows < 1 || k->rows > INT32_MAX)
    return refuse(k->api, "%s: N = %lld, K = %lld is out of range (K at most %d)", k->name,
                  static_cast<long long>(k->rows), static_cast<long long>(k->columns),
                  BD_MAX_COLUMNS);
  if (k->scale_rows < 1 || k->rows % k->scale_rows != 0)
    return refuse(k->api, "%s: scale_rows = %lld must be at least 1 and divide N = %lld", k->name,
                  static_cast<long long>(k->scale_rows), static_cast<long long>(k->rows));
  k->bits = static_cast<int>(bits);
  ort::Status *status = k->api->KernelInfoGetAttribute_float(info, "epsilon", &k->epsilon);
  if (status != nullptr) {
    k->api->ReleaseStatus(status);
    k->epsilon = NAN;
  }
  return nullptr;
}

// (rows / scale_rows) -> (rows).
void expand_scales(const Kernel &k, const float *scale, float *out) {
  for (int64_t n = 0; n < k.rows; ++n) out[n] = scale[n / k.scale_rows];
}

// Expands constant scales once. Not before W was checked: a row of W takes as much memory as a
// scale or more, so a false N cannot ask for memory that the file does not.
ort::Status *keep_scales(Kernel *k, const ort::KernelInfo *info) {
  if (!k->checked[kW] || !k->checked[kScale]) return nullptr;
  Tensor scale;
  BD_TRY(read_constant(k->api, info, kScale, &scale));
  k->row_scales.reset(new (std::nothrow) float[static_cast<size_t>(k->rows)]);
  if (k->row_scales == nullptr) return refuse(k->api, "%s: out of memory", k->name);
  expand_scales(*k, scale.floats(), k->row_scales.get());
  return nullptr;
}

// Every check of one tensor but the codes, which cost a pass over the weights.
ort::Status *check_input(const Kernel &k, size_t input, const Tensor &tensor) {
  BD_TRY(check_tensor(k.api, k.name, tensor, expected(k, input)));
  if (input != kScale) return nullptr;
  return check_scales(k.api, k.name, tensor.floats(), k.rows / k.scale_rows);
}

ort::Status *check_codes(const Kernel &k, const uint8_t *packed) {
  const int64_t bytes = (k.base3 ? bd_base3_bytes : bd_packed_bytes)(k.rows, k.columns);
  if ((k.base3 ? bd_has_no_trits : bd_has_code_3)(packed, static_cast<size_t>(bytes)) == 0)
    return nullptr;
  return refuse(k.api, "%s: W holds %s, so it is not a packed ternary matrix; %s", k.name,
                k.base3 ? "a byte without five trits" : "the code 3",
                "the file is damaged: export the model again");
}

ort::Status *check_constants(Kernel *k, const ort::KernelInfo *info) {
  for (size_t input = kW; input < kInputs; ++input) {
    Tensor tensor;
    BD_TRY(read_constant(k->api, info, input, &tensor));
    if (!tensor.present) continue;
    BD_TRY(check_input(*k, input, tensor));
    if (input == kW) BD_TRY(check_codes(*k, static_cast<const uint8_t *>(tensor.data)));
    k->checked[input] = true;
  }
  return nullptr;
}

ort::Status *make(Kernel *k, const ort::KernelInfo *info) {
  k->kernels = bd_kernels(nullptr);
  if (k->kernels == nullptr) return refuse(k->api, "%s", bd_kernels_error(nullptr));
  read_name(k->api, info, "TernaryLinear", k->name);
  BD_TRY(read_attributes(k, info));
  BD_TRY(check_constants(k, info));
  return keep_scales(k, info);
}

ort::Status *create(const ort::CustomOp *, const ort::Api *api, const ort::KernelInfo *info,
                    void **out) noexcept {
  Kernel *k = new (std::nothrow) Kernel();
  if (k == nullptr) return refuse(api, "TernaryLinear: out of memory");
  k->api = api;
  ort::Status *status = make(k, info);
  if (status != nullptr)
    delete k;
  else
    *out = k;
  return status;
}

void destroy(void *kernel) noexcept { delete static_cast<Kernel *>(kernel); }

// Reads inputs 1 and later, checking those that were not constant when the session was made.
ort::Status *read_inputs(const Kernel &k, const ort::KernelContext *context, Tensor *inputs) {
  for (size_t input = kW; input < kInputs; ++input) {
    BD_TRY(read_input(k.api, context, input, &inputs[input]));
    if (k.checked[input] || (input >= kNorm && !inputs[input].present)) continue;
    BD_TRY(check_input(k, input, inputs[input]));
  }
  if (inputs[kNorm].present && !(k.epsilon >= 0))
    return refuse(k.api, "%s: norm_weight needs the attribute epsilon, >= 0", k.name);
  return nullptr;
}

// The runtime does not tell how many threads it has: as many as there are processors, or fewer.
int64_t processors() {
  static const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int64_t>(count) : 1;
}

ort::Status *run(const Kernel &k, const ort::KernelContext *context, const BdTernary &w,
                 const BdInput &in, float *y) {
  const Scratch scratch(bd_scratch_bytes(in.tokens, in.columns, k.bits));
  if (scratch.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  const BdTokens tokens = bd_tokens(scratch.data(), in.tokens, in.columns, k.bits);
  const auto prepare = k.bits == 0 ? k.kernels->normalize : k.kernels->quantize;
  const auto multiply = k.bits == 0 ? k.kernels->ternary_float
                        : k.base3   ? k.kernels->ternary_base3
                                    : k.kernels->ternary;

  const double columns = static_cast<double>(in.columns);
  BD_TRY(parallel(k.api, context, in.tokens, chunk_of(columns * 0.3),
                  [&](int64_t a, int64_t b) { prepare(&in, &tokens, a, b); }));
  const int64_t blocks = bd_blocks(w.rows);
  if (in.tokens < kFewTokens) {
    // Of a block of 32 rows: 8 bytes a column from memory, 64 operations a column and token.
    const double block = columns * (0.7 + 0.25 * static_cast<double>(in.tokens));
    return parallel(k.api, context, blocks, chunk_of(block),
                    [&](int64_t a, int64_t b) { multiply(&w, &tokens, y, a, b); });
  }
  const bool by_tokens = k.kernels->by_tokens != 0 && multiply == k.kernels->ternary;
  const Split split(in.tokens, blocks, 2 * processors(), by_tokens);
  return parallel(k.api, context, split.parts(), 1, [&](int64_t a, int64_t b) {
    for (int64_t part = a; part < b; ++part) split.run(multiply, part, w, tokens, y);
  });
}

// As `run`, of scales that are inputs: expanded into memory of this call, which may be one of many.
ort::Status *run_expanded(const Kernel &k, const ort::KernelContext *context, BdTernary w,
                          const BdInput &in, float *y) {
  const Scratch scales(static_cast<size_t>(k.rows) * sizeof(float));
  if (scales.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  expand_scales(k, w.scale, static_cast<float *>(scales.data()));
  w.scale = static_cast<const float *>(scales.data());
  return run(k, context, w, in, y);
}

ort::Status *compute(void *kernel, ort::KernelContext *context) noexcept {
  const Kernel &k = *static_cast<const Kernel *>(kernel);
  Tensor inputs[kInputs];
  BD_TRY(read_input(k.api, context, kX, &inputs[kX]));
  int64_t tokens = 0;
  BD_TRY(check_activations(k.api, k.name, inputs[kX], k.columns, &tokens));
  BD_TRY(read_inputs(k, context, inputs));
  float *y = nullptr;
  BD_TRY(make_output(k.api, context, inputs[kX], inputs[kX].rank - 1, k.rows, &y));
  if (tokens == 0) return nullptr;
  const bool kept = k.row_scales != nullptr;
  const BdTernary w = {static_cast<const uint8_t *>(inputs[kW].data),
                       kept ? k.row_scales.get() : inputs[kScale].floats(), inputs[kBias].floats(),
                       k.rows, k.columns};
  const BdInput in = {inputs[kX].floats(), inputs[kNorm].floats(), k.epsilon, tokens, k.columns};
  return kept ? run(k, context, w, in, y) : run_expanded(k, context, w, in, y);
}

ort::Status *infer(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  const ort::Api *api = static_cast<const Op *>(op)->api;
  int64_t rows = 0;
  BD_TRY(infer_int(api, context, "N", &rows));
  return infer_output(api, context, 1, rows);
}

const char *name(const ort::CustomOp *) { return "TernaryLinear"; }
size_t input_count(const ort::CustomOp *) { return kInputs; }

ort::ElementType input_type(const ort::CustomOp *, size_t index) {
  return index == kW ? ort::kUint8 : ort::kFloat;
}

ort::Characteristic characteristic(const ort::CustomOp *, size_t index) {
  return index >= kNorm ? ort::kOptional : ort::kRequired;
}

}  // namespace

void fill_ternary(Op *op, const ort::Api *api) {
  fill_common(op, api);
  op->GetName = name;
  op->GetInputTypeCount = input_count;
  op->GetInputType = input_type;
  op->GetInputCharacteristic = characteristic;
  op->CreateKernelV2 = create;
  op->KernelComputeV2 = compute;
  op->KernelDestroy = destroy;
  op->InferOutputShape = infer;
}

}  // namespace bitdistill
