// The C ABI that is the same for every instruction set, and the choice among them.
#include <stdio.h>
#include <stdlib.h>

#include "common.h"
#include "cpu.h"
#include "x86_tables.h"

#if BD_X86
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if BD_ARM && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace bitdistill {
#if BD_X86
namespace {

struct Registers {
  uint32_t a, b, c, d;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r = {0, 0, 0, 0};
#if defined(_MSC_VER)
  int v[4] = {};
  __cpuid(v, 0);
  if (static_cast<uint32_t>(v[0]) < leaf) return r;
  __cpuidex(v, static_cast<int>(leaf), static_cast<int>(subleaf));
  r = {static_cast<uint32_t>(v[0]), static_cast<uint32_t>(v[1]), static_cast<uint32_t>(v[2]),
       static_cast<uint32_t>(v[3])};
#else
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
#endif
  return r;
}

// The register state the operating system saves on a context switch.
uint64_t saved_state() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
#endif
}

bool bit(uint32_t word, int i) { return (word >> i & 1) != 0; }

// Linux saves the 8 KiB of tile registers only for a process that has asked for it, once.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

CpuFeatures read_features() {
  const Registers basic = cpuid(1, 0);
  const Registers extended = cpuid(7, 0);
  const uint64_t state = bit(basic.c, 27) ? saved_state() : 0;
  const bool ymm = (state & 0x6) == 0x6;
  const bool zmm = (state & 0xe6) == 0xe6;
  const bool tiles = (state & 0x60000) == 0x60000;
  const bool avx512 =
      bit(extended.b, 16) && bit(extended.b, 17) && bit(extended.b, 30) && bit(extended.b, 31);
  CpuFeatures features = {};
  features.avx2 = ymm && bit(extended.b, 5);
  features.f16c = ymm && bit(basic.c, 29);
  features.fma = ymm && bit(basic.c, 12);
  features.bmi2 = bit(extended.b, 8);
  features.avx_vnni = ymm && extended.a >= 1 && bit(cpuid(7, 1).a, 4);
  features.avx512_vnni = zmm && avx512 && bit(extended.c, 11);
  features.amx = tiles && bit(extended.d, 24) && bit(extended.d, 25) && tiles_permitted();
  return features;
}

}  // namespace

CpuFeatures cpu_features() {
  static const CpuFeatures features = read_features();
  return features;
}
#elif BD_ARM && defined(__linux__)
CpuFeatures cpu_features() {
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  CpuFeatures features = {};
  features.dot_product = (getauxval(AT_HWCAP) & kDotProduct) != 0;
  return features;
}
#elif BD_ARM && defined(__APPLE__)
CpuFeatures cpu_features() {
  CpuFeatures features = {};
  features.dot_product = true;  // every Apple silicon Mac
  return features;
}
#else
CpuFeatures cpu_features() { return {}; }
#endif
}  // namespace bitdistill

namespace {

using Provider = const BdKernels *(*)();

// Best first: a new instruction set is one file and one row.
constexpr Provider kProviders[] = {
#if BD_ARM
    bitdistill::neon_kernels,
#endif
#if defined(BD_AMX)
    bitdistill::amx_kernels,
#endif
#if defined(BD_AVX512_VNNI)
    bitdistill::avx512_vnni_kernels,
#endif
#if defined(BD_AVX_VNNI)
    bitdistill::avx_vnni_kernels,
#endif
#if BD_X86
    bitdistill::avx2_kernels,
#endif
    bitdistill::scalar_kernels,
};
constexpr int kCount = static_cast<int>(sizeof kProviders / sizeof kProviders[0]);

const BdKernels *find(const char *name) {
  for (const Provider provider : kProviders)
    if (strcmp(provider()->name, name) == 0) return provider();
  return nullptr;
}

const BdKernels *best() {
  for (const Provider provider : kProviders)
    if (provider()->supported() != 0) return provider();
  return nullptr;  // not reached: scalar is always supported
}

const char *requested() {
  static const char *const name = getenv("BITDISTILL_ISA");
  return name != nullptr && name[0] != '\0' ? name : nullptr;
}

const BdKernels *chosen() {
  static const BdKernels *const kernels = requested() != nullptr ? bd_kernels(requested()) : best();
  return kernels;
}

void list_names(char *text, size_t size) {
  size_t used = 0;
  text[0] = '\0';
  for (int i = 0; i < kCount && used < size; ++i)
    used += static_cast<size_t>(
        snprintf(text + used, size - used, "%s%s", i == 0 ? "" : ", ", bd_isa_name(i)));
}

int64_t stride_of(int64_t columns) {
  // A line more than a multiple of 64, so that tokens of power-of-two width do not all fall into
  // the same cache set.
  return (columns + 63) / 64 * 64 + 64;
}

size_t align8(size_t bytes) { return (bytes + 7) / 8 * 8; }

}  // namespace

