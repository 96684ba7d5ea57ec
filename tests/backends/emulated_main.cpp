// Runs emulated_driver.cpp where the processor can. Exit status 1 on a difference, 2 where it has
// no AVX-512 VNNI either. Compiled without those instructions, which a compiler may use anywhere.
int check_emulated();

int main() { return __builtin_cpu_supports("avx512vnni") ? check_emulated() : 2; }
