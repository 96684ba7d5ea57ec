// The part of ONNX Runtime's C interface that the operators use, declared by hand: no package ships
// its headers. The interface is an append-only table of function pointers, so the positions below
// hold for every ONNX Runtime that answers to API version 17 (1.17 and later). Each position is
// asserted here and exercised by tests against the installed runtime.
#ifndef BITDISTILL_ORT_ABI_H
#define BITDISTILL_ORT_ABI_H

#include <stddef.h>
#include <stdint.h>

namespace ort {

constexpr uint32_t kApiVersion = 17;

// Opaque objects of the runtime.
struct Status;
struct Value;
struct KernelInfo;
struct KernelContext;
struct ShapeContext;
struct Shape;  // element type and dimensions of a tensor
struct Attribute;
struct Domain;
struct SessionOptions;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int {
  kUndefined = 0,
  kFloat = 1,
  kUint8 = 2,
  kInt8 = 3,
  kInt32 = 6,
  kInt64 = 7,
  kFloat16 = 10
};
enum AttributeType : int { kAttributeInt = 1 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };
enum MemoryType : int { kDefaultMemory = 0 };

struct Api {
  Status *(*CreateStatus)(ErrorCode code, const char *message);
  void *skip_1[1];
  const char *(*GetErrorMessage)(const Status *status);
  void *skip_3[23];
  Status *(*CreateCustomOpDomain)(const char *name, Domain **out);
  Status *(*CustomOpDomain_Add)(Domain *domain, const struct CustomOp *op);
  Status *(*AddCustomOpDomain)(SessionOptions *options, Domain *domain);
  void *skip_29[22];
  Status *(*GetTensorMutableData)(Value *value, void **out);
  void *skip_52[5];
  Status *(*CreateTensorTypeAndShapeInfo)(Shape **out);
  Status *(*SetTensorElementType)(Shape *shape, ElementType type);
  Status *(*SetDimensions)(Shape *shape, const int64_t *values, size_t count);
  Status *(*GetTensorElementType)(const Shape *shape, ElementType *out);
  Status *(*GetDimensionsCount)(const Shape *shape, size_t *out);
  Status *(*GetDimensions)(const Shape *shape, int64_t *values, size_t count);
  Status *(*GetSymbolicDimensions)(const Shape *shape, const char **names, size_t count);
  void *skip_64[1];
  Status *(*GetTensorTypeAndShape)(const Value *value, Shape **out);
  void *skip_66[19];
  Status *(*KernelInfoGetAttribute_float)(const KernelInfo *info, const char *name, float *out);
  Status *(*KernelInfoGetAttribute_int64)(const KernelInfo *info, const char *name, int64_t *out);
  Status *(*KernelInfoGetAttribute_string)(const KernelInfo *info, const char *name, char *out,
                                           size_t *size);
  Status *(*KernelContext_GetInputCount)(const KernelContext *context, size_t *out);
  void *skip_89[1];
  Status *(*KernelContext_GetInput)(const KernelContext *context, size_t index, const Value **out);
  Status *(*KernelContext_GetOutput)(KernelContext *context, size_t index, const int64_t *dims,
                                     size_t count, Value **out);
  void *skip_92[1];
  void (*ReleaseStatus)(Status *status);
  void *skip_94[5];
  void (*ReleaseTensorTypeAndShapeInfo)(Shape *shape);
  void *skip_100[144];
  Status *(*KernelInfo_GetNodeName)(const KernelInfo *info, char *out, size_t *size);
  void *skip_245[4];
  Status *(*KernelInfoGetConstantInput_tensor)(const KernelInfo *info, size_t index,
                                               int *is_constant, const Value **out);
  void *skip_250[18];
  Status *(*ShapeInferContext_GetInputTypeShape)(const ShapeContext *context, size_t index,
                                                 Shape **out);
  Status *(*ShapeInferContext_GetAttribute)(const ShapeContext *context, const char *name,
                                            const Attribute **out);
  Status *(*ShapeInferContext_SetOutputTypeShape)(const ShapeContext *context, size_t index,
                                                  const Shape *shape);
  Status *(*SetSymbolicDimensions)(Shape *shape, const char **names, size_t count);
  Status *(*ReadOpAttr)(const Attribute *attribute, AttributeType type, void *data, size_t size,
                        size_t *out);
  void *skip_273[1];
  Status *(*KernelContext_ParallelFor)(const KernelContext *context, void (*run)(void *, size_t),
                                       size_t total, size_t batches, void *data);
};

#define BD_POSITION(name, index) \
  static_assert(offsetof(Api, name) == (index) * sizeof(void *), #name " is out of place")
BD_POSITION(CreateStatus, 0);
BD_POSITION(GetErrorMessage, 2);
BD_POSITION(CreateCustomOpDomain, 26);
BD_POSITION(CustomOpDomain_Add, 27);
BD_POSITION(AddCustomOpDomain, 28);
BD_POSITION(GetTensorMutableData, 51);
BD_POSITION(CreateTensorTypeAndShapeInfo, 57);
BD_POSITION(SetTensorElementType, 58);
BD_POSITION(SetDimensions, 59);
BD_POSITION(GetTensorElementType, 60);
BD_POSITION(GetDimensionsCount, 61);
BD_POSITION(GetDimensions, 62);
BD_POSITION(GetSymbolicDimensions, 63);
BD_POSITION(GetTensorTypeAndShape, 65);
BD_POSITION(KernelInfoGetAttribute_float, 85);
BD_POSITION(KernelInfoGetAttribute_int64, 86);
BD_POSITION(KernelInfoGetAttribute_string, 87);
BD_POSITION(KernelContext_GetInputCount, 88);
BD_POSITION(KernelContext_GetInput, 90);
BD_POSITION(KernelContext_GetOutput, 91);
BD_POSITION(ReleaseStatus, 93);
BD_POSITION(ReleaseTensorTypeAndShapeInfo, 99);
BD_POSITION(KernelInfo_GetNodeName, 244);
BD_POSITION(KernelInfoGetConstantInput_tensor, 249);
BD_POSITION(ShapeInferContext_GetInputTypeShape, 268);
BD_POSITION(ShapeInferContext_GetAttribute, 269);
BD_POSITION(ShapeInferContext_SetOutputTypeShape, 270);
BD_POSITION(SetSymbolicDimensions, 271);
BD_POSITION(ReadOpAttr, 272);
BD_POSITION(KernelContext_ParallelFor, 274);
#undef BD_POSITION

struct ApiBase {
  const Api *(*GetApi)(uint32_t version);
  const char *(*GetVersionString)();
};

// What an operator gives to the runtime. The first-generation callbacks stay null: `version` makes
// the runtime take those that return a status.
struct CustomOp {
  uint32_t version;
  void *CreateKernel;
  const char *(*GetName)(const CustomOp *op);
  const char *(*GetExecutionProviderType)(const CustomOp *op);
  ElementType (*GetInputType)(const CustomOp *op, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp *op);
  ElementType (*GetOutputType)(const CustomOp *op, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp *op);
  void *KernelCompute;
  void (*KernelDestroy)(void *kernel);
  Characteristic (*GetInputCharacteristic)(const CustomOp *op, size_t index);
  Characteristic (*GetOutputCharacteristic)(const CustomOp *op, size_t index);
  MemoryType (*GetInputMemoryType)(const CustomOp *op, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp *op);
  int (*GetVariadicInputHomogeneity)(const CustomOp *op);
  int (*GetVariadicOutputMinArity)(const CustomOp *op);
  int (*GetVariadicOutputHomogeneity)(const CustomOp *op);
  Status *(*CreateKernelV2)(const CustomOp *op, const Api *api, const KernelInfo *info,
                            void **kernel);
  Status *(*KernelComputeV2)(void *kernel, KernelContext *context);
  Status *(*InferOutputShape)(const CustomOp *op, ShapeContext *context);
  int (*GetStartVersion)(const CustomOp *op);
  int (*GetEndVersion)(const CustomOp *op);
  // Of API version 18; not read where `version` is lower.
  size_t (*GetMayInplace)(int **inputs, int **outputs);
  void (*ReleaseMayInplace)(int *inputs, int *outputs);
  void *later[2];
};

static_assert(sizeof(void *) != 8 ||
                  (offsetof(CustomOp, CreateKernelV2) == 136 &&
                   offsetof(CustomOp, KernelComputeV2) == 144 &&
                   offsetof(CustomOp, InferOutputShape) == 152 &&
                   offsetof(CustomOp, GetStartVersion) == 160 &&
                   offsetof(CustomOp, GetEndVersion) == 168 && sizeof(CustomOp) == 208),
              "CustomOp is out of place");

}  // namespace ort
#endif
