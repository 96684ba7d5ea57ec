"""The kernels under other compilers, sanitizers, an old CPU, and as a wheel (all slow)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "backends" / "kernels"
DRIVER = Path(__file__).with_name("kernels_driver.cpp")
FUZZER = Path(__file__).with_name("kernels_fuzz.cpp")
X86 = os.uname().machine in ("x86_64", "amd64")
CROSS = "aarch64-linux-gnu-g++"
COMPILERS = [name for name in ("g++", "g++-11", "clang++") if shutil.which(name)]
STRICT = [
    "-std=c++17",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
    "-Wshadow",
    "-Werror",
]
AVX512 = ["-mavx2", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))]
# The machine flags of the kernels, by the start of a file's name, and the table they define.
MACHINE = {
    "avx2_ceilings": (["-mavx2", "-mfma"], None),
    "avx2_attention": (["-mavx2", "-mf16c", "-mfma"], None),
    "avx2_lookup": (["-mavx2", "-mf16c", "-mbmi2"], None),
    "avx2_": (["-mavx2", "-mf16c"], None),
    "avx_vnni_": (["-mavx2", "-mf16c", "-mavxvnni"], "BD_AVX_VNNI"),
    "avx512_vnni_": (AVX512, "BD_AVX512_VNNI"),
    "amx_": ([*AVX512, "-mamx-tile", "-mamx-int8"], "BD_AMX"),
}


def machine_flags(name: str, compiler: str) -> list[str]:
    """Of one source file; none for a file of another processor, which is empty."""
    if compiler == CROSS:
        return ["-march=armv8.2-a+dotprod"] if name.startswith("neon_") else []
    flags = [flags for start, (flags, _) in MACHINE.items() if name.startswith(start)]
    return flags[0] if X86 and flags else []


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def build_driver(compiler: str, folder: Path, *flags: str, driver: Path = DRIVER) -> Path:
    """Compile kernels (each file with its machine flags) and driver; warnings are errors."""
    x86 = X86 and compiler != CROSS
    objects = []
    tables = [f"-D{name}" for _, name in MACHINE.values() if x86 and name]
    for source in [*sorted(KERNELS.glob("*.cpp")), driver]:
        if not x86 and source.name.startswith(tuple(MACHINE)):
            continue
        machine = [*machine_flags(source.name, compiler), *tables]
        target = folder / f"{source.stem}.o"
        result = run(compiler, *STRICT, *flags, *machine, "-I", KERNELS, "-c", source, "-o", target)
        assert result.returncode == 0, result.stderr
        objects.append(target)
    program = folder / "driver"
    result = run(compiler, *flags, *objects, "-pthread", "-o", program)
    assert result.returncode == 0, result.stderr
    return program


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread", ""])
def test_tables_agree_under_sanitizers(compiler: str, sanitizers: str, tmp_path: Path) -> None:
    flags = ["-O3"]
    if sanitizers:
        flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    result = run(build_driver(compiler, tmp_path, *flags))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("best ")
    assert result.stdout.rstrip().endswith("scalar")


@pytest.mark.skipif("clang++" not in COMPILERS, reason="needs clang++")
def test_no_bytes_confuse_the_kernels(tmp_path: Path) -> None:
    """libFuzzer on every entry point that takes packed bytes, under both sanitizers."""
    flags = ("-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
    program = build_driver("clang++", tmp_path, *flags, driver=FUZZER)
    found = f"-artifact_prefix={tmp_path}/"  # else what crashed is written where pytest runs
    result = run(program, "-seed=1", "-runs=20000", "-max_total_time=60", "-max_len=600", found)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Done " in result.stderr


@pytest.mark.skipif(not X86, reason="x86-64 instructions")
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("sanitize", [False, True])
def test_kernels_that_this_cpu_may_lack(compiler: str, sanitize: bool, tmp_path: Path) -> None:
    """AMX emulated and AVX-VNNI in the other encoding of its instruction, against scalar."""
    flags = ["-O3"]
    if sanitize:
        flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    machine = ("avx2_", "avx_vnni_t", *(f"avx512_vnni_{part}" for part in "abht"))
    plain = ("attention", "dispatch", "scalar", "x86_tables", "avx2.", "work_memory", "emulated_m")
    sources = [path for path in KERNELS.glob("*.cpp") if path.name.startswith((*machine, *plain))]
    sources += [DRIVER.with_name(f"emulated_{part}.cpp") for part in ("driver", "main")]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    program = tmp_path / "driver"
    for source, target in zip(sources, objects, strict=True):
        more = [] if source.name.startswith(plain) else [*AVX512, "-mfma"]
        result = run(compiler, *STRICT, *flags, *more, "-I", KERNELS, "-c", source, "-o", target)
        assert result.returncode == 0, result.stderr
    result = run(compiler, *flags, *objects, "-pthread", "-o", program)
    assert result.returncode == 0, result.stderr
    result = run(program)
    if result.returncode == 2:
        pytest.skip("needs AVX-512 VNNI")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "amx: " in result.stdout


@pytest.mark.skipif(not (X86 and shutil.which("qemu-x86_64")), reason="needs qemu-x86_64")
def test_a_cpu_without_avx2_takes_the_scalar_path(tmp_path: Path) -> None:
    """Emulates a CPU of 2010: no illegal instruction, and a request for AVX2 is refused."""
    program = build_driver(COMPILERS[0], tmp_path, "-O2", "-static")
    emulator = ("qemu-x86_64", "-cpu", "Westmere", program)
    assert "this CPU lacks that instruction set" in run(*emulator, "avx2").stdout
    assert run(*emulator, "scalar").stdout.strip() == "yes"
    result = run(*emulator)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "best scalar, compared scalar"


@pytest.mark.skipif(
    not (shutil.which(CROSS) and shutil.which("qemu-aarch64")),
    reason=f"needs {CROSS} and qemu-aarch64",
)
@pytest.mark.parametrize(("cpu", "names"), [("max", "neon scalar"), ("cortex-a53", "scalar")])
def test_neon_agrees_with_the_oracle_under_emulation(cpu: str, names: str, tmp_path: Path) -> None:
    """A Cortex-A53 lacks the dot product and takes the scalar path."""
    program = build_driver(CROSS, tmp_path, "-O2", "-static")
    result = run("qemu-aarch64", "-cpu", cpu, program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip() == f"best {names.split()[0]}, compared {names}"


def test_the_wheel_holds_the_library(tmp_path: Path) -> None:
    result = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path,
        "-Cbuild-dir=" + str(tmp_path / "build"), "-Ccmake.define.BITDISTILL_WERROR=ON", ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("bitdistill/backends/kernels/libbitdistill_ops.") for name in names)
    assert "bitdistill/backends/kernels/__init__.py" in names
    assert not any(name.startswith(("backends/", "exporters/", "evals/")) for name in names)


def test_without_a_compiler_the_build_says_what_to_install(tmp_path: Path) -> None:
    cmake, make = shutil.which("cmake"), shutil.which("make")
    if cmake is None or make is None:
        pytest.skip("needs cmake and make")
    result = run(
        cmake, "-S", ROOT, "-B", tmp_path, "-G", "Unix Makefiles", f"-DCMAKE_MAKE_PROGRAM={make}",
        CXX="/nonexistent/c++", PATH=str(Path(cmake).parent),
    )  # fmt: skip
    assert result.returncode != 0
    assert "needs a C++17 compiler" in " ".join(result.stderr.split())
