// An rtld-audit library (man 7 rtld-audit) that lets one shared object see a processor with AVX2
// and nothing newer; avx2_only.py builds it and sets its environment:
//
//   LD_AUDIT             this library
//   AVX2_ONLY_OBJECT     how the path of the object ends
//   AVX2_ONLY_CPUID      where its CPUID instructions are: hexadecimal virtual addresses, with
//   commas
//
// Before the object's constructors run, every one of these instructions (0F A2) becomes UD2 (0F
// 0B), whose signal executes CPUID and clears the bits of AVX-512, AVX-VNNI, AVX-IFMA and AMX. Only
// addresses of a disassembly are changed, because those two bytes also occur within other
// instructions.
#define _GNU_SOURCE
#include <cpuid.h>
#include <link.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(i) (1u << (i))
#define PUBLIC __attribute__((visibility("default")))

static void emulate(int signal_number, siginfo_t *info, void *context) {
  (void)info;
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *code = (const unsigned char *)registers[REG_RIP];
  if (code[0] != 0x0F || code[1] != 0x0B) {
    signal(signal_number, SIG_DFL);  // not ours: let it fault again
    return;
  }
  const uint32_t leaf = (uint32_t)registers[REG_RAX], subleaf = (uint32_t)registers[REG_RCX];
  uint32_t a, b, c, d;
  __cpuid_count(leaf, subleaf, a, b, c, d);
  if (leaf == 7 && subleaf == 0) {
    b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14));
    d &= ~(BIT(2) | BIT(3) | BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25));
  } else if (leaf == 7 && subleaf == 1) {
    a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23));
    d &= ~(BIT(4) | BIT(5) | BIT(8) | BIT(10) | BIT(19));  // and AVX10
  }
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

static void fail(const char *what) {
  fprintf(stderr, "avx2_only: %s\n", what);
  _exit(70);
}

static void replace(unsigned char *code) {
  const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
  void *start = (void *)((uintptr_t)code & ~(page - 1));
  const size_t size = (size_t)((uintptr_t)code + 2 - (uintptr_t)start);
  if (code[0] != 0x0F || code[1] != 0xA2) fail("no CPUID at an address that was given");
  if (mprotect(start, size, PROT_READ | PROT_WRITE | PROT_EXEC) != 0) fail("mprotect failed");
  code[1] = 0x0B;
  if (mprotect(start, size, PROT_READ | PROT_EXEC) != 0) fail("mprotect failed");
}

PUBLIC unsigned la_version(unsigned version) { return version; }

PUBLIC unsigned la_objopen(struct link_map *map, Lmid_t namespace, uintptr_t *cookie) {
  (void)namespace, (void)cookie;
  const char *object = getenv("AVX2_ONLY_OBJECT"), *addresses = getenv("AVX2_ONLY_CPUID");
  if (object == NULL || addresses == NULL) return 0;
  const size_t length = strlen(map->l_name), ending = strlen(object);
  if (length < ending || strcmp(map->l_name + length - ending, object) != 0) return 0;
  struct sigaction action = {0};
  action.sa_sigaction = emulate;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  if (sigaction(SIGILL, &action, NULL) != 0) fail("sigaction failed");
  char *end = (char *)addresses;
  while (*end != '\0') {
    replace((unsigned char *)map->l_addr + strtoull(end, &end, 16));
    if (*end == ',') ++end;
  }
  return 0;
}
