"""Seconds and memory of an export to ONNX, with and without parity, of a real model's shape.

    python benchmarks/onnx_export.py --shape qwen3-0.6b --work runs/bench --parity \\
      --out docs/results/onnx-export.jsonl

Makes a student with random weights (random_student.py), or takes the one that is in --work, and
exports it in a process of its own. `seconds` are those of the export; `peak_mb` its largest
resident memory, and `bare_mb` what the process held before, its imports done; MB are 1e6 bytes.
`largest_mb` is the largest tensor in fp32. Files are read once before, in `read_s` seconds, so that
the work is timed and not the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lines import put

MB = 2**20 / 1e6  # in a MiB


def measure(student: Path, out: Path, options: dict[str, Any], parity: bool) -> dict[str, Any]:
    """Export in this process; seconds and MB."""
    import onnx_ir  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from bitdistill import checkpoint, exporters
    from bitdistill.evals import report
    from bitdistill.evals.environment import peak_memory

    files = checkpoint.open_student(student)
    start = time.perf_counter()
    for file in sorted(student.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass
    read = time.perf_counter() - start
    bare, start = peak_memory(), time.perf_counter()
    check = (lambda artifact: report(student, artifact)) if parity else None
    exporters.export(student, "onnx", out, check=check, **options)
    seconds, most = time.perf_counter() - start, peak_memory()
    spec = files.spec
    largest = 4 * max(spec.vocabulary * spec.hidden, math.prod(spec.shape("mlp.up_proj")))
    return {
        "seconds": round(seconds, 1), "read_s": round(read, 1), "peak_mb": round(most * MB, 1),
        "bare_mb": round(bare * MB, 1), "largest_mb": round(largest / 1e6, 1),
        "layers": len(spec.layers),
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--work", type=Path, required=True, help="where students are")
    parser.add_argument("--embed-bits", type=int, default=8)
    parser.add_argument("--weight-bits", type=float, default=2.0)
    parser.add_argument("--parity", action="store_true", help="measure parity as well")
    parser.add_argument("--out", type=Path, help="file to append to; stdout has the line as well")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    name = given.shape if given.layers is None else f"{given.shape}-{given.layers}-layers"
    student, own = given.work / name, {"embed_bits": given.embed_bits}
    own |= {"weight_bits": given.weight_bits}
    if given.here:
        with TemporaryDirectory(dir=given.work) as folder:
            print(json.dumps(measure(student, Path(folder) / "out", own, given.parity)))
        return
    from random_student import make

    from bitdistill.evals.environment import machine, versions

    given.work.mkdir(parents=True, exist_ok=True)
    make(given.shape, student, given.layers)
    command = [sys.executable, __file__, *sys.argv[1:], "--here"]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    line = {"shape": given.shape, "parity": given.parity, **own, **json.loads(answer.stdout)}
    line |= {"machine": machine(), "versions": versions()}
    put(line, given.out)


if __name__ == "__main__":
    main()
