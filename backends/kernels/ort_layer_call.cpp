// One call of DecoderLayer: its inputs, checked, memory for what lies between the products, and the
// threads.
#include <algorithm>
#include <initializer_list>

#include "ort_layer.h"

namespace bitdistill {
namespace {

// The runtime does not say which inputs there are until it has them: a norm or bias that is fed
// would else be left out.
ort::Status *refuse_fed(const LayerNode &k, const ort::KernelContext *context) {
  if (k.asked) return nullptr;  // a node's inputs are there in every call or in none
  for (size_t part = 0; part < kParts; ++part)
    for (const PartInput input : {kPartNorm, kPartBias}) {
      const TernaryNode &t = k.parts[part];
      if (t.constants[input == kPartNorm ? kNorm : kBias].present) continue;
      Tensor fed;
      BD_TRY(read_input(k.api, context, place_of(part, input), &fed));
      if (fed.present)
        return refuse(k.api, "%s: %s must be constant; export the model again", t.name,
                      input == kPartNorm ? "norm_weight" : "bias");
    }
  k.asked = true;
  return nullptr;
}

// One call: what is between the products lies in memory of the calling thread.
struct LayerCall {
  const float *x;
  AttentionCall attention;
  int64_t tokens;
  float *qkv, *gated, *y;
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

// Rows of queries; keys and values follow.
int64_t queries_of(const LayerNode &k) { return k.parts[kOutput].columns; }

// A prompt's keys and values are multiplied and kept before its queries, in the same memory.
bool keys_first(const LayerNode &k, const LayerCall &c) {
  return keeps_first(k.attention, c.attention) && queries_of(k) % BD_BLOCK_ROWS == 0;
}

// The most rows of a matrix that are multiplied at once; gate and up come one after the other.
int64_t rows_at_once(const LayerNode &k, const LayerCall &c, size_t part) {
  const int64_t rows = k.parts[part].rows, queries = queries_of(k);
  if (part == kGateUp) return k.wide;
  return part == kQkv && keys_first(k, c) ? std::max(queries, rows - queries) : rows;
}

size_t most_product_bytes(const LayerNode &k, const LayerCall &c) {
  size_t most = 0;
  for (size_t part = 0; part < kParts; ++part)
    most = std::max(most, product_bytes(k.parts[part], rows_at_once(k, c, part), c.tokens));
  return most;
}

// Lays the call's memory out from `memory` on, null to count it; the bytes. Attention's output
// takes the place of the queries, and the MLP's product that of both. The sums of the residuals are
// in y.
size_t lay_out(const LayerNode &k, LayerCall *c, char *memory) {
  const int64_t columns = std::max(rows_at_once(k, *c, kQkv), k.wide);
  const size_t product = whole_lines(static_cast<size_t>(c->tokens * columns) * sizeof(float));
  c->qkv = c->gated = reinterpret_cast<float *>(memory);
  c->product = memory == nullptr ? nullptr : memory + product;
  return product + most_product_bytes(k, *c);
}

// A matrix' call: X is (tokens, columns), its rows `stride` apart; with `residual` y is their sum.
TernaryCall call_of(const TernaryNode &t, const LayerCall &c, const float *x, int64_t stride,
                    const float *residual, float *y) {
  TernaryCall call = {};
  for (size_t input = kW; input < kTernaryConstants; ++input) call.in[input] = t.constants[input];
  call.in[kX].data = x;
  call.in[kResidual].data = residual;
  call.tokens = c.tokens, call.stride = stride, call.y = y;
  return call;
}

// Attention's output, in the place of the queries.
ort::Status *attend(const LayerNode &k, const Threads &threads, LayerCall *c) {
  const TernaryNode &t = k.parts[kQkv];
  const TernaryCall call = call_of(t, *c, c->x, k.hidden, nullptr, c->qkv);
  const int64_t queries = queries_of(k), others = t.rows - queries;
  AttentionCall *a = &c->attention;
  BD_TRY(prepare_tokens(t, threads, call, c->product));
  if (keys_first(k, *c)) {
    BD_TRY(multiply_rows(t, threads, call, {queries, others, 0}, c->product));
    a->k = c->qkv, a->v = c->qkv + others / 2, a->kv_stride = others;
    BD_TRY(keep_all(k.attention, threads, a));
    BD_TRY(multiply_rows(t, threads, call, {0, queries, 0}, c->product));
    a->q = c->qkv, a->q_stride = queries;
  } else {
    BD_TRY(multiply_rows(t, threads, call, {0, t.rows, 0}, c->product));
    take_packed(k.attention, c->qkv, a);
    BD_TRY(keep_all(k.attention, threads, a));
  }
  a->y = c->qkv, a->y_stride = a->q_stride;
  return attend_all(k.attention, threads, *a);
}

// y becomes the sum of a residual and a matrix' product with x, whose rows are `stride` apart.
ort::Status *add_product(const LayerNode &k, size_t part, const Threads &threads,
                         const LayerCall &c, const float *x, int64_t stride,
                         const float *residual) {
  const TernaryNode &t = k.parts[part];
  const TernaryCall call = call_of(t, c, x, stride, residual, c.y);
  BD_TRY(prepare_tokens(t, threads, call, c.product));
  return multiply_rows(t, threads, call, {0, t.rows, BD_ADD}, c.product);
}

ort::Status *multiply_gated(const LayerNode &k, const Threads &threads, const LayerCall &c) {
  const TernaryNode &t = k.parts[kGateUp];
  const TernaryCall call = call_of(t, c, c.y, k.hidden, nullptr, c.gated);
  BD_TRY(prepare_tokens(t, threads, call, c.product));
  BD_TRY(multiply_rows(t, threads, call, {0, k.wide, 0}, c.product));
  return multiply_rows(t, threads, call, {k.wide, k.wide, k.activation}, c.product);
}

ort::Status *run(const LayerNode &k, const Threads &threads, LayerCall *c) {
  BD_TRY(attend(k, threads, c));
  BD_TRY(add_product(k, kOutput, threads, *c, c->qkv, c->attention.y_stride, c->x));
  BD_TRY(multiply_gated(k, threads, *c));
  return add_product(k, kDown, threads, *c, c->gated, k.wide, c->y);
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
