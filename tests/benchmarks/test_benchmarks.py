"""The scripts whose figures are published still run, on one device and on two."""

from __future__ import annotations

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def lines_of(*command: str) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_training_throughput(devices: int) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    script = [str(SCRIPTS / "training_throughput.py"), "--shape", "tiny", "--batch", "2"]
    more = ["--method", "distill", "--teacher", "tiny", "--teacher-bits", "8", "--relations"]
    sizes = ["--length", "16", "32", "--steps", "4", "--blocks", "1", "--accumulate", "2"]
    (record,) = lines_of(*(launch if devices > 1 else []), *script, *more, *sizes)
    assert record["devices"] == devices
    assert float(str(record["tokens_per_second"])) > 0
    seconds = float(str(record["ready_seconds"])), float(str(record["first_step_seconds"]))
    assert 0 < seconds[0] <= seconds[1]


def test_compare_losses(tmp_path: Path) -> None:
    for run, values in {"one": [2.0, 1.0], "two": [2.0, 1.1]}.items():
        (tmp_path / run).mkdir()
        records = [
            {"stage": "student", "step": i, "ce": x, "time": 0.0} for i, x in enumerate(values)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / run / "log.jsonl").write_text(text)
    compare = runpy.run_path(str(SCRIPTS / "compare_losses.py"))["compare"]
    (row,) = compare(tmp_path / "one", tmp_path / "two")
    assert (row["stage"], row["term"], row["records"]) == ("student", "ce", 2)
    assert row["largest"] == pytest.approx(0.1)
    assert row["mean"] == pytest.approx(0.05)


PROBE = """
#include <cpuid.h>
unsigned newer(void) {  // AVX-512F and AVX-VNNI; AVX2 must stay
  unsigned a, b, c, d, e;
  __cpuid_count(7, 0, a, b, c, d);
  e = b;
  if (a > 0) __cpuid_count(7, 1, a, b, c, d); else a = 0;
  return (e >> 16 & 1) + (a >> 4 & 1) + 2 * (~e >> 5 & 1);
}
"""
LOAD = """
import ctypes, os, sys
assert os.environ["BITDISTILL_ISA"] == "avx2"
print(ctypes.CDLL(sys.argv[1]).newer())
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("cc") and shutil.which("objdump")),
    reason="answers the CPUID of x86-64, with cc and objdump",
)
@pytest.mark.skipif(sys.platform != "linux", reason="rtld-audit")
def test_a_library_sees_avx2_and_nothing_newer(tmp_path: Path) -> None:
    probe = tmp_path / "probe.so"
    (tmp_path / "probe.c").write_text(PROBE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", probe, tmp_path / "probe.c"], check=True)
    found = runpy.run_path(str(SCRIPTS / "avx2_only.py"))
    variables = found["environment"](tmp_path, probe)
    assert len(variables["AVX2_ONLY_CPUID"].split(",")) >= 2
    command = [sys.executable, "-c", LOAD, str(probe)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_peers_are_grouped_by_instruction_set() -> None:
    show = runpy.run_path(str(SCRIPTS / "cpu_peers.py"))["show"]
    line = {
        "row": "ours", "isa": "avx2", "threads": 2, "prompt": 128, "rounds": [[200.0, 50.0]],
        "memory_mib": 300.0, "streamed_bytes": 10**8, "read_gbytes_per_s": 10.0,
    }  # fmt: skip
    peer = line | {"row": "peer", "rounds": [[100.0, 40.0]], "streamed_bytes": None}
    text = show([line, peer, line | {"isa": "avx512-vnni"}])
    assert "| peer | 100.0 | 40.0 | – | 300 | 2.00 / 1.25 |" in text
    assert "| ours | 200.0 | 50.0 | 50 % | 300 | 1.00 / 1.00 |" in text
    assert text.count("| row |") == 2
