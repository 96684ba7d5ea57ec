"""How fast the kernels are, beside this machine's ceilings and ONNX Runtime's own operators.

    python -m bitdistill.backends.kernels.bench [--quick] [--json] [--threads 1 2] [--tokens 1 128]
        [--shapes 1024x3072] [--only ternary-2bit ort-fp32] [--isa avx2]

One line a measurement: implementation, isa, threads, K, N, M, microseconds, gops, gbytes_per_s; and
what the row was beside the ceilings of its own moments: the number of rounds, and

    of_read            its weight bytes a second over those of ceiling-read
    of_fma, of_int8    its operations a second over those of ceiling-fma, ceiling-int8
    over_one_thread    its rate over that of one thread (our rows and ceilings, several threads)
    fma_over_one_thread    that of ceiling-fma in these rounds: below the threads' number, the host
                       gave less than as many cores

each as lower quartile, median and upper quartile over the rounds (the table shows the median), null
where there is none. A round samples the ceilings, the row, and where it is compared with one thread
the same again there, all within a fraction of a second: what another guest of the host slows down
for longer, it slows down in both.

    ceiling-read       160 MB of small pages read once, in the fastest of a few ways
    ceiling-fma        fp32 fused multiply-adds of operands in registers
    ceiling-int8       products of int8 and their sums, likewise
                       (medians over all rounds of the rows on as many threads, which they follow)
    ternary-2bit       our kernel through its C interface, each instruction set, on its own threads,
                       quantising included
    ternary-base3      five trits a byte, likewise
    head-int8, -int4   LM heads at M = 1, every instruction set but scalar
    head-16bit
    ternary-2bit-ort   the same as an operator of ONNX Runtime, best instruction set
    ort-fp32           ONNX Runtime's MatMul
    ort-int8           DynamicQuantizeMatMul
    ort-4bit, -2bit    MatMulNBits, block 128, accuracy level 4
    ort-2bit-lut       the same with mlas.use_lut_gemm

Threads take parts of a ceiling as they come, so that a slower core does not hold the other up.
ceiling-fma and -int8 are of the row's instruction set, or of the first `--isa` for ONNX Runtime's.

Weights of a layer are repeated, each copy in memory of its own, and used in turn, until they exceed
the caches (or, where arithmetic binds, for enough work): they stream from memory as they do in a
model. Memory is of small pages, as of a mapped file. `microseconds` is one layer, the median over
rounds; gops counts a multiply and an add; gbytes_per_s is the weight bytes read once.

`--isa` and BITDISTILL_ISA say what our rows use, not what ONNX Runtime does; in a clone,
benchmarks/avx2_only.py limits both.

Modules: figures (cases and lines), ceilings, paired (rounds and ratios), measured (a row beside its
ceilings), direct and heads (the C interface), runtime (ONNX Runtime), rows (implementation name ->
function), __main__ (the command).
"""
