// Apple's quantised Metal kernels, compiled as C++ and run on a CPU.
//
// MLX's wheels carry the source of their kernels, mlx/backend/metal/kernels/quantized.h, the same
// bytes for macOS and for Linux. What Metal has and C++ lacks is defined here: address spaces are
// nothing, half and bfloat are 16-bit storage that computes in float, and the threads of a
// threadgroup are fibres that take turns, so that simd_sum and its kin see all lanes of a
// simdgroup. MLX's matrix multiplication uses simdgroup matrices; in their place stands a plain
// loop, so of the prefill kernel the tiling and the unpacking are Apple's and the products are not.
//
// Built and called by test_metal_kernels.py. Not visible here: errors of Metal's own compiler, its
// fast-math, speed.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "metal_fibres.h"

using uint = unsigned int;
using ushort = unsigned short;

struct uint2 {
  uint x, y;
};
struct uint3 {
  uint x, y, z;
};
struct short2 {
  short x, y;
  short2(int a, int b) : x(short(a)), y(short(b)) {}
};
struct ulong2 {
  uint64_t x, y;
};
struct ulong3 {
  uint64_t x, y, z;
};

// A 16-bit float that is the upper half of an fp32, or an IEEE half; rounded to nearest even.
struct bfloat {
  uint16_t bits;
  bfloat() = default;
  bfloat(float value) {
    uint32_t u;
    std::memcpy(&u, &value, 4);
    bits = uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
  }
  operator float() const {
    const uint32_t u = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &u, 4);
    return value;
  }
};

struct half {
  uint16_t bits;
  half() = default;
  half(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float size = std::fabs(value);
    if (size >= 65520.0f) {
      bits = sign | 0x7C00;
      return;
    }
    int exponent = -24;  // of zero, which frexp gives none that serves here
    if (size > 0) std::frexp(size, &exponent);
    const int step = std::max(exponent - 11, -24);  // of the last place; -24: subnormal
    const int digits = int(std::nearbyint(std::ldexp(size, -step)));
    bits = sign | uint16_t(step == -24 ? digits : digits - 1024 + ((step + 25) << 10));
  }
  operator float() const {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    const float size = exponent == 0 ? std::ldexp(float(digits), -24)
                                     : std::ldexp(float(digits + 1024), exponent - 25);
    return bits & 0x8000 ? -size : size;
  }
};

namespace metal {
using std::abs;
using std::round;
// Metal's take mixed types.
template <typename A, typename B>
auto min(A a, B b) {
  return b < a ? b : a;
}
template <typename A, typename B>
auto max(A a, B b) {
  return a < b ? b : a;
}
template <typename A>
A select(A no, A yes, bool condition) {
  return condition ? yes : no;
}
template <bool condition, typename A, typename B>
using conditional_t = typename std::conditional<condition, A, B>::type;

inline int clamp(int value, int low, int high) { return std::min(std::max(value, low), high); }
inline float simd_sum(float value) { return fibres::sum(value, 0, fibres::kSimd); }
inline float quad_sum(float value) { return fibres::sum(value, fibres::current->lane & ~3, 4); }
inline float simd_shuffle_down(float value, int by) {
  const int lane = std::min(fibres::current->lane + by, fibres::kSimd - 1);
  return fibres::sum(value, lane, 1);
}
enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { fibres::wait(*fibres::threadgroup); }
}  // namespace metal

namespace mlx {
namespace steel {
// In place of the loader of x: every thread copies its share of a tile of rows.
template <typename T, int rows, int columns, int ld, int, int threads, int = 0, int = 0>
struct BlockLoader {
  const T *source;
  T *tile;
  int stride, thread;
  BlockLoader(const T *x, int k, T *to, ushort simdgroup, ushort lane)
      : source(x), tile(to), stride(k), thread(simdgroup * 32 + lane) {}
  void copy(int valid) const {
    for (int i = thread; i < rows * columns; i += threads) {
      const int r = i / columns, c = i % columns;
      tile[r * ld + c] = r < valid ? source[r * int64_t(stride) + c] : T(0.0f);
    }
  }
  void load_unsafe() const { copy(rows); }
  void load_safe(short2 valid) const { copy(valid.y); }
  void next() { source += columns; }
};

// In place of simdgroup matrices: the first thread multiplies whole tiles, in float.
template <typename T, typename U, int BM, int BN, int BK, int, int, bool, bool, int ldx, int ldw>
struct BlockMMA {
  bool first;
  std::vector<float> sums = std::vector<float>(BM * BN, 0.0f);
  BlockMMA(ushort simdgroup, ushort lane) : first(simdgroup + lane == 0) {}
  void mma(const T *x, const T *w) {
    for (int i = 0; first && i < BM * BN * BK; ++i) {
      const int m = i / (BN * BK), n = i / BK % BN, k = i % BK;
      sums[size_t(m * BN + n)] += float(x[m * ldx + k]) * float(w[n * ldw + k]);
    }
  }
  void store_result_safe(U *y, int stride, short2 valid) const {
    for (int i = 0; first && i < BM * BN; ++i)
      if (i % BN < valid.x && i / BN < valid.y)
        y[i / BN * int64_t(stride) + i % BN] = U(sums[size_t(i)]);
  }
  void store_result(U *y, int stride) const { store_result_safe(y, stride, short2(BN, BM)); }
};
}  // namespace steel
}  // namespace mlx

