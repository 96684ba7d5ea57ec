#include "ort_support.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>

#include <thread>

namespace bitdistill {
namespace {

constexpr double kTaskNanoseconds = 8000;

const char *type_name(ort::ElementType type) {
  switch (type) {
    case ort::kFloat:
      return "float";
    case ort::kUint8:
      return "uint8";
    case ort::kInt8:
      return "int8";
    case ort::kInt32:
      return "int32";
    case ort::kInt64:
      return "int64";
    case ort::kFloat16:
      return "float16";
    default:
      return "another type";
  }
}

void write_dims(const int64_t *dims, size_t rank, char *text, size_t size) {
  size_t used = static_cast<size_t>(snprintf(text, size, "("));
  for (size_t i = 0; i < rank && used < size; ++i)
    used += static_cast<size_t>(snprintf(text + used, size - used, "%s%lld", i == 0 ? "" : ", ",
                                         static_cast<long long>(dims[i])));
  if (used < size) snprintf(text + used, size - used, ")");
}

bool same_dims(const Tensor &tensor, const Expected &expected) {
  if (tensor.rank != expected.rank) return false;
  for (size_t i = 0; i < tensor.rank; ++i)
    if (tensor.dims[i] != expected.dims[i]) return false;
  return true;
}

ort::Status *read_shape(const ort::Api *api, const ort::Shape *shape, Tensor *out) {
  BD_TRY(api->GetTensorElementType(shape, &out->type));
  BD_TRY(api->GetDimensionsCount(shape, &out->rank));
  if (out->rank > kMaxRank)
    return refuse(api, "a tensor of rank %zu: bitdistill operators take at most %zu dimensions",
                  out->rank, kMaxRank);
  return out->rank == 0 ? nullptr : api->GetDimensions(shape, out->dims, out->rank);
}

ort::Characteristic required(const ort::CustomOp *, size_t) { return ort::kRequired; }
ort::ElementType float_output(const ort::CustomOp *, size_t) { return ort::kFloat; }
ort::MemoryType default_memory(const ort::CustomOp *, size_t) { return ort::kDefaultMemory; }
const char *cpu_provider(const ort::CustomOp *) { return "CPUExecutionProvider"; }
size_t one_output(const ort::CustomOp *) { return 1; }
int version_one(const ort::CustomOp *) { return 1; }

}  // namespace

ort::Status *refuse(const ort::Api *api, const char *format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  return api->CreateStatus(ort::kInvalidArgument, text);
}

void read_name(const ort::Api *api, const ort::KernelInfo *info, const char *op,
               char (&name)[kNameSize]) {
  char node[kNameSize - 32] = "";
  size_t size = sizeof node;
  ort::Status *status = api->KernelInfo_GetNodeName(info, node, &size);
  if (status != nullptr) {
    api->ReleaseStatus(status);
    node[0] = '\0';
  }
  if (node[0] == '\0')
    snprintf(name, sizeof name, "%s", op);
  else
    snprintf(name, sizeof name, "%s '%s'", op, node);
}

ort::Status *read_int(const ort::Api *api, const ort::KernelInfo *info, const char *op,
                      const char *attribute, int64_t *out) {
  ort::Status *status = api->KernelInfoGetAttribute_int64(info, attribute, out);
  if (status == nullptr) return nullptr;
  api->ReleaseStatus(status);
  return refuse(api, "%s: the integer attribute %s is missing; export the model again", op,
                attribute);
}

ort::Status *read_float(const ort::Api *api, const ort::KernelInfo *info, const char *op,
                        const char *attribute, float *out) {
  ort::Status *status = api->KernelInfoGetAttribute_float(info, attribute, out);
  if (status == nullptr) return nullptr;
  api->ReleaseStatus(status);
  return refuse(api, "%s: the attribute %s is missing; export the model again", op, attribute);
}

ort::Status *check_scales(const ort::Api *api, const char *op, const float *scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!(scale[i] >= 0) || isinf(scale[i]))
      return refuse(api, "%s: scale[%lld] = %g is not finite and >= 0; export the model again", op,
                    static_cast<long long>(i), static_cast<double>(scale[i]));
  return nullptr;
}

ort::Status *read_tensor(const ort::Api *api, const ort::Value *value, Tensor *out) {
  *out = Tensor();
  if (value == nullptr) return nullptr;
  ort::Shape *shape = nullptr;
  BD_TRY(api->GetTensorTypeAndShape(value, &shape));
  ort::Status *status = read_shape(api, shape, out);
  api->ReleaseTensorTypeAndShapeInfo(shape);
  BD_TRY(status);
  void *data = nullptr;
  BD_TRY(api->GetTensorMutableData(const_cast<ort::Value *>(value), &data));
  out->data = data;
  out->present = true;
  return nullptr;
}

ort::Status *read_input(const ort::Api *api, const ort::KernelContext *context, size_t index,
                        Tensor *out) {
  *out = Tensor();
  size_t count = 0;
  BD_TRY(api->KernelContext_GetInputCount(context, &count));
  if (index >= count) return nullptr;
  const ort::Value *value = nullptr;
  BD_TRY(api->KernelContext_GetInput(context, index, &value));
  return read_tensor(api, value, out);
}

