// Attention: rotation, the cache, and causal attention over it, with the norms of queries and keys
// inside. Inputs and outputs are those of com.microsoft.GroupQueryAttention where they mean the
// same; the cache is of float, float16, or int8 with a scale behind each row (8 bits).
//
// Inputs      query float (B, T, heads * D), or with k and v (B, T, (heads + 2 kv_heads) * D);
//             key, value float (B, T, kv_heads * D), both absent where the query holds them;
//             past_key, past_value (B, kv_heads, S, D, or D + 4 of int8);
//             seqlens_k int32 (B): tokens of each sequence with its past, less 1;
//             total_sequence_length int32 (): the largest, with its past;
//             frequencies float (D / 2), constant; q_norm, k_norm float (D), absent without norms
// Outputs     y float (B, T, heads * D); present_key, present_value like the past, with room for
//             total_sequence_length at least; where one is its past's own buffer nothing is copied
// Attributes  num_heads, kv_num_heads, local_window_size (0: all), scale, epsilon;
//             context (the most positions) and rotary_scale, of cosines and sines
//
// Where T is total_sequence_length there is no past, and sequences may be padded on the right: y is
// zero there. Else every sequence is T tokens longer than its past.
#include "ort_attention.h"

#include <string.h>

#include <atomic>

#include "work_memory.h"

namespace bitdistill {
namespace {

constexpr const char *kName = "Attention";
constexpr int64_t kTileRows = BD_TILE_ROWS;

ort::Status *make(AttentionNode *k, const ort::KernelInfo *info, const char *op) {
  read_name(k->api, info, op, k->name);
  return read_node(k, info);
}

// What one key head of one sequence works on.
BdAttention part_of(const AttentionNode &k, const AttentionCall &c, int64_t b, int64_t head) {
  const int64_t group = k.heads / k.kv_heads, size = c.size, row = b * c.tokens;
  BdAttention a = {};
  a.q = c.q + row * c.q_stride + head * group * size;
  a.k = c.k + row * c.kv_stride + head * size;
  a.v = c.v + row * c.kv_stride + head * size;
  a.y = c.y + row * c.y_stride + head * group * size;
  a.q_stride = c.q_stride, a.y_stride = c.y_stride;
  a.k_stride = a.v_stride = c.kv_stride;
  const int64_t place = (b * k.kv_heads + head) * c.room * c.row_bytes();
  a.keys = c.present[0] + place, a.values = c.present[1] + place;
  a.cos = c.rotary.cos, a.sin = c.rotary.sin;
  a.q_norm = c.in[kQNorm].floats(), a.k_norm = c.in[kKNorm].floats();
  a.epsilon = k.epsilon, a.scale = k.scale;
  a.past = c.past(b), a.group = group, a.head_size = size;
  a.window = k.window, a.cache_bits = c.bits;
  return a;
}

void copy_past(const AttentionNode &k, const AttentionCall &c, int64_t unit) {
  const size_t bytes = static_cast<size_t>(c.past(unit / k.kv_heads) * c.row_bytes());
  for (int i = 0; i < 2; ++i) {
    const char *past = static_cast<const char *>(c.in[kPastKey + static_cast<size_t>(i)].data);
    if (past != c.present[i] && bytes > 0)
      memcpy(c.present[i] + unit * c.room * c.row_bytes(),
             past + unit * c.past_room * c.row_bytes(), bytes);
  }
}

void keep(const AttentionNode &k, const AttentionCall &c, int64_t unit) {
  copy_past(k, c, unit);
  const int64_t b = unit / k.kv_heads;
  const BdAttention a = part_of(k, c, b, unit % k.kv_heads);
  k.kernels->attention->keep(&a, 0, c.given(b));
}

// One tile of rows; those of padding are zero. False: out of memory.
bool attend(const AttentionNode &k, const AttentionCall &c, int64_t unit, int64_t tile) {
  const int64_t b = unit / k.kv_heads;
  const BdAttention a = part_of(k, c, b, unit % k.kv_heads);
  const int64_t first = tile * kTileRows, all = c.tokens * a.group;
  const int64_t end = first + kTileRows < all ? first + kTileRows : all;
  const int64_t held = c.given(b) * a.group;
  const int64_t last = end < held ? end : held;
  for (int64_t row = last > first ? last : first; row < end; ++row)
    memset(a.y + row / a.group * a.y_stride + row % a.group * c.size, 0,
           static_cast<size_t>(c.size) * sizeof(float));
  if (last <= first) return true;
  void *scratch = work_memory(bd_attention_scratch_bytes(&a, first, last));
  if (scratch != nullptr) k.kernels->attention->attend(&a, first, last, scratch);
  return scratch != nullptr;
}

ort::Status *compute(void *kernel, ort::KernelContext *context) noexcept {
  const AttentionNode &k = *static_cast<const AttentionNode *>(kernel);
  AttentionCall c = {};
  BD_TRY(read_call(k, context, &c));
  const int64_t dims[] = {c.batch, c.tokens, k.heads * c.size};
  void *y = nullptr;
  BD_TRY(allocate(k.api, context, kY, dims, 3, &y));
  c.y = static_cast<float *>(y), c.y_stride = dims[2];
  BD_TRY(make_presents(k, context, &c));
  if (c.batch == 0 || c.tokens == 0) return nullptr;
  const float *query = c.in[kQuery].floats();
  if (c.in[kKey].present) {
    c.q = query, c.k = c.in[kKey].floats(), c.v = c.in[kValue].floats();
    c.q_stride = c.in[kQuery].dims[2], c.kv_stride = c.in[kKey].dims[2];
  } else {
    take_packed(k, query, &c);
  }
  const Threads threads = {k.api, context};
  BD_TRY(keep_all(k, threads, &c));
  return attend_all(k, threads, c);
}

template <ort::ElementType Type>
ort::ElementType input_type(const ort::CustomOp *, size_t index) {
  return attention_input_type(index, Type);
}

ort::Characteristic characteristic(const ort::CustomOp *, size_t index) {
  const bool optional = index == kKey || index == kValue || index == kQNorm || index == kKNorm;
  return optional ? ort::kOptional : ort::kRequired;
}

template <ort::ElementType Type>
void fill(Op *op, const ort::Api *api) {
  fill_common(op, api);
  op->GetName = [](const ort::CustomOp *) { return kName; };
  op->GetInputTypeCount = [](const ort::CustomOp *) -> size_t { return kAttentionInputs; };
  op->GetInputCharacteristic = characteristic;
  op->GetInputType = input_type<Type>;
  op->GetOutputTypeCount = [](const ort::CustomOp *) -> size_t { return kAttentionOutputs; };
  op->GetOutputType = attention_output_type<Type>;
  op->KernelComputeV2 = compute;
  fill_node<AttentionNode, make>(op);
}

}  // namespace

ort::Status *make_presents(const AttentionNode &k, ort::KernelContext *context, AttentionCall *c) {
  c->room = c->past_room > c->total ? c->past_room : c->total;
  const int64_t dims[] = {c->batch, k.kv_heads, c->room, c->in[kPastKey].dims[3]};
  for (size_t i = 0; i < 2; ++i) {
    void *data = nullptr;
    BD_TRY(allocate(k.api, context, kPresentKey + i, dims, 4, &data));
    c->present[i] = static_cast<char *>(data);
  }
  return nullptr;
}

void take_packed(const AttentionNode &k, const float *packed, AttentionCall *c) {
  const int64_t queries = k.heads * c->size, keys = k.kv_heads * c->size;
  c->q = packed, c->k = packed + queries, c->v = packed + queries + keys;
  c->q_stride = c->kv_stride = queries + 2 * keys;
}

ort::Status *keep_all(const AttentionNode &k, const Threads &threads, AttentionCall *c) {
  c->rotary = k.rotary->rows(c->total);
  if (!keeps_first(k, *c)) return nullptr;
  const double kept = static_cast<double>(c->tokens * c->size) * 2;
  return parallel(threads, c->batch * k.kv_heads, chunk_of(kept), [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) keep(k, *c, unit);
  });
}

