// One call of TernaryLinear: its inputs, checked, and its work, divided among the runtime's
// threads.
#include <thread>

#include "ort_ternary.h"
#include "split.h"

namespace bitdistill {
namespace {

constexpr int64_t kFewTokens = 8;  // below, small tasks of rows; from here on, large ones

struct TernaryCall {
  Tensor in[kTernaryInputs];
  int64_t tokens;
  float *y;

  const float *floats(size_t input) const { return in[input].floats(); }
};

// The runtime does not tell how many threads it has: as many as there are processors, or fewer.
int64_t processors() {
  static const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int64_t>(count) : 1;
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
  for (size_t input = kX; input < kTernaryInputs; ++input)
    BD_TRY(read_input(k.api, context, input, &c->in[input]));
  const Tensor &up = c->in[kUp], &residual = c->in[kResidual];
  if (up.present && k.activation == 0)
    return refuse(k.api, "%s: up needs the attribute activation; export the model again", k.name);
  const bool both = k.activation != 0 && !up.present;
  BD_TRY(check_activations(k.api, k.name, c->in[kX], both ? "2 K" : "K",
                           both ? 2 * k.columns : k.columns, &c->tokens));
  for (size_t input = kW; input < kTernaryConstants; ++input) {
    if (k.checked[input] || (input >= kNorm && !c->in[input].present)) continue;
    BD_TRY(check_constant(k, input, c->in[input]));
  }
  if (c->in[kNorm].present && !(k.epsilon >= 0))
    return refuse(k.api, "%s: norm_weight needs the attribute epsilon, >= 0", k.name);
  if (up.present) BD_TRY(check_beside(k, *c, "up", up, k.columns));
  return residual.present ? check_beside(k, *c, "residual", residual, k.rows) : nullptr;
}

// Tokens ready for the product. `product` is memory for the gate's, or null where there is none.
ort::Status *prepare(const TernaryNode &k, const ort::KernelContext *context, const TernaryCall &c,
                     float *product, const BdTokens &out) {
  const bool packed = !c.in[kUp].present;
  const float *x = c.floats(kX);
  const BdGate gate = {x, packed ? x + k.columns : c.floats(kUp),
                       packed ? 2 * k.columns : k.columns, k.columns, k.activation};
  const BdInput in = {product != nullptr ? product : x, c.floats(kNorm), k.epsilon, c.tokens,
                      k.columns};
  const auto round = k.bits == 0 ? k.kernels->normalize : k.kernels->quantize;
  const double columns = static_cast<double>(k.columns);
  const int64_t chunk = chunk_of(columns * (product != nullptr ? 0.8 : 0.3));
  return parallel(k.api, context, c.tokens, chunk, [&](int64_t a, int64_t b) {
    if (product != nullptr) k.kernels->gate(&gate, product, a, b);
    round(&in, &out, a, b);
  });
}

// Blocks [first, last) of a product's rows, to which the residual's are added.
void add_rows(const float *residual, const BdTernary &w, int64_t tokens, float *y, int64_t first,
              int64_t last) {
  const int64_t end = last * BD_BLOCK_ROWS < w.rows ? last * BD_BLOCK_ROWS : w.rows;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t n = t * w.rows + first * BD_BLOCK_ROWS; n < t * w.rows + end; ++n)
      y[n] += residual[n];
}

ort::Status *multiply(const TernaryNode &k, const ort::KernelContext *context, const TernaryCall &c,
                      const BdTernary &w, const BdTokens &tokens) {
  const auto kernel = k.bits == 0 ? k.kernels->ternary_float
                      : k.base3   ? k.kernels->ternary_base3
                                  : k.kernels->ternary;
  const float *residual = c.floats(kResidual);
  const auto part = [&](const BdTernary *rows, const BdTokens *some, float *y, int64_t a,
                        int64_t b) {
    kernel(rows, some, y, a, b);
    if (residual != nullptr) add_rows(residual + (y - c.y), *rows, some->tokens, y, a, b);
  };
  const int64_t blocks = bd_blocks(w.rows);
  if (c.tokens < kFewTokens) {
    // Of a block of 32 rows: 8 bytes a column from memory, 64 operations a column and token.
    const double columns = static_cast<double>(w.columns);
    const double block = columns * (0.7 + 0.25 * static_cast<double>(c.tokens));
    return parallel(k.api, context, blocks, chunk_of(block),
                    [&](int64_t a, int64_t b) { part(&w, &tokens, c.y, a, b); });
  }
  const bool by_tokens = k.kernels->by_tokens != 0 && kernel == k.kernels->ternary;
  const Split split(c.tokens, blocks, processors(), 2, by_tokens);
  return parallel(k.api, context, split.parts(), 1, [&](int64_t a, int64_t b) {
    for (int64_t index = a; index < b; ++index) split.run(part, index, w, tokens, c.y);
  });
}

ort::Status *run(const TernaryNode &k, const ort::KernelContext *context, const TernaryCall &c,
                 const float *row_scales) {
  const size_t gated = k.activation == 0 ? 0 : static_cast<size_t>(c.tokens * k.columns);
  const size_t gated_bytes = (gated * sizeof(float) + 63) / 64 * 64;
  const Scratch scratch(gated_bytes + bd_scratch_bytes(c.tokens, k.columns, k.bits));
  if (scratch.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  char *memory = static_cast<char *>(scratch.data());
  const BdTokens tokens = bd_tokens(memory + gated_bytes, c.tokens, k.columns, k.bits);
  BD_TRY(prepare(k, context, c, gated == 0 ? nullptr : reinterpret_cast<float *>(memory), tokens));
  const BdTernary w = {static_cast<const uint8_t *>(c.in[kW].data), row_scales, c.floats(kBias),
                       k.rows, k.columns};
  return multiply(k, context, c, w, tokens);
}

}  // namespace

ort::Status *run_ternary(const TernaryNode &k, ort::KernelContext *context) {
  TernaryCall c;
  BD_TRY(read_call(k, context, &c));
  BD_TRY(make_output(k.api, context, c.in[kX], c.in[kX].rank - 1, k.rows, &c.y));
  if (c.tokens == 0) return nullptr;
  if (k.row_scales != nullptr) return run(k, context, c, k.row_scales.get());
  // Scales that are inputs are expanded into memory of this call, which may be one of many.
  const Scratch scales(static_cast<size_t>(k.rows) * sizeof(float));
  if (scales.data() == nullptr) return refuse(k.api, "%s: out of memory", k.name);
  float *row_scales = static_cast<float *>(scales.data());
  expand_scales(k, c.floats(kScale), row_scales);
  return run(k, context, c, row_scales);
}

}  // namespace bitdistill