ort::Status *read_constant(const ort::Api *api, const ort::KernelInfo *info, size_t index,
                           Tensor *out) {
  *out = Tensor();
  int is_constant = 0;
  const ort::Value *value = nullptr;
  // An index past the node's inputs is an error to the runtime, and "not constant" here.
  ort::Status *status = api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value);
  if (status != nullptr) {
    api->ReleaseStatus(status);
    return nullptr;
  }
  return is_constant != 0 ? read_tensor(api, value, out) : nullptr;
}

ort::Status *check_tensor(const ort::Api *api, const char *op, const Tensor &tensor,
                          const Expected &expected) {
  if (!tensor.present) return refuse(api, "%s: input %s is missing", op, expected.name);
  if (tensor.type != expected.type)
    return refuse(api, "%s: %s must be %s, got %s", op, expected.name, type_name(expected.type),
                  type_name(tensor.type));
  if (expected.rank == 0 || same_dims(tensor, expected)) return nullptr;
  char want[128];
  char got[192];
  write_dims(expected.dims, expected.rank, want, sizeof want);
  write_dims(tensor.dims, tensor.rank, got, sizeof got);
  return refuse(api, "%s: %s must have the shape %s, got %s; export the model again", op,
                expected.name, want, got);
}

ort::Status *check_activations(const ort::Api *api, const char *op, const Tensor &x,
                               const char *what, int64_t columns, int64_t *tokens) {
  BD_TRY(check_tensor(api, op, x, {"X", ort::kFloat, 0, {}}));
  if (x.rank == 0 || x.dims[x.rank - 1] != columns) {
    char got[192];
    write_dims(x.dims, x.rank, got, sizeof got);
    return refuse(api, "%s: X must end in %s = %lld, got %s", op, what,
                  static_cast<long long>(columns), got);
  }
  *tokens = 1;
  for (size_t i = 0; i + 1 < x.rank; ++i) *tokens *= x.dims[i];
  return nullptr;
}

ort::Status *allocate(const ort::Api *api, ort::KernelContext *context, size_t output,
                      const int64_t *dims, size_t rank, void **data) {
  ort::Value *value = nullptr;
  BD_TRY(api->KernelContext_GetOutput(context, output, dims, rank, &value));
  return api->GetTensorMutableData(value, data);
}

ort::Status *make_output(const ort::Api *api, ort::KernelContext *context, const Tensor &x,
                         size_t rank, int64_t last, float **out) {
  int64_t dims[kMaxRank + 1];
  for (size_t i = 0; i < rank; ++i) dims[i] = x.dims[i];
  dims[rank] = last;
  void *data = nullptr;
  BD_TRY(allocate(api, context, 0, dims, rank + 1, &data));
  *out = static_cast<float *>(data);
  return nullptr;
}

int64_t chunk_of(double nanoseconds_per_unit) {
  const double units = kTaskNanoseconds / nanoseconds_per_unit;
  return units < 1 ? 1 : static_cast<int64_t>(units);
}

int64_t processors() {
  static const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int64_t>(count) : 1;
}

int64_t share_of(int64_t units, int64_t parts) {
  const int64_t tasks = parts * processors();
  return (units + tasks - 1) / tasks;
}

void fill_common(Op *op, const ort::Api *api) {
  *op = Op();
  op->version = ort::kApiVersion;
  op->api = api;
  op->GetExecutionProviderType = cpu_provider;
  op->GetOutputType = float_output;
  op->GetOutputTypeCount = one_output;
  op->GetInputCharacteristic = required;
  op->GetOutputCharacteristic = required;
  op->GetInputMemoryType = default_memory;
  op->GetStartVersion = version_one;
  op->GetEndVersion = version_one;
}

ort::Status *infer_int(const ort::Api *api, const ort::ShapeContext *context, const char *attribute,
                       int64_t *out) {
  const ort::Attribute *found = nullptr;
  BD_TRY(api->ShapeInferContext_GetAttribute(context, attribute, &found));
  size_t size = 0;
  return api->ReadOpAttr(found, ort::kAttributeInt, out, sizeof *out, &size);
}

ort::Status *infer_output(const ort::Api *api, ort::ShapeContext *context, size_t dropped,
                          int64_t last) {
  ort::Shape *input = nullptr;  // the context's own; not to be released
  BD_TRY(api->ShapeInferContext_GetInputTypeShape(context, 0, &input));
  size_t rank = 0;
  BD_TRY(api->GetDimensionsCount(input, &rank));
  if (rank == 0 || rank > kMaxRank) return nullptr;  // unknown here; checked when it runs
  int64_t dims[kMaxRank + 1];
  const char *names[kMaxRank + 1];
  BD_TRY(api->GetDimensions(input, dims, rank));
  BD_TRY(api->GetSymbolicDimensions(input, names, rank));
  rank -= dropped;
  dims[rank] = last;
  names[rank] = "";
  ++rank;
  ort::Shape *output = nullptr;
  BD_TRY(api->CreateTensorTypeAndShapeInfo(&output));
  ort::Status *status = api->SetTensorElementType(output, ort::kFloat);
  if (status == nullptr) status = api->SetDimensions(output, dims, rank);
  if (status == nullptr) status = api->SetSymbolicDimensions(output, names, rank);
  if (status == nullptr) status = api->ShapeInferContext_SetOutputTypeShape(context, 0, output);
  api->ReleaseTensorTypeAndShapeInfo(output);
  return status;
}

}  // namespace bitdistill
