// One ternary layer in a peer's ggml, timed a pass at a time: benchmarks/kernel_peers.py builds
// this against the peer's own headers and libraries.
//
//   kernel_peers TYPE K N M THREADS COPIES
//
// It prints the bytes of one copy of the weights and the relative error of a result, then for each
// line on stdin the seconds of one pass: a graph of COPIES products of (M, K) floats with (N, K)
// weights of a ggml type, so that the quantisation of activations counts. Neighbouring products
// read different activations, because ik_llama.cpp would quantise common ones once for all. Copies
// lie in small pages, as a mapped file's weights do. Interfaces that differ between the forks of
// ggml are called by what they take.

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <sys/mman.h>

#include "ggml.h"
#if __has_include("ggml-cpu.h")
#include "ggml-cpu.h"
#endif

namespace {

constexpr int kInputs = 2;
constexpr float kScale = 0.02F;

[[noreturn]] void fail(const std::string &why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

struct Random {
  uint64_t state = 88172645463325252U;
  uint64_t operator()() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
};

ggml_type type_named(const std::string &name) {
  for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
    const char *known = ggml_type_name(static_cast<ggml_type>(type));
    if (known != nullptr && name == known) return static_cast<ggml_type>(type);
  }
  fail("this ggml has no type " + name);
}

template <class Quantize>
size_t quantize(Quantize chunk, ggml_type type, const float *from, void *to, int64_t n, int64_t k) {
  if constexpr (std::is_invocable_v<Quantize, ggml_type, const float *, void *, int64_t, int64_t,
                                    int64_t, const float *>) {
    return chunk(type, from, to, 0, n, k, nullptr);
  } else {
    return chunk(type, from, to, 0, n, k, nullptr, nullptr);
  }
}

template <class Plan>
ggml_cplan plan_of(Plan plan, ggml_cgraph *graph, int threads) {
  if constexpr (std::is_invocable_v<Plan, ggml_cgraph *, int, std::nullptr_t>) {
    return plan(graph, threads, nullptr);
  } else {
    return plan(graph, threads);
  }
}

char *small_pages(size_t size) {
  void *memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) fail("not enough memory for the weights");
  madvise(memory, size, MADV_NOHUGEPAGE);
  return static_cast<char *>(memory);
}

double relative_error(const std::vector<float> &w, const float *x, const float *y, int64_t n,
                      int64_t k) {
  double difference = 0, size = 0;
  for (int64_t row = 0; row < n; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += double(w[row * k + i]) * x[i];
    difference += (y[row] - sum) * (y[row] - sum);
    size += sum * sum;
  }
  return std::sqrt(difference / size);
}

}  // namespace

int main(int count, char **words) {
  if (count != 7) fail("usage: kernel_peers TYPE K N M THREADS COPIES");
  const int64_t k = std::atoll(words[2]), n = std::atoll(words[3]), m = std::atoll(words[4]);
  const int threads = std::atoi(words[5]), copies = std::atoi(words[6]);
#if __has_include("ggml-cpu.h")
  ggml_cpu_init();
#endif
  const size_t nodes = 4 * size_t(copies) + 16;
  const size_t memory = nodes * ggml_tensor_overhead() + ggml_graph_overhead_custom(nodes, false);
  ggml_context *context = ggml_init({memory, nullptr, /*no_alloc=*/true});
  const ggml_type type = type_named(words[1]);

  Random random;
  std::vector<float> w(n * k), y(m * n);
  for (float &value : w) value = kScale * (int(random() % 3) - 1);
  std::vector<float> x[kInputs];
  ggml_tensor *inputs[kInputs];
  for (int i = 0; i < kInputs; ++i) {
    x[i].resize(m * k);
    for (float &value : x[i]) value = float(random() >> 40) / (1 << 23) - 1;
    inputs[i] = ggml_new_tensor_2d(context, GGML_TYPE_F32, k, m);
    inputs[i]->data = x[i].data();
  }

  ggml_cgraph *graph = ggml_new_graph_custom(context, nodes, false);
  size_t bytes = 0, stride = 0;
  char *weights = nullptr;
  for (int i = 0; i < copies; ++i) {
    ggml_tensor *matrix = ggml_new_tensor_2d(context, type, k, n);
    if (i == 0) {
      bytes = ggml_nbytes(matrix);
      stride = (bytes + 4095) / 4096 * 4096;
      weights = small_pages(stride * copies + 4096);
      quantize(&ggml_quantize_chunk, type, w.data(), weights, n, k);
    } else {
      std::memcpy(weights + i * stride, weights, bytes);
    }
    matrix->data = weights + i * stride;
    ggml_tensor *product = ggml_mul_mat(context, matrix, inputs[i % kInputs]);
    product->data = y.data();
    ggml_build_forward_expand(graph, product);
  }
  ggml_cplan plan = plan_of(&ggml_graph_plan, graph, threads);
  std::vector<uint8_t> work(plan.work_size + 64);
  plan.work_data = work.data() + (64 - reinterpret_cast<uintptr_t>(work.data()) % 64) % 64;

  const auto pass = [&] {
    const auto start = std::chrono::steady_clock::now();
    if (ggml_graph_compute(graph, &plan) != GGML_STATUS_SUCCESS) fail("ggml_graph_compute failed");
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  pass();
  const int64_t last = m - 1;
  const std::vector<float> &given = x[(copies - 1) % kInputs];
  std::printf("%zu %.6f\n", bytes, relative_error(w, &given[last * k], &y[last * n], n, k));
  std::fflush(stdout);
  for (int letter = std::getchar(); letter != EOF; letter = std::getchar()) {
    if (letter != '\n') continue;
    std::printf("%.9f\n", pass());
    std::fflush(stdout);
  }
}
