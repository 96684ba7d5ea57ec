#include "ort_attention.h"

namespace bitdistill {
namespace {

ort::Status *read_attributes(AttentionNode *k, const ort::KernelInfo *info) {
  BD_TRY(read_int(k->api, info, k->name, "num_heads", &k->heads));
  BD_TRY(read_int(k->api, info, k->name, "kv_num_heads", &k->kv_heads));
  BD_TRY(read_int(k->api, info, k->name, "local_window_size", &k->window));
  BD_TRY(read_float(k->api, info, k->name, "scale", &k->scale));
  BD_TRY(read_float(k->api, info, k->name, "epsilon", &k->epsilon));
  BD_TRY(read_int(k->api, info, k->name, "context", &k->context));
  if (k->kv_heads < 1 || k->heads < 1 || k->heads % k->kv_heads != 0 || k->window < 0 ||
      k->context < 1 || k->context > INT32_MAX)
    return refuse(k->api,
                  "%s: num_heads = %lld, kv_num_heads = %lld, local_window_size = %lld and "
                  "context = %lld are not those of a model; export it again",
                  k->name, static_cast<long long>(k->heads), static_cast<long long>(k->kv_heads),
                  static_cast<long long>(k->window), static_cast<long long>(k->context));
  return nullptr;
}

ort::Status *read_constants(AttentionNode *k, const ort::KernelInfo *info) {
  float scale = 1;
  BD_TRY(read_float(k->api, info, k->name, "rotary_scale", &scale));
  for (size_t i = kAttentionConstants; i < kAttentionInputs; ++i)
    BD_TRY(read_constant(k->api, info, place_of(*k, i), &k->constants[i]));
  const Tensor &given = k->constants[kFrequencies];
  if (!given.present || given.type != ort::kFloat || given.rank != 1 || given.dims[0] < 1)
    return refuse(k->api,
                  "%s: frequencies must be a constant vector of float; export the model "
                  "again",
                  k->name);
  k->rotary = Rotary::acquire(given.floats(), given.dims[0], scale, k->context);
  return k->rotary != nullptr ? nullptr : refuse(k->api, "%s: out of memory", k->name);
}

ort::Status *read_sizes(const AttentionNode &k, AttentionCall *c) {
  const Tensor &query = c->in[kQuery], &past = c->in[kPastKey];
  BD_TRY(check_tensor(k.api, k.name, query, {"query", ort::kFloat, 0, {}}));
  if (query.rank != 3 || past.rank != 4)
    return refuse(k.api, "%s: query must have 3 dimensions and past_key 4, got %zu and %zu", k.name,
                  query.rank, past.rank);
  const int64_t heads = c->in[kKey].present ? k.heads : k.heads + 2 * k.kv_heads;
  c->batch = query.dims[0], c->tokens = query.dims[1], c->size = query.dims[2] / heads;
  c->past_room = past.dims[2], c->type = past.type;
  c->bits = past.type == ort::kFloat ? 32 : past.type == ort::kFloat16 ? 16 : 8;
  if (c->size < 1 || c->size % BD_HEAD_MULTIPLE != 0 || c->size > BD_MAX_HEAD_SIZE ||
      c->size * heads != query.dims[2])
    return refuse(k.api,
                  "%s: query has %lld columns, which are not %lld heads of a multiple of %d "
                  "(at most %d)",
                  k.name, static_cast<long long>(query.dims[2]), static_cast<long long>(heads),
                  BD_HEAD_MULTIPLE, BD_MAX_HEAD_SIZE);
  return nullptr;
}

ort::Status *check_inputs(const AttentionNode &k, const AttentionCall &c) {
  const int64_t row = c.bits == 8 ? c.size + 4 : c.size;
  const Expected past = {"past_key", c.type, 4, {c.batch, k.kv_heads, c.past_room, row}};
  Expected value = past;
  value.name = "past_value";
  BD_TRY(check_tensor(k.api, k.name, c.in[kPastKey], past));
  BD_TRY(check_tensor(k.api, k.name, c.in[kPastValue], value));
  BD_TRY(check_tensor(k.api, k.name, c.in[kLengths], {"seqlens_k", ort::kInt32, 1, {c.batch}}));
  BD_TRY(check_tensor(k.api, k.name, c.in[kFrequencies],
                      {"frequencies", ort::kFloat, 1, {c.size / 2}}));
  if (c.in[kQNorm].present)
    BD_TRY(check_tensor(k.api, k.name, c.in[kQNorm], {"q_norm", ort::kFloat, 1, {c.size}}));
  if (c.in[kKNorm].present)
    BD_TRY(check_tensor(k.api, k.name, c.in[kKNorm], {"k_norm", ort::kFloat, 1, {c.size}}));
  if (!c.in[kKey].present) return nullptr;
  const int64_t columns = k.kv_heads * c.size;
  BD_TRY(check_tensor(k.api, k.name, c.in[kKey],
                      {"key", ort::kFloat, 3, {c.batch, c.tokens, columns}}));
  return check_tensor(k.api, k.name, c.in[kValue],
                      {"value", ort::kFloat, 3, {c.batch, c.tokens, columns}});
}

ort::Status *check_lengths(const AttentionNode &k, const AttentionCall &c) {
  if (c.total < c.tokens || c.total > k.context)
    return refuse(k.api,
                  "%s: total_sequence_length %lld is not between %lld tokens and a context "
                  "of %lld",
                  k.name, static_cast<long long>(c.total), static_cast<long long>(c.tokens),
                  static_cast<long long>(k.context));
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t past = c.past(b), end = past + c.given(b);
    if (past < 0 || past > c.past_room || end < 1 || end > c.total)
      return refuse(k.api,
                    "%s: seqlens_k[%lld] = %d does not fit %lld tokens, a past with room for "
                    "%lld and total_sequence_length %lld",
                    k.name, static_cast<long long>(b), c.lengths()[b],
                    static_cast<long long>(c.tokens), static_cast<long long>(c.past_room),
                    static_cast<long long>(c.total));
  }
  return nullptr;
}

}  // namespace

ort::Status *read_node(AttentionNode *k, const ort::KernelInfo *info) {
  BD_TRY(read_attributes(k, info));
  return read_constants(k, info);
}

ort::Status *read_call(const AttentionNode &k, const ort::KernelContext *context,
                       AttentionCall *c) {
  for (size_t i = 0; i < kAttentionInputs; ++i) {
    if (k.in_layer && i < kPastKey) continue;
    c->in[i] = k.constants[i];
    if (!c->in[i].present) BD_TRY(read_input(k.api, context, place_of(k, i), &c->in[i]));
  }
  const Tensor &total = c->in[kTotal];
  BD_TRY(check_tensor(k.api, k.name, total, {"total_sequence_length", ort::kInt32, 0, {}}));
  for (size_t i = 0; i < total.rank; ++i)
    if (total.dims[i] != 1) return refuse(k.api, "%s: total_sequence_length is one number", k.name);
  c->total = *static_cast<const int32_t *>(total.data);
  BD_TRY(read_sizes(k, c));
  BD_TRY(check_inputs(k, *c));
  return check_lengths(k, *c);
}

}  // namespace bitdistill
