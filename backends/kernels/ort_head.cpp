// HeadLinear: Y = X . fp32(W)^T with a float16 table, so that a tied embedding is stored once.
//
// Inputs  X float (..., K); W float16 (N, K)
#include <algorithm>

#include "ort_support.h"
#include "work_memory.h"

namespace bitdistill {
namespace {

enum Input : size_t { kX, kW, kInputs };
constexpr const char *kName = "HeadLinear";

struct Kernel {
  const ort::Api *api;
  const BdKernels *kernels;
};

ort::Status *check_table(const ort::Api *api, const Tensor &table) {
  BD_TRY(check_tensor(api, kName, table, {"W", ort::kFloat16, 0, {}}));
  if (table.rank != 2 || table.dims[1] < 1)
    return refuse(api, "%s: W must be a float16 matrix (N, K), got rank %zu", kName, table.rank);
  return nullptr;
}

ort::Status *make(Kernel *k, const ort::KernelInfo *info, const char *) {
  Tensor table;
  BD_TRY(read_constant(k->api, info, kW, &table));
  return table.present ? check_table(k->api, table) : nullptr;
}

ort::Status *compute(void *kernel, ort::KernelContext *context) noexcept {
  const Kernel &k = *static_cast<const Kernel *>(kernel);
  Tensor x;
  Tensor table;
  BD_TRY(read_input(k.api, context, kW, &table));
  BD_TRY(check_table(k.api, table));
  BD_TRY(read_input(k.api, context, kX, &x));
  int64_t tokens = 0;
  BD_TRY(check_activations(k.api, kName, x, "K", table.dims[1], &tokens));
  float *y = nullptr;
  BD_TRY(make_output(k.api, context, x, x.rank - 1, table.dims[0], &y));
  if (tokens == 0) return nullptr;
  Scratch::release();
  const BdHalfTable w = {static_cast<const uint16_t *>(table.data), table.dims[0], table.dims[1]};
  // A quarter of the true time: a task then lasts four times as long at least, which is what it
  // takes to read several streams of rows at the full rate.
  const double row = static_cast<double>(w.columns) * (0.02 + 0.01 * static_cast<double>(tokens));
  const int64_t chunk = std::max(chunk_of(row), share_of(w.rows, 4));
  return parallel({k.api, context}, w.rows, chunk, [&](int64_t a, int64_t b) {
    release_work_memory();
    k.kernels->head->half(&w, x.floats(), tokens, y, a, b);
  });
}

ort::Status *infer(const ort::CustomOp *op, ort::ShapeContext *context) noexcept {
  const ort::Api *api = static_cast<const Op *>(op)->api;
  ort::Shape *table = nullptr;  // the context's own
  BD_TRY(api->ShapeInferContext_GetInputTypeShape(context, kW, &table));
  size_t rank = 0;
  BD_TRY(api->GetDimensionsCount(table, &rank));
  if (rank != 2) return nullptr;  // refused when the kernel is made
  int64_t dims[2];
  BD_TRY(api->GetDimensions(table, dims, rank));
  return infer_output(api, context, 1, dims[0]);
}

const char *name(const ort::CustomOp *) { return kName; }
size_t input_count(const ort::CustomOp *) { return kInputs; }

ort::ElementType input_type(const ort::CustomOp *, size_t index) {
  return index == kW ? ort::kFloat16 : ort::kFloat;
}

}  // namespace

void fill_head(Op *op, const ort::Api *api) {
  fill_common(op, api);
  op->GetName = name;
  op->GetInputTypeCount = input_count;
  op->GetInputType = input_type;
  op->KernelComputeV2 = compute;
  fill_node<Kernel, make>(op);
  op->InferOutputShape = infer_shapes<infer>;
}

}  // namespace bitdistill
