// One call of TernaryLinear: its inputs, checked, and its work, divided among the runtime's
// threads.
#include <algorithm>
#include <atomic>

#include "ort_ternary.h"
#include "pieces.h"
#include "split.h"
#include "work_memory.h"

namespace bitdistill {
namespace {

// Weights in base 3 are unpacked once for a prompt's tokens: that costs what a few of them do.
bool unpacks(const TernaryNode &k, int64_t tokens) {
  return k.base3 && tokens >= BD_UNPACKED_TOKENS;
}

// A product's memory: tokens that were made ready, a scale for each row, and weights in layout 1
// where they are unpacked. Whole lines; a null `start` counts the bytes.
struct ProductMemory {
  char *tokens;
  float *scales = nullptr;
  uint8_t *codes = nullptr;
  size_t bytes;

  ProductMemory(const TernaryNode &k, int64_t rows, int64_t count, void *start) {
    const size_t scales_at = whole_lines(bd_scratch_bytes(count, k.columns, k.bits));
    const size_t codes_at = scales_at + whole_lines(static_cast<size_t>(rows) * sizeof(float));
    const int64_t unpacked = unpacks(k, count) ? bd_packed_bytes(rows, k.columns) : 0;
    bytes = codes_at + static_cast<size_t>(unpacked);
    tokens = static_cast<char *>(start);
    if (start == nullptr) return;
    scales = reinterpret_cast<float *>(tokens + scales_at);
    codes = reinterpret_cast<uint8_t *>(tokens + codes_at);
  }
};

// An input of the calls themselves: the dimensions of X, the last one being `last`.
ort::Status *check_beside(const TernaryNode &k, const TernaryCall &c, const char *name,
                          const Tensor &tensor, int64_t last) {
  Expected expected = {name, ort::kFloat, c.in[kX].rank, {}};
  for (size_t i = 0; i + 1 < expected.rank; ++i) expected.dims[i] = c.in[kX].dims[i];
  expected.dims[expected.rank - 1] = last;
  return check_tensor(k.api, k.name, tensor, expected);
}

ort::Status *read_call(const TernaryNode &k, const ort::KernelContext *context, TernaryCall *c) {
  for (size_t input = kX; input < kTernaryInputs; ++input) {
    const bool kept = input < kTernaryConstants && k.constants[input].present;
    if (kept)
      c->in[input] = k.constants[input];
    else
      BD_TRY(read_input(k.api, context, input, &c->in[input]));
  }
  const Tensor &up = c->in[kUp], &residual = c->in[kResidual];
  if (up.present && k.activation == 0)
    return refuse(k.api, "%s: up needs the attribute activation; export the model again", k.name);
  const bool both = k.activation != 0 && !up.present;
  BD_TRY(check_activations(k.api, k.name, c->in[kX], both ? "2 K" : "K",
                           both ? 2 * k.columns : k.columns, &c->tokens));
  for (size_t input = kW; input < kTernaryConstants; ++input) {
    if (k.constants[input].present || (input >= kNorm && !c->in[input].present)) continue;
    BD_TRY(check_constant(k, input, c->in[input]));
  }
  if (c->in[kNorm].present && !(k.epsilon >= 0))
    return refuse(k.api, "%s: norm_weight needs the attribute epsilon, >= 0", k.name);
  if (up.present) BD_TRY(check_beside(k, *c, "up", up, k.columns));
  return residual.present ? check_beside(k, *c, "residual", residual, k.rows) : nullptr;
}

// A gate's product, made and rounded token by token: it stays in the cache of its thread, and a
// prompt's takes no memory.
ort::Status *prepare_gated(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                           const BdTokens &out) {
  const bool packed = !c.in[kUp].present;
  const float *x = c.floats(kX);
  const float *up = packed ? x + k.columns : c.floats(kUp);
  const int64_t stride = packed ? 2 * k.columns : k.columns;
  const auto round = k.bits == 0 ? k.kernels->normalize : k.kernels->quantize;
  std::atomic<bool> failed{false};
  const int64_t chunk = chunk_of(static_cast<double>(k.columns) * 0.8);
  BD_TRY(parallel(threads, c.tokens, chunk, [&](int64_t a, int64_t b) {
    void *memory = work_memory(static_cast<size_t>(k.columns) * sizeof(float));
    if (memory == nullptr) {
      failed = true;
      return;
    }
    float *product = static_cast<float *>(memory);
    const BdInput in = {product, c.floats(kNorm), k.epsilon, 1, k.columns};
    for (int64_t t = a; t < b; ++t) {
      const BdGate gate = {x + t * stride, up + t * stride, stride, k.columns, k.activation};
      const BdTokens token = some_tokens(out, t, t + 1);
      k.kernels->gate(&gate, product, 0, 1);
      round(&in, &token, 0, 1);
    }
  }));
  return failed ? refuse(k.api, "%s: out of memory", k.name) : nullptr;
}

// Blocks [first, last) of a residual's rows, to be added to where they are in y.
void copy_rows(const float *residual, const BdTernary &w, int64_t tokens, float *y, int64_t first,
               int64_t last) {
  const int64_t start = first * BD_BLOCK_ROWS;
  const int64_t end = std::min(last * BD_BLOCK_ROWS, w.rows);
  for (int64_t t = 0; t < tokens; ++t)
    std::copy(residual + t * w.rows + start, residual + t * w.rows + end, y + t * w.rows + start);
}

// A model stores one scale a matrix, or a few; the kernels take one a row, here of `count` rows.
// Kept for every node they would be 1.4 MB of a 0.6B model, read from memory for each token.
void expand_scales(const TernaryNode &k, const float *scale, int64_t first, int64_t count,
                   float *out) {
  for (int64_t n = first; n < first + count;) {
    const int64_t index = n / k.scale_rows;
    const int64_t next = std::min((index + 1) * k.scale_rows, first + count);
    std::fill(out + n - first, out + next - first, scale[index]);
    n = next;
  }
}

ort::Status *multiply(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                      const BdTernary &w, int64_t first_row, float *row_scales,
                      const BdTokens &tokens) {
  const auto kernel = k.bits == 0 ? k.kernels->ternary_float
                      : w.base3   ? k.kernels->ternary_base3
                                  : k.kernels->ternary;
  const float *residual = c.floats(kResidual);
  const auto part = [&](const BdTernary *rows, const BdTokens *some, float *y, int64_t a,
                        int64_t b) {
    if (residual != nullptr && residual != c.y)
      copy_rows(residual + (y - c.y), *rows, some->tokens, y, a, b);
    kernel(rows, some, y, a, b);
  };
  const int64_t blocks = bd_blocks(w.rows);
  const float *scale = c.floats(kScale);
  if (c.tokens < kFewTokens) {
    // Of a block of 32 rows: 8 bytes a column from memory, 64 operations a column and token.
    const double columns = static_cast<double>(w.columns);
    const double block = columns * (0.7 + 0.25 * static_cast<double>(c.tokens));
    const auto piece = [&](int64_t a, int64_t b) {
      const int64_t row = a * BD_BLOCK_ROWS, end = std::min(b * BD_BLOCK_ROWS, w.rows);
      // In the cache that reads them.
      expand_scales(k, scale, first_row + row, end - row, row_scales + row);
      part(&w, &tokens, c.y, a, b);
    };
    if (threads.team == nullptr)
      return parallel(threads, blocks, std::max(chunk_of(block), share_of(blocks, 1)), piece);
    const Pieces pieces(blocks, processors());
    return parallel(threads, pieces.count(), 1, [&](int64_t index, int64_t) {
      piece(pieces.first(index), pieces.first(index + 1));
    });
  }
  expand_scales(k, scale, first_row, w.rows, row_scales);
  const bool by_tokens = k.kernels->by_tokens != 0 && kernel == k.kernels->ternary;
  const Split split(c.tokens, blocks, processors(), 2, by_tokens);
  std::atomic<int64_t> next{0};
  return parallel(threads, processors(), 1,
                  [&](int64_t, int64_t) { split.take(&next, part, w, tokens, c.y); });
}

ort::Status *unpack(const Threads &threads, const BdKernels &kernels, BdTernary *w, uint8_t *out) {
  BD_TRY(parallel(threads, bd_blocks(w->rows), chunk_of(static_cast<double>(w->columns)),
                  [&](int64_t a, int64_t b) { kernels.unpack_base3(w, out, a, b); }));
  w->packed = out;
  w->base3 = 0;
  return nullptr;
}

}  // namespace

size_t product_bytes(const TernaryNode &k, int64_t rows, int64_t tokens) {
  return ProductMemory(k, rows, tokens, nullptr).bytes;
}

ort::Status *prepare_tokens(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                            void *memory) {
  const BdTokens out = bd_tokens(memory, c.tokens, k.columns, k.bits);
  if (k.activation != 0) return prepare_gated(k, threads, c, out);
  const auto round = k.bits == 0 ? k.kernels->normalize : k.kernels->quantize;
  return parallel(threads, c.tokens, chunk_of(static_cast<double>(k.columns) * 0.3),
                  [&](int64_t a, int64_t b) {
                    for (int64_t t = a; t < b; ++t) {
                      const BdInput in = {c.floats(kX) + t * c.stride, c.floats(kNorm), k.epsilon,
                                          1, k.columns};
                      const BdTokens token = some_tokens(out, t, t + 1);
                      round(&in, &token, 0, 1);
                    }
                  });
}

ort::Status *multiply_rows(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                           const Rows &rows, void *memory) {
  const ProductMemory place(k, rows.count, c.tokens, memory);
  const BdTokens tokens = bd_tokens(place.tokens, c.tokens, k.columns, k.bits);
  const auto bytes_of = k.base3 ? bd_base3_bytes : bd_packed_bytes;
  const float *bias = c.floats(kBias);
  BdTernary w = {static_cast<const uint8_t *>(c.in[kW].data) + bytes_of(rows.first, k.columns),
                 place.scales,
                 bias == nullptr ? nullptr : bias + rows.first,
                 rows.count,
                 k.columns,
                 k.base3 ? 1 : 0,
                 rows.update};
  if (unpacks(k, c.tokens)) BD_TRY(unpack(threads, *k.kernels, &w, place.codes));
  return multiply(k, threads, c, w, rows.first, place.scales, tokens);
}

ort::Status *run_ternary(const TernaryNode &k, ort::KernelContext *context) {
  TernaryCall c;
  BD_TRY(read_call(k, context, &c));
  c.stride = k.columns;
  BD_TRY(make_output(k.api, context, c.in[kX], c.in[kX].rank - 1, k.rows, &c.y));
  if (c.tokens == 0) return nullptr;
  const Scratch scratch(product_bytes(k, k.rows, c.tokens));
  if (scratch.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  const Threads threads = {k.api, context};
  BD_TRY(prepare_tokens(k, threads, c, scratch.data()));
  const Rows all = {0, k.rows, c.in[kResidual].present ? BD_ADD : 0};
  return multiply_rows(k, threads, c, all, scratch.data());
}

}  // namespace bitdistill