// Declared for kernels that are not run: strided batches, gathered experts, quantisation.
template <bool condition, typename A, typename B>
using ConditionalType = std::conditional<condition, A, B>;
template <typename T>
struct Limits;
float simd_min(float);
float simd_max(float);
int64_t elem_to_loc(uint, const int *, const int64_t *, int);
ulong3 elem_to_loc_broadcast(uint, const int *, const int64_t *, const int64_t *, const int64_t *,
                             int);
ulong2 elem_to_loc_broadcast(uint, const int *, const int64_t *, const int64_t *, int);
template <int>
bool schedule_row_tile(...);
template <bool, bool, bool, typename... Any>
void gemm_loop_unaligned(Any...);
template <typename... Any>
void gemm_loop_aligned(Any...);
template <typename... Any>
void gemm_loop_finalize(Any...);

#define device
#define constant
#define thread
#define threadgroup
#define METAL_FUNC inline
using namespace metal;
#include "mlx/backend/metal/kernels/quantized.h"
#undef device
#undef constant
#undef thread
#undef threadgroup

namespace {

struct Call {
  const uint32_t *w;
  const void *scales, *biases, *x;
  void *y;
  int K, N, M;
};

// Threads a threadgroup, and threadgroups along x and y.
using Task = std::function<void(uint3, int)>;
void launch(int threads, int across, int down, const Task &task) {
  for (int x = 0; x < across; ++x)
    for (int y = 0; y < down; ++y)
      fibres::run(threads, [&](int t) { task(uint3{uint(x), uint(y), 0}, t); });
}

int parts(int whole, int part) { return (whole + part - 1) / part; }

template <typename T, int group>
int run(const char *kernel, const Call &c) {
  const auto *s = static_cast<const T *>(c.scales), *b = static_cast<const T *>(c.biases);
  const auto *x = static_cast<const T *>(c.x);
  auto *y = static_cast<T *>(c.y);
  const std::string_view name(kernel);
  if (name == "qmv_fast") {
    launch(64, c.M, parts(c.N, 8), [&](uint3 tid, int t) {
      qmv_fast_impl<T, group, 2, true>(c.w, s, b, x, y, c.K, c.N, tid, uint(t / 32), uint(t % 32));
    });
  } else if (name == "qmv") {
    launch(64, c.M, parts(c.N, 8), [&](uint3 tid, int t) {
      qmv_impl<T, group, 2>(c.w, s, b, x, y, c.K, c.N, tid, uint(t / 32), uint(t % 32));
    });
  } else if (name == "qmv_wide") {
    launch(64, parts(c.M, 4), parts(c.N, 8), [&](uint3 tid, int t) {
      qmv_wide_impl<T, group, 2, 4, 8>(c.w, s, b, x, y, c.K, c.N, c.M, tid, uint(t / 32),
                                       uint(t % 32));
    });
  } else if (name == "qmv_quad" && (c.K == 64 || c.K == 128)) {
    int k = c.K;
    const auto kernel_of =
        k == 64 ? qmv_quad_impl<T, group, 2, 64> : qmv_quad_impl<T, group, 2, 128>;
    launch(32, c.M, parts(c.N, 64), [&](uint3 tid, int t) {
      kernel_of(c.w, s, b, x, y, k, c.N, tid, uint(t / 4), uint(t % 4));
    });
  } else if (name == "qmm_t") {
    std::vector<T> xs(32 * (32 + 16 / sizeof(T))), ws(xs.size());
    launch(128, parts(c.N, 32), parts(c.M, 32), [&](uint3 tid, int t) {
      qmm_t_impl<T, group, 2, false>(c.w, s, b, x, y, xs.data(), ws.data(), c.K, c.N, c.M, c.K, tid,
                                     uint(t), uint(t / 32), uint(t % 32));
    });
  } else if (name == "qmm_t_splitk") {
    // the kernel writes a sum for each part of K; MLX adds them in float and rounds once
    const int part = c.K % (2 * group) == 0 ? 2 * group : group, size = c.M * c.N;
    std::vector<float> sums(size_t(c.K / part * size)), whole(size_t(size), 0.0f);
    for (uint z = 0; z < uint(c.K / part); ++z)
      launch(128, parts(c.N, 32), parts(c.M, 32), [&](uint3 tid, int t) {
        affine_qmm_t_splitk<T, group, 2, false>(c.w, s, b, x, sums.data(), c.K, c.N, c.M, part,
                                                size, uint3{tid.x, tid.y, z}, uint(t), uint(t / 32),
                                                uint(t % 32));
      });
    for (size_t i = 0; i < sums.size(); ++i) whole[i % whole.size()] += sums[i];
    std::copy(whole.begin(), whole.end(), y);
  } else {
    return 1;
  }
  return 0;
}

template <typename T>
int run(const char *kernel, int group, const Call &call) {
  if (group == 128) return run<T, 128>(kernel, call);
  return group == 64 ? run<T, 64>(kernel, call) : run<T, 32>(kernel, call);
}

}  // namespace

// y (M, N) = x (M, K) times packed weights (N, K / 16); 0, or 1 for a kernel that is not here.
extern "C" int metal_matmul(const char *kernel, const char *type, int group, const uint32_t *w,
                            const void *scales, const void *biases, const void *x, void *y, int M,
                            int N, int K) {
  const Call call{w, scales, biases, x, y, K, N, M};
  switch (type[0]) {
    case 'f':
      return run<float>(kernel, group, call);
    case 'h':
      return run<half>(kernel, group, call);
    default:
      return run<bfloat>(kernel, group, call);
  }
}
