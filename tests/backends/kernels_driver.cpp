// Runs every table of the kernels over awkward shapes, in exactly sized heap buffers that the
// address sanitizer guards, on several threads, and compares them with the scalar one bit for bit.
// Prints the names of the instruction sets that were compared; exit status 1 on a difference.
//
//     kernels_driver          compare
//     kernels_driver ISA      only say whether this CPU may run ISA ("yes", or the refusal)
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "attention_driver.h"
#include "bitdistill_kernels.h"

namespace {

constexpr float kBefore = -1.0f;  // in y

struct Layer {
  std::vector<uint8_t> packed;
  std::vector<float> scale, bias, norm;
  int64_t rows, columns;
  int update = 0;
  BdTernary weights() const {
    return {packed.data(), scale.data(), bias.data(), rows, columns, 0, update};
  }
};

std::vector<float> random_floats(std::mt19937 &random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float &value : values) value = normal(random);
  return values;
}

Layer random_layer(std::mt19937 &random, int64_t rows, int64_t columns, bool damaged) {
  std::vector<uint8_t> packed(static_cast<size_t>(bd_packed_bytes(rows, columns)));
  for (uint8_t &byte : packed) do
      byte = static_cast<uint8_t>(random());
    while (!damaged && bd_has_code_3(&byte, 1) != 0);
  return {packed,
          random_floats(random, rows),
          random_floats(random, rows),
          random_floats(random, columns),
          rows,
          columns};
}

// On a pool, or on this thread for null.
std::vector<float> run(const BdKernels *kernels, const Layer &layer, const std::vector<float> &x,
                       int bits, BdPool *pool) {
  const int64_t tokens = static_cast<int64_t>(x.size()) / layer.columns;
  const std::unique_ptr<char[]> scratch(
      new char[bd_scratch_bytes(tokens, layer.columns, bits) + 1]);
  std::vector<float> y(static_cast<size_t>(tokens * layer.rows), kBefore);
  const BdInput in = {x.data(), layer.norm.data(), 1e-6f, tokens, layer.columns};
  const BdTernary w = layer.weights();
  float *const out = y.data();
  bd_ternary_layers(kernels, &w, 1, &in, bits, scratch.get(), pool, &out);
  return y;
}

// Five trits a byte; of any bytes, which all count as some trits. On a pool, or on this thread.
std::vector<float> run_base3(const BdKernels *kernels, const Layer &layer,
                             const std::vector<uint8_t> &packed, const std::vector<float> &x,
                             BdPool *pool) {
  const int64_t tokens = static_cast<int64_t>(x.size()) / layer.columns;
  const std::unique_ptr<char[]> scratch(new char[bd_scratch_bytes(tokens, layer.columns, 8) + 1]);
  std::vector<float> y(static_cast<size_t>(tokens * layer.rows), kBefore);
  const BdInput in = {x.data(), layer.norm.data(), 1e-6f, tokens, layer.columns};
  BdTernary w = layer.weights();
  w.packed = packed.data();
  w.base3 = 1;
  float *const out = y.data();
  bd_ternary_layers(kernels, &w, 1, &in, 8, scratch.get(), pool, &out);
  return y;
}

std::vector<uint8_t> run_unpack(const BdKernels *kernels, const Layer &layer,
                                const std::vector<uint8_t> &packed) {
  std::vector<uint8_t> out(static_cast<size_t>(bd_packed_bytes(layer.rows, layer.columns)), 255);
  BdTernary w = layer.weights();
  w.packed = packed.data();
  kernels->unpack_base3(&w, out.data(), 0, bd_blocks(layer.rows));
  return out;
}

bool same(const std::vector<float> &a, const std::vector<float> &b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return a.size() == b.size();
}

// What y held is a gate or a residual: the same as each by itself, on every table.
bool same_updates(const BdKernels *kernels, Layer layer, const std::vector<float> &x, int bits,
                  BdPool *pool) {
  const std::vector<float> plain = run(kernels, layer, x, bits, nullptr);
  for (const int update : {BD_ADD, BD_SILU, BD_GELU_TANH}) {
    layer.update = update;
    std::vector<float> expected = plain;
    const std::vector<float> before(plain.size(), kBefore);
    const int64_t count = static_cast<int64_t>(plain.size());
    const BdGate gate = {before.data(), plain.data(), count, count, update};
    if (update != BD_ADD)
      kernels->gate(&gate, expected.data(), 0, count > 0 ? 1 : 0);
    else
      for (float &value : expected) value += kBefore;
    if (!same(run(kernels, layer, x, bits, pool), expected)) return false;
  }
  return true;
}

