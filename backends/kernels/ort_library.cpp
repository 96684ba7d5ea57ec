// The symbol ONNX Runtime looks for in a custom-op library.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <mutex>
#include <new>

#include "ort_support.h"

namespace bitdistill {
namespace {

constexpr const char *kDomain = "bitdistill";
constexpr int kInPlaceVersion = 18;  // of the interface: an operator may write where it has read

// One domain per copy of ONNX Runtime in the process. Sessions keep pointers to it, so it is never
// freed; sessions of one runtime share it.
struct Registration {
  const ort::Api *api;
  ort::Domain *domain;
  Op attention[3];
  Op layer[3];
  Op ternary;
  Op head;
  Op quantized_head;
  Op quantized_embedding;
  Registration *next;
};

std::mutex mutex;
Registration *registrations = nullptr;

// Whether the runtime is 1.`minor` or later.
bool at_least(const char *version, int minor) {
  const char *dot = strchr(version, '.');
  return atoi(version) > 1 || (dot != nullptr && atoi(dot + 1) >= minor);
}

// ONNX Runtime before 1.24 crashes in the shape inference of custom operators when an optional
// input is absent. There the operators with such inputs do without: their shapes are known when
// they run.
bool infers_safely(const char *version) { return at_least(version, 24); }

ort::Status *fill(Registration *r, const ort::Api *api, const char *version) {
  r->api = api;
  fill_attention(r->attention, api);
  fill_layer(r->layer, api);
  fill_ternary(&r->ternary, api);
  fill_head(&r->head, api);
  fill_quantized_head(&r->quantized_head, api);
  fill_quantized_embedding(&r->quantized_embedding, api);
  BD_TRY(api->CreateCustomOpDomain(kDomain, &r->domain));
  BD_TRY(api->CustomOpDomain_Add(r->domain, &r->head));
  for (Op &op : r->attention) BD_TRY(api->CustomOpDomain_Add(r->domain, &op));
  for (Op &op : r->layer) {
    if (at_least(version, kInPlaceVersion)) op.version = kInPlaceVersion;
    if (!infers_safely(version)) op.InferOutputShape = nullptr;
    BD_TRY(api->CustomOpDomain_Add(r->domain, &op));
  }
  for (Op *op : {&r->ternary, &r->quantized_head, &r->quantized_embedding}) {
    if (!infers_safely(version)) op->InferOutputShape = nullptr;
    BD_TRY(api->CustomOpDomain_Add(r->domain, op));
  }
  return nullptr;
}

ort::Status *domain_of(const ort::Api *api, const char *version, ort::Domain **out) {
  const std::lock_guard<std::mutex> lock(mutex);
  for (Registration *r = registrations; r != nullptr; r = r->next)
    if (r->api == api) {
      *out = r->domain;
      return nullptr;
    }
  Registration *r = new (std::nothrow) Registration();
  if (r == nullptr) return refuse(api, "bitdistill: out of memory");
  ort::Status *status = fill(r, api, version);
  if (status != nullptr) {
    delete r;
    return status;
  }
  r->next = registrations;
  registrations = r;
  *out = r->domain;
  return nullptr;
}

}  // namespace
}  // namespace bitdistill

extern "C" BD_API ort::Status *RegisterCustomOps(ort::SessionOptions *options,
                                                 const ort::ApiBase *base) noexcept {
  using namespace bitdistill;
  const ort::Api *api = base->GetApi(ort::kApiVersion);
  if (api == nullptr)  // CreateStatus has been the first entry in every version
    return base->GetApi(1)->CreateStatus(
        ort::kFail, "bitdistill needs ONNX Runtime 1.17 or later: pip install -U onnxruntime");
  if (bd_kernels(nullptr) == nullptr) return refuse(api, "%s", bd_kernels_error(nullptr));
  ort::Domain *domain = nullptr;
  BD_TRY(domain_of(api, base->GetVersionString(), &domain));
  return api->AddCustomOpDomain(options, domain);
}
