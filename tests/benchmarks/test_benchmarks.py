"""The scripts whose figures are published still run, on one device and on two."""

from __future__ import annotations

import json
import os
import runpy
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
