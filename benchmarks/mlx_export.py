"""Seconds, memory and bits per weight of an export to MLX, of students with random weights.

    python benchmarks/mlx_export.py --folder runs/random >> docs/results/mlx-export.jsonl

Students of the shapes are made in the folder, or found there. Each export has a process of its own:
`seconds` are those of `exporters.export`, which reads the file back and compares it but makes no
parity report, and `cpu_seconds` those of all its threads; `peak_mib` is the most memory that the
process held, `bare_mib` what it held before it began, libraries loaded. Bits per weight include
scales. `load_average` says how busy the machine was, and so which seconds to read. Prints JSON
lines.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import random_student
from shapes import SHAPES

from bitdistill import exporters, manifest
from bitdistill.evals.environment import peak_memory

PUBLISHED = ("smollm2-135m", "qwen3-0.6b")


def measure(student: Path, embed_bits: int) -> dict[str, Any]:
    """Export once, in this process."""
    # loaded before the clock starts
    from transformers import AutoTokenizer  # noqa: F401

    from bitdistill.exporters import to_mlx  # noqa: F401

    bare = peak_memory()
    with tempfile.TemporaryDirectory(dir=student.parent) as folder:
        start, busy = time.perf_counter(), time.process_time()
        artifact = exporters.export(student, "mlx", Path(folder) / "mlx", embed_bits=embed_bits)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        parts = manifest.read_manifest(artifact)["parts"]
    ending = "_bits_per_weight"
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(busy, 1),
        "peak_mib": round(peak_memory()),
        "bare_mib": round(bare),
        "file_mib": round(parts["total"] / 2**20, 1),
    } | {key.removesuffix(ending): round(parts[key], 3) for key in parts if key.endswith(ending)}


def in_fresh_process(student: Path, embed_bits: int) -> dict[str, Any]:
    """`measure` in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", str(student), "--embed-bits", str(embed_bits)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:  # its own words went to the standard error
        sys.exit(f"{student} could not be exported; the error is above")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=sorted(SHAPES), default=PUBLISHED)
    parser.add_argument("--layers", type=int, help="fewer than the shapes have")
    parser.add_argument("--embed-bits", nargs="+", type=int, default=[16, 8])
    parser.add_argument("--folder", type=Path, default=Path("runs/random"))
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(measure(options.one, *options.embed_bits)))
        return
    for shape in options.shape:
        name = shape if options.layers is None else f"{shape}-{options.layers}"
        student = random_student.make(shape, options.folder / name, options.layers)
        for bits in options.embed_bits:
            record = {"benchmark": "mlx-export", "shape": shape, "layers": options.layers}
            record |= {"embed_bits": bits} | in_fresh_process(student, bits)
            load = round(os.getloadavg()[0], 1)
            record |= {"cores": os.cpu_count(), "load_average": load, "mlx": version("mlx")}
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
