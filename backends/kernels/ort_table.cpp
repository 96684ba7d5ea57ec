// QuantizedHead: Y = X . W^T, and QuantizedEmbedding: Y = rows of W, of one quantised table.
//
// Inputs      X float (..., K) | ids int64 (...), each in 0 .. N - 1;
//             W uint8: (N, K) at 8 bits, (ceil(N/16), ceil(K/32), 4, 16, 4) at 4;
//             scale float (N); group_scale int8 (ceil(N/16), ceil(K/32), 16), at 4 bits alone
// Attributes  N, K, bits (8 or 4)
#include <algorithm>

#include "ort_support.h"
#include "work_memory.h"

namespace bitdistill {
namespace {

enum Input : size_t { kX, kW, kScale, kGroupScale, kInputs };

constexpr const char *kHead = "QuantizedHead";
constexpr const char *kEmbedding = "QuantizedEmbedding";

struct Kernel {
  const ort::Api *api;
  const BdKernels *kernels;
  int64_t rows;
  int64_t columns;
  int64_t bits;
  bool checked[kInputs];
  char name[kNameSize];
};

Expected expected(const Kernel &k, size_t input) {
  const int64_t blocks = bd_table_blocks(k.rows);
  const int64_t groups = (k.columns + BD_TABLE_COLUMNS - 1) / BD_TABLE_COLUMNS;
  if (input == kScale) return {"scale", ort::kFloat, 1, {k.rows}};
  if (input == kGroupScale) return {"group_scale", ort::kInt8, 3, {blocks, groups, BD_TABLE_ROWS}};
  if (k.bits == 8) return {"W", ort::kUint8, 2, {k.rows, k.columns}};
  return {"W", ort::kUint8, 5, {blocks, groups, 4, BD_TABLE_ROWS, 4}};
}

ort::Status *check_input(const Kernel &k, size_t input, const Tensor &tensor) {
  if (input == kGroupScale && k.bits == 8) {
    if (!tensor.present) return nullptr;
    return refuse(k.api, "%s: a table of 8 bits has no group_scale; export the model again",
                  k.name);
  }
  BD_TRY(check_tensor(k.api, k.name, tensor, expected(k, input)));
  return input == kScale ? check_scales(k.api, k.name, tensor.floats(), k.rows) : nullptr;
}

ort::Status *read_attributes(Kernel *k, const ort::KernelInfo *info) {
  BD_TRY(read_int(k->api, info, k->name, "N", &k->rows));
  BD_TRY(read_int(k->api, info, k->name, "K", &k->columns));
  BD_TRY(read_int(k->api, info, k->name, "bits", &k->bits));
  if (k->bits != 8 && k->bits != 4)
    return refuse(k->api, "%s: bits must be 8 or 4, got %lld", k->name,
                  static_cast<long long>(k->bits));
  if (k->columns < 1 || k->columns > BD_MAX_TABLE_COLUMNS || k->rows < 1 || k->rows > INT32_MAX)
    return refuse(k->api, "%s: N = %lld, K = %lld is out of range (K at most %d)", k->name,
                  static_cast<long long>(k->rows), static_cast<long long>(k->columns),
                  BD_MAX_TABLE_COLUMNS);
  return nullptr;
}

ort::Status *make(Kernel *k, const ort::KernelInfo *info, const char *op) {
  read_name(k->api, info, op, k->name);
  BD_TRY(read_attributes(k, info));
  for (size_t input = kW; input < kInputs; ++input) {
    Tensor tensor;
    BD_TRY(read_constant(k->api, info, input, &tensor));
    if (!tensor.present) continue;
    BD_TRY(check_input(*k, input, tensor));
    k->checked[input] = true;
  }
  return nullptr;
}

ort::Status *read_table(const Kernel &k, const ort::KernelContext *context, BdTable *out) {
  Tensor inputs[kInputs];
  for (size_t input = kW; input < kInputs; ++input) {
    BD_TRY(read_input(k.api, context, input, &inputs[input]));
    if (!k.checked[input]) BD_TRY(check_input(k, input, inputs[input]));
  }
  *out = {static_cast<const uint8_t *>(inputs[kW].data),
          static_cast<const int8_t *>(inputs[kGroupScale].data), inputs[kScale].floats(), k.rows,
          k.columns};
  return nullptr;
}

ort::Status *run_head(const Kernel &k, const ort::KernelContext *context, const BdTable &w,
                      const float *x, int64_t tokens, float *y) {
  const int bits = static_cast<int>(k.bits);
  Scratch::release();
  const Scratch scratch(bd_head_scratch_bytes(tokens, w.columns, bits));
  if (scratch.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  const BdHeadTokens in = bd_head_tokens(scratch.data(), tokens, w.columns, bits);
  const double columns = static_cast<double>(w.columns);
  BD_TRY(parallel({k.api, context}, tokens, chunk_of(columns * 2),
                  [&](int64_t a, int64_t b) { bd_head_quantize(x, &in, a, b); }));
  // As in HeadLinear, a quarter of a row's time.
  const double row = columns * (0.01 + 0.01 * static_cast<double>(tokens));
  const auto product = k.bits == 8 ? k.kernels->head->int8 : k.kernels->head->int4;
  const int64_t units = k.bits == 8 ? w.rows : bd_table_blocks(w.rows);
  const int64_t chunk = chunk_of(k.bits == 8 ? row : row * BD_TABLE_ROWS);
  return parallel({k.api, context}, units, std::max(chunk, share_of(units, 4)),
                  [&](int64_t a, int64_t b) {
                    release_work_memory();
                    product(&w, &in, y, a, b);
                  });
}

ort::Status *compute_head(void *kernel, ort::KernelContext *context) noexcept {
  const Kernel &k = *static_cast<const Kernel *>(kernel);
  BdTable w;
  Tensor x;
  BD_TRY(read_table(k, context, &w));
  BD_TRY(read_input(k.api, context, kX, &x));
  int64_t tokens = 0;
  BD_TRY(check_activations(k.api, k.name, x, "K", k.columns, &tokens));
  float *y = nullptr;
  BD_TRY(make_output(k.api, context, x, x.rank - 1, k.rows, &y));
  return tokens == 0 ? nullptr : run_head(k, context, w, x.floats(), tokens, y);
}

ort::Status *check_ids(const Kernel &k, const Tensor &ids, int64_t *count) {
  BD_TRY(check_tensor(k.api, k.name, ids, {"ids", ort::kInt64, 0, {}}));
  *count = 1;
  for (size_t i = 0; i < ids.rank; ++i) *count *= ids.dims[i];
  const int64_t *id = static_cast<const int64_t *>(ids.data);
  for (int64_t i = 0; i < *count; ++i)
    if (id[i] < 0 || id[i] >= k.rows)
      return refuse(k.api, "%s: id %lld is not in 0 .. %lld", k.name, static_cast<long long>(id[i]),
                    static_cast<long long>(k.rows - 1));
  return nullptr;
}

ort::Status *compute_embedding(void *kernel, ort::KernelContext *context) noexcept {
  const Kernel &k = *static_cast<const Kernel *>(kernel);
  BdTable w;
  Tensor ids;
  BD_TRY(read_table(k, context, &w));
  BD_TRY(read_input(k.api, context, kX, &ids));
  int64_t count = 0;
  BD_TRY(check_ids(k, ids, &count));
  float *y = nullptr;
  BD_TRY(make_output(k.api, context, ids, ids.rank, k.columns, &y));
  const int64_t *id = static_cast<const int64_t *>(ids.data);
  const auto gather = k.bits == 8 ? bd_gather_int8 : bd_gather_int4;
  return parallel({k.api, context}, count, chunk_of(static_cast<double>(k.columns)),
                  [&](int64_t a, int64_t b) { gather(&w, id + a, b - a, y + a * k.columns); });
}

ort::Status *infer_head(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  const ort::Api *api = static_cast<const Op *>(op)->api;
  int64_t rows = 0;
  BD_TRY(infer_int(api, context, "N", &rows));
  return infer_output(api, context, 1, rows);
}

ort::Status *infer_embedding(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  const ort::Api *api = static_cast<const Op *>(op)->api;
  int64_t columns = 0;
  BD_TRY(infer_int(api, context, "K", &columns));
  return infer_output(api, context, 0, columns);
}

size_t input_count(const ort::CustomOp *) { return kInputs; }

ort::ElementType table_type(size_t index) {
  return index == kW ? ort::kUint8 : index == kScale ? ort::kFloat : ort::kInt8;
}

ort::Characteristic characteristic(const ort::CustomOp *, size_t index) {
  return index == kGroupScale ? ort::kOptional : ort::kRequired;
}

void fill_table(Op *op, const ort::Api *api) {
  fill_common(op, api);
  op->GetInputTypeCount = input_count;
  op->GetInputCharacteristic = characteristic;
  fill_node<Kernel, make>(op);
}

}  // namespace

void fill_quantized_head(Op *op, const ort::Api *api) {
  fill_table(op, api);
  op->GetName = [](const ort::CustomOp *) { return kHead; };
  op->GetInputType = [](const ort::CustomOp *, size_t index) {
    return index == kX ? ort::kFloat : table_type(index);
  };
  op->KernelComputeV2 = compute_head;
  op->InferOutputShape = infer_shapes<infer_head>;
}

void fill_quantized_embedding(Op *op, const ort::Api *api) {
  fill_table(op, api);
  op->GetName = [](const ort::CustomOp *) { return kEmbedding; };
  op->GetInputType = [](const ort::CustomOp *, size_t index) {
    return index == kX ? ort::kInt64 : table_type(index);
  };
  op->KernelComputeV2 = compute_embedding;
  op->InferOutputShape = infer_shapes<infer_embedding>;
}

}  // namespace bitdistill
