// libFuzzer: every entry point that takes packed bytes, on any bytes, in exactly sized heap
// buffers. The best table of this CPU must give the bits of the scalar one.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "bitdistill_kernels.h"

namespace {

// The input, read round and round.
class Bytes {
 public:
  Bytes(const uint8_t *data, size_t size) : data_(data), size_(size), at_(0) {}
  uint8_t next() { return size_ == 0 ? 0 : data_[at_++ % size_]; }
  int64_t up_to(int64_t most) { return next() * 256 % (most + 1) + next() % (most + 1) / 2; }
  template <class T>
  std::vector<T> array(int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    for (T &value : values) {
      uint8_t bytes[sizeof(T)];
      for (uint8_t &byte : bytes) byte = next();
      memcpy(&value, bytes, sizeof value);
    }
    return values;
  }

 private:
  const uint8_t *data_;
  size_t size_, at_;
};

struct Shape {
  int64_t rows, columns, tokens;
};

using Values = std::vector<float>;

Values ternary(const BdKernels *kernels, Bytes bytes, const Shape &shape, int bits, bool base3) {
  const auto packed =
      bytes.array<uint8_t>((base3 ? bd_base3_bytes : bd_packed_bytes)(shape.rows, shape.columns));
  const Values scale = bytes.array<float>(shape.rows);
  const Values x = bytes.array<float>(shape.tokens * shape.columns);
  // In layout 1 the code 3 may give any result; only faults are looked for then.
  const bool any = !base3 && bd_has_code_3(packed.data(), packed.size()) != 0;
  std::vector<char> scratch(bd_scratch_bytes(shape.tokens, shape.columns, bits) + 1);
  Values y(static_cast<size_t>(shape.tokens * shape.rows), 0.0f);
  const BdTernary w = {packed.data(), scale.data(), nullptr, shape.rows, shape.columns, 0, 0};
  const BdInput in = {x.data(), nullptr, 0.0f, shape.tokens, shape.columns};
  const BdTokens tokens = bd_tokens(scratch.data(), shape.tokens, shape.columns, bits);
  (bits == 8 ? kernels->quantize : kernels->normalize)(&in, &tokens, 0, shape.tokens);
  const auto product = base3       ? kernels->ternary_base3
                       : bits == 8 ? kernels->ternary
                                   : kernels->ternary_float;
  product(&w, &tokens, y.data(), 0, bd_blocks(shape.rows));
  return any ? Values() : y;
}

Values unpacked(const BdKernels *kernels, Bytes bytes, const Shape &shape) {
  const auto packed = bytes.array<uint8_t>(bd_base3_bytes(shape.rows, shape.columns));
  std::vector<uint8_t> out(static_cast<size_t>(bd_packed_bytes(shape.rows, shape.columns)));
  const BdTernary w = {packed.data(), nullptr, nullptr, shape.rows, shape.columns, 0, 0};
  kernels->unpack_base3(&w, out.data(), 0, bd_blocks(shape.rows));
  return Values(out.begin(), out.end());
}

Values quantised(const BdKernels *kernels, Bytes bytes, const Shape &shape, int bits) {
  const int64_t blocks = bd_table_blocks(shape.rows), groups = (shape.columns + 31) / 32;
  const auto codes =
      bytes.array<uint8_t>(bits == 8 ? shape.rows * shape.columns : blocks * groups * 256);
  const auto group_scale = bytes.array<int8_t>(bits == 8 ? 0 : blocks * groups * 16);
  const Values scale = bytes.array<float>(shape.rows);
  const Values x = bytes.array<float>(shape.tokens * shape.columns);
  const BdTable w = {codes.data(), group_scale.data(), scale.data(), shape.rows, shape.columns};
  std::vector<char> scratch(bd_head_scratch_bytes(shape.tokens, shape.columns, bits) + 1);
  const BdHeadTokens in = bd_head_tokens(scratch.data(), shape.tokens, shape.columns, bits);
  Values y(static_cast<size_t>(shape.tokens * shape.rows), 0.0f);
  bd_head_quantize(x.data(), &in, 0, shape.tokens);
  if (bits == 8)
    kernels->head->int8(&w, &in, y.data(), 0, shape.rows);
  else
    kernels->head->int4(&w, &in, y.data(), 0, blocks);
  const int64_t id = shape.rows - 1;
  Values row(static_cast<size_t>(shape.columns));
  (bits == 8 ? bd_gather_int8 : bd_gather_int4)(&w, &id, 1, row.data());
  y.insert(y.end(), row.begin(), row.end());
  return y;
}

Values half(const BdKernels *kernels, Bytes bytes, const Shape &shape) {
  const auto table = bytes.array<uint16_t>(shape.rows * shape.columns);
  const Values x = bytes.array<float>(shape.tokens * shape.columns);
  Values y(static_cast<size_t>(shape.tokens * shape.rows), 0.0f);
  const BdHalfTable w = {table.data(), shape.rows, shape.columns};
  kernels->head->half(&w, x.data(), shape.tokens, y.data(), 0, shape.rows);
  return y;
}

// Any floats: NaN, infinities and the largest among them.
Values gated(const BdKernels *kernels, Bytes bytes, const Shape &shape) {
  const Values x = bytes.array<float>(shape.tokens * shape.columns);
  const Values up = bytes.array<float>(shape.tokens * shape.columns);
  Values y(x.size(), 0.0f);
  const int activation = shape.rows % 2 == 0 ? BD_SILU : BD_GELU_TANH;
  const BdGate gate = {x.data(), up.data(), shape.columns, shape.columns, activation};
  kernels->gate(&gate, y.data(), 0, shape.tokens);
  return y;
}

Values run(const BdKernels *kernels, const Bytes &bytes, int entry, const Shape &shape) {
  switch (entry) {
    case 0:
      return ternary(kernels, bytes, shape, 8, false);
    case 1:
      return ternary(kernels, bytes, shape, 0, false);
    case 2:
      return ternary(kernels, bytes, shape, 8, true);
    case 3:
      return quantised(kernels, bytes, shape, 8);
    case 4:
      return quantised(kernels, bytes, shape, 4);
    case 5:
      return gated(kernels, bytes, shape);
    case 6:
      return unpacked(kernels, bytes, shape);
    default:
      return half(kernels, bytes, shape);
  }
}

bool same(const Values &a, const Values &b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return a.size() == b.size();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  Bytes bytes(data, size);
  const int entry = bytes.next() % 8;
  // Most often one token or a few; sometimes rows enough for several streams, or a prompt.
  const bool many = bytes.next() % 4 == 0;
  const Shape shape = {1 + bytes.up_to(many ? 200 : 70), 1 + bytes.up_to(many ? 300 : 150),
                       bytes.up_to(many ? 20 : 5)};
  const Values expected = run(bd_kernels("scalar"), bytes, entry, shape);
  for (int i = 0; bd_isa_name(i) != nullptr; ++i) {
    const BdKernels *kernels = bd_kernels(bd_isa_name(i));
    if (kernels != nullptr && !same(run(kernels, bytes, entry, shape), expected)) abort();
  }
  return 0;
}