bool same_gate(const BdKernels *a, const BdKernels *b, std::mt19937 &random, int64_t tokens,
               int64_t columns) {
  const std::vector<float> x = random_floats(random, tokens * columns);
  const std::vector<float> up = random_floats(random, tokens * columns);
  std::vector<float> ya(x.size()), yb(x.size());
  for (const int activation : {BD_SILU, BD_GELU_TANH}) {
    const BdGate gate = {x.data(), up.data(), columns, columns, activation};
    a->gate(&gate, ya.data(), 0, tokens);
    b->gate(&gate, yb.data(), 0, tokens);
    if (!same(ya, yb)) return false;
  }
  return true;
}

bool same_head(const BdKernels *a, const BdKernels *b, std::mt19937 &random, int64_t tokens,
               int64_t rows, int64_t columns) {
  std::vector<uint16_t> table(static_cast<size_t>(rows * columns));
  for (uint16_t &half : table) half = static_cast<uint16_t>(random());
  const std::vector<float> x = random_floats(random, tokens * columns);
  std::vector<float> ya(static_cast<size_t>(tokens * rows)), yb(ya.size());
  const BdHalfTable head = {table.data(), rows, columns};
  a->head->half(&head, x.data(), tokens, ya.data(), 0, rows);
  b->head->half(&head, x.data(), tokens, yb.data(), 0, rows);
  return same(ya, yb);
}

struct Table {
  std::vector<uint8_t> codes;
  std::vector<int8_t> group_scale;
  std::vector<float> scale;
  int64_t rows, columns;
  BdTable weights() const {
    return {codes.data(), group_scale.data(), scale.data(), rows, columns};
  }
};

// Any bytes at all.
Table random_table(std::mt19937 &random, int64_t rows, int64_t columns, int bits) {
  const size_t blocks = static_cast<size_t>(bd_table_blocks(rows));
  const size_t groups = static_cast<size_t>((columns + 31) / 32);
  Table table = {{}, {}, random_floats(random, rows), rows, columns};
  table.codes.resize(bits == 8 ? static_cast<size_t>(rows * columns) : blocks * groups * 256);
  table.group_scale.resize(bits == 8 ? 0 : blocks * groups * 16);
  for (uint8_t &code : table.codes) code = static_cast<uint8_t>(random());
  for (int8_t &scale : table.group_scale) scale = static_cast<int8_t>(random());
  return table;
}

std::vector<float> run_table(const BdKernels *kernels, const Table &table,
                             const std::vector<float> &x, int bits) {
  const int64_t tokens = static_cast<int64_t>(x.size()) / table.columns;
  const size_t size = bd_head_scratch_bytes(tokens, table.columns, bits);
  const std::unique_ptr<char[]> scratch(new char[size + 1]);
  const BdHeadTokens in = bd_head_tokens(scratch.get(), tokens, table.columns, bits);
  std::vector<float> y(static_cast<size_t>(tokens * table.rows), -1.0f);
  const BdTable w = table.weights();
  bd_head_quantize(x.data(), &in, 0, tokens);
  if (bits == 8)
    kernels->head->int8(&w, &in, y.data(), 0, table.rows);
  else
    kernels->head->int4(&w, &in, y.data(), 0, bd_table_blocks(table.rows));
  return y;
}

// Gathers every row as well, for the sanitizer to see.
bool same_table(const BdKernels *a, const BdKernels *b, std::mt19937 &random, int64_t tokens,
                int64_t rows, int64_t columns, int bits) {
  const Table table = random_table(random, rows, columns, bits);
  const std::vector<float> x = random_floats(random, tokens * columns);
  std::vector<int64_t> ids(static_cast<size_t>(rows));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = rows - 1 - static_cast<int64_t>(i);
  std::vector<float> gathered(static_cast<size_t>(rows * columns));
  const BdTable w = table.weights();
  (bits == 8 ? bd_gather_int8 : bd_gather_int4)(&w, ids.data(), rows, gathered.data());
  for (const float value : gathered)
    if (!std::isfinite(value)) return false;
  return same(run_table(a, table, x, bits), run_table(b, table, x, bits));
}