extern "C" {

const BdKernels *bd_kernels(const char *isa) {
  if (isa == nullptr) return chosen();
  const BdKernels *kernels = find(isa);
  return kernels != nullptr && kernels->supported() != 0 ? kernels : nullptr;
}

const char *bd_kernels_error(const char *isa) {
  static thread_local char text[256];
  if (bd_kernels(isa) != nullptr) return "";
  const char *name = isa != nullptr ? isa : requested();
  const char *from = isa != nullptr ? "" : "BITDISTILL_ISA=";
  char names[96];
  list_names(names, sizeof names);
  if (find(name) == nullptr)
    snprintf(text, sizeof text,
             "%s%.40s is not an instruction set of this bitdistill library; it has: %s", from, name,
             names);
  else
    snprintf(text, sizeof text,
             "%s%.40s: this CPU lacks that instruction set, or its operating system keeps it; "
             "unset it to use the best one here",
             from, name);
  return text;
}

const char *bd_isa_name(int i) { return i >= 0 && i < kCount ? kProviders[i]()->name : nullptr; }

int bd_abi_version(void) { return BD_ABI_VERSION; }

int64_t bd_blocks(int64_t rows) { return (rows + BD_BLOCK_ROWS - 1) / BD_BLOCK_ROWS; }

int64_t bd_packed_bytes(int64_t rows, int64_t columns) {
  return bd_blocks(rows) * groups_of(columns) * BD_BLOCK_BYTES;
}

size_t bd_scratch_bytes(int64_t tokens, int64_t columns, int activation_bits) {
  const size_t m = static_cast<size_t>(tokens);
  const size_t stride = static_cast<size_t>(stride_of(columns));
  if (activation_bits == 0) return m * stride * sizeof(float);
  return m * stride + align8(m * sizeof(float)) + align8(m * sizeof(int32_t));
}

BdTokens bd_tokens(void *scratch, int64_t tokens, int64_t columns, int activation_bits) {
  BdTokens out = {nullptr, nullptr, nullptr, nullptr, tokens, columns, stride_of(columns)};
  if (activation_bits == 0) {
    out.values = static_cast<float *>(scratch);
    return out;
  }
  const size_t m = static_cast<size_t>(tokens);
  char *bytes = static_cast<char *>(scratch);
  out.down = reinterpret_cast<float *>(bytes);
  bytes += align8(m * sizeof(float));
  out.sum = reinterpret_cast<int32_t *>(bytes);
  bytes += align8(m * sizeof(int32_t));
  out.q = reinterpret_cast<int8_t *>(bytes);
  return out;
}

int64_t bd_base3_bytes(int64_t rows, int64_t columns) {
  return bd_blocks(rows) * base3_groups(columns) * BD_BLOCK_BYTES;
}

int bd_has_no_trits(const uint8_t *packed, size_t bytes) {
  int found = 0;  // x = byte * 243 / 256 is the number whose byte is ceil(x * 256 / 243)
  for (size_t i = 0; i < bytes; ++i)
    found |= ((packed[i] * 243 >> 8) * 256 + 242) / 243 != packed[i];
  return found;
}

int bd_has_code_3(const uint8_t *packed, size_t bytes) {
  uint8_t found = 0;
  for (size_t i = 0; i < bytes; ++i) found |= packed[i] & (packed[i] >> 1) & 0x55;
  return found != 0;
}

}  // extern "C"
