"""The measurement of what a node adds runs, and counts what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "op_overhead.py"


def test_a_node_takes_longer_than_its_kernel() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--columns", "64", "--rounds", "5"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (json.loads(text) for text in done.stdout.splitlines())
    assert (line["K"], line["threads"], line["rounds"]) == (64, 1, 5)
    assert 0 < line["kernel_us"] < line["node_us"]
