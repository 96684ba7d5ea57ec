// One call of DecoderLayer: its inputs, checked, memory for what lies between the products, and the
// threads.
#include <initializer_list>

#include "ort_layer.h"

namespace bitdistill {
namespace {

// The runtime does not say which inputs there are until it has them: a norm or bias that is fed
// would else be left out.
ort::Status *refuse_fed(const LayerNode &k, const ort::KernelContext *context) {
  for (size_t part = 0; part < kParts; ++part)
    for (const size_t input : {kNorm, kBias}) {
      const TernaryNode &t = k.parts[part];
      if (t.constants[input].present) continue;
      Tensor fed;
      BD_TRY(read_input(k.api, context, kOwnInputs + part * kPerPart + input - kW, &fed));
      if (fed.present)
        return refuse(k.api, "%s: %s must be constant; export the model again", t.name,
                      input == kNorm ? "norm_weight" : "bias");
    }
  return nullptr;
}

// One call: what is between the products lies in memory of the calling thread.
struct LayerCall {
  const float *x;
  AttentionCall attention;
  int64_t tokens;
  float *qkv, *attended, *middle, *gate_up, *y;
  void *product;  // of the largest product_bytes
};

ort::Status *read_layer(const LayerNode &k, ort::KernelContext *context, LayerCall *c) {
  BD_TRY(refuse_fed(k, context));
  Tensor x;
  BD_TRY(read_input(k.api, context, 0, &x));
  BD_TRY(check_activations(k.api, k.name, x, "hidden_size", k.hidden, &c->tokens));
  if (x.rank != 3) return refuse(k.api, "%s: X must have 3 dimensions, got %zu", k.name, x.rank);
  c->x = x.floats();
  AttentionCall *a = &c->attention;
  a->in[kQuery] = x;
  a->in[kQuery].dims[2] = k.parts[kQkv].rows;
  BD_TRY(read_call(k.attention, context, a));
  void *y = nullptr;
  BD_TRY(allocate(k.api, context, kY, x.dims, x.rank, &y));
  c->y = static_cast<float *>(y);
  return make_presents(k.attention, context, a);
}

size_t most_product_bytes(const LayerNode &k, int64_t tokens) {
  size_t most = 0;
  for (const TernaryNode &part : k.parts) {
    const size_t bytes = product_bytes(part, tokens);
    most = bytes > most ? bytes : most;
  }
  return most;
}

// Lays the call's memory out from `memory` on, null to count it; the bytes. Gate and up lie where
// queries, keys, values and attention's output were, which nobody reads any more.
size_t lay_out(const LayerNode &k, LayerCall *c, char *memory) {
  const auto at = [&](size_t place) { return memory == nullptr ? nullptr : memory + place; };
  const auto floats = [&](size_t place) { return reinterpret_cast<float *>(at(place)); };
  const auto bytes = [&](int64_t columns) {
    return whole_lines(static_cast<size_t>(c->tokens * columns) * sizeof(float));
  };
  const size_t attended = bytes(k.parts[kQkv].rows);
  const size_t first = attended + bytes(k.parts[kOutput].columns);
  const size_t second = bytes(k.parts[kGateUp].rows);
  const size_t middle = first > second ? first : second;
  const size_t product = middle + bytes(k.hidden);
  c->qkv = c->gate_up = floats(0);
  c->attended = floats(attended);
  c->middle = floats(middle);
  c->product = at(product);
  c->attention.in[kQuery].data = c->qkv;
  c->attention.y = c->attended;
  return product + most_product_bytes(k, c->tokens);
}

ort::Status *multiply(const LayerNode &k, size_t part, const Threads &threads, const LayerCall &c,
                      const float *x, const float *residual, float *y) {
  const TernaryNode &t = k.parts[part];
  TernaryCall call = {};
  for (size_t input = kW; input < kTernaryConstants; ++input) call.in[input] = t.constants[input];
  call.in[kX].data = x;
  call.in[kResidual].data = residual;
  call.tokens = c.tokens;
  call.y = y;
  return ternary_product(t, threads, call, c.product);
}

ort::Status *run(const LayerNode &k, const Threads &threads, LayerCall *c) {
  BD_TRY(multiply(k, kQkv, threads, *c, c->x, nullptr, c->qkv));
  BD_TRY(run_attention(k.attention, threads, &c->attention));
  BD_TRY(multiply(k, kOutput, threads, *c, c->attended, c->x, c->middle));
  BD_TRY(multiply(k, kGateUp, threads, *c, c->middle, nullptr, c->gate_up));
  return multiply(k, kDown, threads, *c, c->gate_up, c->middle, c->y);
}

// The runtime's threads, as many as come, stay for all loops of the call.
ort::Status *run_together(const LayerNode &k, const ort::KernelContext *context, LayerCall *c) {
  struct Work {
    const LayerNode &k;
    LayerCall *c;
    Threads threads;
    ort::Status *status;
  };
  Team team;
  Work work = {k, c, {k.api, context, &team}, nullptr};
  const auto join = [](void *data, size_t) {
    Work &w = *static_cast<Work *>(data);
    Team &all = *w.threads.team;
    if (!all.leads()) return all.help();
    w.status = run(w.k, w.threads, w.c);
    all.finish();
  };
  BD_TRY(
      k.api->KernelContext_ParallelFor(context, join, static_cast<size_t>(processors()), 0, &work));
  return work.status;
}

}  // namespace

ort::Status *run_layer(const LayerNode &k, ort::KernelContext *context) {
  LayerCall c = {};
  BD_TRY(read_layer(k, context, &c));
  if (c.tokens == 0) return nullptr;
  const Scratch scratch(lay_out(k, &c, nullptr));
  if (scratch.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  lay_out(k, &c, static_cast<char *>(scratch.data()));
  return c.tokens < kFewTokens ? run_together(k, context, &c) : run(k, {k.api, context}, &c);
}

}  // namespace bitdistill