// One token and a few, rows enough for several streams of them, columns for more than one chunk of
// sums; and the widest matrix there may be, of the largest values.
bool same_streams(const BdKernels *kernels, const BdKernels *oracle, std::mt19937 &random,
                  BdPool *pool) {
  for (const int64_t columns : {263, 1030})
    for (const int64_t rows : {161, 290})
      for (const int64_t tokens : {1, 3}) {
        const Layer layer = random_layer(random, rows, columns, false);
        const std::vector<float> x = random_floats(random, tokens * columns);
        if (!same(run(kernels, layer, x, 8, pool), run(oracle, layer, x, 8, nullptr))) return false;
        std::vector<uint8_t> base3(static_cast<size_t>(bd_base3_bytes(rows, columns)));
        for (uint8_t &byte : base3) byte = static_cast<uint8_t>(random());
        if (!same(run_base3(kernels, layer, base3, x, pool),
                  run_base3(oracle, layer, base3, x, nullptr)))
          return false;
      }
  for (const int64_t tokens : {1, 12}) {
    const Layer layer = random_layer(random, 33, BD_MAX_COLUMNS, false);
    std::vector<float> x(static_cast<size_t>(tokens * BD_MAX_COLUMNS), -1.0f);
    x[0] = 1.0f;
    if (!same(run(kernels, layer, x, 8, pool), run(oracle, layer, x, 8, nullptr))) return false;
  }
  return true;
}

// Enough rows and tokens for the paths of prefill; two threads call with one pool at once.
bool same_prefill(const BdKernels *kernels, const BdKernels *oracle, std::mt19937 &random,
                  BdPool *pool) {
  for (const int64_t tokens : {11, 48, 55, 62}) {
    const Layer layer = random_layer(random, 290, 261, false);
    const std::vector<float> x = random_floats(random, tokens * layer.columns);
    const std::vector<float> expected = run(oracle, layer, x, 8, nullptr);
    if (!same(run(kernels, layer, x, 8, nullptr), expected)) return false;
    if (!same(run(kernels, layer, x, 8, pool), expected)) return false;
    if (!same_updates(kernels, layer, x, 8, pool)) return false;
  }
  return true;
}

bool compare(const BdKernels *kernels, unsigned seed, BdPool *pool) {
  const BdKernels *oracle = bd_kernels("scalar");
  std::mt19937 random(seed);
  for (const int64_t columns : {1, 15, 16, 17, 31, 64, 127, 263, 1030})
    for (const int64_t rows : {1, 31, 32, 33, 70})
      for (const int64_t tokens : {0, 1, 2, 3, 5, 6, 7, 13})
        for (const int bits : {8, 0}) {
          const Layer layer = random_layer(random, rows, columns, bits == 8 && rows == 70);
          std::vector<float> x = random_floats(random, tokens * columns);
          if (rows == 31 && tokens > 2) x[static_cast<size_t>(columns)] = NAN;
          const bool wrapped = bits == 8 && rows == 70;  // codes of 3: any result, no fault
          if (!same(run(kernels, layer, x, bits, pool), run(oracle, layer, x, bits, nullptr)) &&
              !wrapped)
            return false;
          std::vector<uint8_t> base3(static_cast<size_t>(bd_base3_bytes(rows, columns)));
          for (uint8_t &byte : base3) byte = static_cast<uint8_t>(random());
          if (!same(run_base3(kernels, layer, base3, x, pool),
                    run_base3(oracle, layer, base3, x, nullptr)))
            return false;
          if (run_unpack(kernels, layer, base3) != run_unpack(oracle, layer, base3)) return false;
          if (!wrapped && !same_updates(kernels, layer, x, bits, pool)) return false;
          if (!same_gate(kernels, oracle, random, tokens, columns)) return false;
          if (!same_head(kernels, oracle, random, tokens, rows, columns)) return false;
          if (!same_table(kernels, oracle, random, tokens, rows, columns, bits == 8 ? 8 : 4))
            return false;
        }
  return same_streams(kernels, oracle, random, pool) &&
         same_prefill(kernels, oracle, random, pool) && same_attention(kernels, oracle, random);
}

}  // namespace

int main(int count, char **arguments) {
  if (count > 1) {
    std::puts(bd_kernels(arguments[1]) != nullptr ? "yes" : bd_kernels_error(arguments[1]));
    return 0;
  }
  bool good = true;
  BdPool *pool = bd_pool_create(3);
  std::printf("best %s, compared", bd_kernels(nullptr)->name);
  for (int i = 0; bd_isa_name(i) != nullptr; ++i) {
    const BdKernels *kernels = bd_kernels(bd_isa_name(i));
    if (kernels == nullptr) continue;
    bool results[2] = {};
    std::thread other([&] { results[1] = compare(kernels, 2, pool); });
    results[0] = compare(kernels, 1, pool);
    other.join();
    good = good && results[0] && results[1];
    std::printf(" %s", kernels->name);
  }
  bd_pool_destroy(pool);
  std::puts(good ? "" : ": DIFFERENT");
  return good ? 0 : 1;
}