// Key heads of all sequences; the cache of one whose rows are one tile is written by its own task.
ort::Status *attend_all(const AttentionNode &k, const Threads &threads, const AttentionCall &c) {
  const int64_t rows = c.tokens * (k.heads / k.kv_heads), tiles = tiles_of(k, c);
  const bool kept = keeps_first(k, c);
  // Of a position: keys and values from memory, then products.
  const double position = static_cast<double>(c.row_bytes()) * 0.25 +
                          static_cast<double>((rows + tiles - 1) / tiles * c.size) * 0.03;
  std::atomic<bool> failed{false};
  BD_TRY(parallel(threads, c.batch * k.kv_heads * tiles,
                  chunk_of(position * static_cast<double>(c.total)),
                  [&](int64_t first, int64_t last) {
                    for (int64_t i = first; i < last; ++i) {
                      if (!kept) keep(k, c, i);
                      if (!attend(k, c, i / tiles, i % tiles)) failed = true;
                    }
                  }));
  return failed ? refuse(k.api, "%s: out of memory", k.name) : nullptr;
}

ort::ElementType attention_input_type(size_t input, ort::ElementType cache) {
  if (input == kPastKey || input == kPastValue) return cache;
  return input == kLengths || input == kTotal ? ort::kInt32 : ort::kFloat;
}

void fill_attention(Op (&ops)[3], const ort::Api *api) {
  fill<ort::kFloat>(&ops[0], api);
  fill<ort::kFloat16>(&ops[1], api);
  fill<ort::kInt8>(&ops[2], api);
}

}  // namespace bitdistill
