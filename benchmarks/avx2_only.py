"""Run a command as on a processor that has AVX2 and nothing newer: ours, and onnxruntime.

    python benchmarks/avx2_only.py python benchmarks/cpu_peers.py time ...

A comparison at one instruction set on a processor that has more. Our kernels are told by
BITDISTILL_ISA. onnxruntime asks the processor itself, with no way to tell it otherwise, so each of
its CPUID instructions is answered without AVX-512, AVX-VNNI and AMX (avx2_only.c, compiled into a
temporary directory; x86-64 Linux with cc and objdump). Programs that were built for an instruction
set, as llama-bench, are what they were built as.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
ISA = "avx2"


def onnxruntime_object() -> Path:
    """The shared object with onnxruntime's kernels."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("onnxruntime is not installed")
    return next(Path(spec.origin).parent.glob("capi/onnxruntime_pybind11_state*.so"))


def cpuid_addresses(disassembly: str) -> list[str]:
    """Hexadecimal addresses of CPUID in what `objdump -d --no-show-raw-insn` prints."""
    lines = (line.split() for line in disassembly.splitlines())
    return [words[0].rstrip(":") for words in lines if words[1:] == ["cpuid"]]


def environment(directory: Path, found: Path) -> dict[str, str]:
    """Variables for a process that loads `found`; the library that they name is in `directory`."""
    library = directory / "avx2_only.so"
    build = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run([*build, "-o", library, SOURCE], check=True)
    listing = ["objdump", "-d", "--no-show-raw-insn", found]
    disassembly = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    return {
        "BITDISTILL_ISA": ISA,
        "LD_AUDIT": str(library),
        "AVX2_ONLY_OBJECT": found.name,
        "AVX2_ONLY_CPUID": ",".join(cpuid_addresses(disassembly)),
    }


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        variables = os.environ | environment(Path(directory), onnxruntime_object())
        return subprocess.run(sys.argv[1:], env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
