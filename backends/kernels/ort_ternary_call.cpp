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

size_t scale_bytes(const TernaryNode &k) {
  return whole_lines(static_cast<size_t>(k.rows) * sizeof(float));
}

// Of the weights in layout 1, where base 3 is unpacked for many tokens: whole lines.
size_t code_bytes(const TernaryNode &k, int64_t tokens) {
  const bool unpacked = k.base3 && tokens >= BD_UNPACKED_TOKENS;
  return unpacked ? static_cast<size_t>(bd_packed_bytes(k.rows, k.columns)) : 0;
}

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

// Tokens ready for the product.
ort::Status *prepare(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                     const BdTokens &out) {
  if (k.activation != 0) return prepare_gated(k, threads, c, out);
  const BdInput in = {c.floats(kX), c.floats(kNorm), k.epsilon, c.tokens, k.columns};
  const auto round = k.bits == 0 ? k.kernels->normalize : k.kernels->quantize;
  return parallel(threads, c.tokens, chunk_of(static_cast<double>(k.columns) * 0.3),
                  [&](int64_t a, int64_t b) { round(&in, &out, a, b); });
}

// Blocks [first, last) of a product's rows, to which the residual's are added.
void add_rows(const float *residual, const BdTernary &w, int64_t tokens, float *y, int64_t first,
              int64_t last) {
  const int64_t end = last * BD_BLOCK_ROWS < w.rows ? last * BD_BLOCK_ROWS : w.rows;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = t * w.rows + first * BD_BLOCK_ROWS; n < t * w.rows + end; ++n)
      y[n] += residual[n];
}

// A model stores one scale a matrix, or a few; the kernels take one a row, here of the blocks
// [first, last). Kept for every node they would be 1.4 MB of a 0.6B model, read from memory for
// each token.
void expand_scales(const TernaryNode &k, const float *scale, int64_t first, int64_t last,
                   float *out) {
  const int64_t end = std::min(last * BD_BLOCK_ROWS, k.rows);
  for (int64_t n = first * BD_BLOCK_ROWS; n < end;) {
    const int64_t index = n / k.scale_rows, next = std::min((index + 1) * k.scale_rows, end);
    std::fill(out + n, out + next, scale[index]);
    n = next;
  }
}

ort::Status *multiply(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                      const BdTernary &w, float *row_scales, const BdTokens &tokens) {
  const auto kernel = k.bits == 0 ? k.kernels->ternary_float
                      : w.base3   ? k.kernels->ternary_base3
                                  : k.kernels->ternary;
  const float *residual = c.floats(kResidual);
  const auto part = [&](const BdTernary *rows, const BdTokens *some, float *y, int64_t a,
                        int64_t b) {
    kernel(rows, some, y, a, b);
    if (residual != nullptr) add_rows(residual + (y - c.y), *rows, some->tokens, y, a, b);
  };
  const int64_t blocks = bd_blocks(w.rows);
  const float *scale = c.floats(kScale);
  if (c.tokens < kFewTokens) {
    // Of a block of 32 rows: 8 bytes a column from memory, 64 operations a column and token.
    const double columns = static_cast<double>(w.columns);
    const double block = columns * (0.7 + 0.25 * static_cast<double>(c.tokens));
    const auto piece = [&](int64_t a, int64_t b) {
      expand_scales(k, scale, a, b, row_scales);  // in the cache that reads them
      part(&w, &tokens, c.y, a, b);
    };
    if (threads.team == nullptr)
      return parallel(threads, blocks, std::max(chunk_of(block), share_of(blocks, 1)), piece);
    const Pieces pieces(blocks, processors());
    return parallel(threads, pieces.count(), 1, [&](int64_t index, int64_t) {
      piece(pieces.first(index), pieces.first(index + 1));
    });
  }
  expand_scales(k, scale, 0, blocks, row_scales);
  const bool by_tokens = k.kernels->by_tokens != 0 && kernel == k.kernels->ternary;
  const Split split(c.tokens, blocks, processors(), 2, by_tokens);
  return parallel(threads, split.parts(), 1, [&](int64_t a, int64_t b) {
    for (int64_t index = a; index < b; ++index) split.run(part, index, w, tokens, c.y);
  });
}

// Weights in base 3 are unpacked once for a prompt's tokens: that costs what a few of them do.
ort::Status *unpack(const Threads &threads, const BdKernels &kernels, BdTernary *w, uint8_t *out) {
  BD_TRY(parallel(threads, bd_blocks(w->rows), chunk_of(static_cast<double>(w->columns)),
                  [&](int64_t a, int64_t b) { kernels.unpack_base3(w, out, a, b); }));
  w->packed = out;
  w->base3 = 0;
  return nullptr;
}

}  // namespace

size_t product_bytes(const TernaryNode &k, int64_t tokens) {
  return scale_bytes(k) + code_bytes(k, tokens) + bd_scratch_bytes(tokens, k.columns, k.bits);
}

ort::Status *ternary_product(const TernaryNode &k, const Threads &threads, const TernaryCall &c,
                             void *memory) {
  float *row_scales = static_cast<float *>(memory);
  char *rest = static_cast<char *>(memory) + scale_bytes(k);
  const size_t codes = code_bytes(k, c.tokens);
  const BdTokens tokens = bd_tokens(rest + codes, c.tokens, k.columns, k.bits);
  BD_TRY(prepare(k, threads, c, tokens));
  BdTernary w = {static_cast<const uint8_t *>(c.in[kW].data),
                 row_scales,
                 c.floats(kBias),
                 k.rows,
                 k.columns,
                 k.base3 ? 1 : 0};
  if (codes > 0) BD_TRY(unpack(threads, *k.kernels, &w, reinterpret_cast<uint8_t *>(rest)));
  return multiply(k, threads, c, w, row_scales, tokens);
}

ort::Status *run_ternary(const TernaryNode &k, ort::KernelContext *context) {
  TernaryCall c;
  BD_TRY(read_call(k, context, &c));
  BD_TRY(make_output(k.api, context, c.in[kX], c.in[kX].rank - 1, k.rows, &c.y));
  if (c.tokens == 0) return nullptr;
  const Scratch scratch(product_bytes(k, c.tokens));
  if (scratch.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  return ternary_product(k, {k.api, context}, c, scratch.data());
}

}  // namespace bitdistill
