"""What `bitdistill train` does before anything is trained, which a GPU would wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill.cli import NOT_FOR_TEXT

SCRIPT = """
import sys

from bitdistill import hardware
from bitdistill.cli import NOT_FOR_TEXT, main

hardware.start_compilers = lambda machine: print("transformers.modeling_utils" in sys.modules)
try:
    main(sys.argv[1:], prog_name="bitdistill")
except SystemExit as done:
    assert done.code == 0, done.code
for name in NOT_FOR_TEXT:
    try:
        __import__(name)
    except RuntimeError as error:
        print(error)
"""


def train_one_step(script: str, tmp_path: Path) -> list[str]:
    """Lines that `script` prints, its arguments those of a training of one step."""
    settings = ["base.steps=1", "base.batch_size=2", "machine.device=cpu", "machine.workers=0"]
    options = [part for setting in settings for part in ("--set", setting)]
    out = ["--recipe", "tiny", "--until", "base", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-c", script, "train", *out, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "packages")},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_imports_of_a_training(tmp_path: Path) -> None:
    """Compilers first; then transformers, which must not import what text does not need."""
    for name in NOT_FOR_TEXT:
        (tmp_path / "packages" / name).mkdir(parents=True)
        raising = f"raise RuntimeError({name!r})\n"
        (tmp_path / "packages" / name / "__init__.py").write_text(raising)
    path = str(tmp_path / "run" / "base")
    said = train_one_step(SCRIPT, tmp_path)
    assert said == ["False", "True", path, *NOT_FOR_TEXT]


AFTER_TRANSFORMERS = """
import sys

from transformers.utils import is_scipy_available

assert is_scipy_available()  # remembered, so hiding it now would be too late
from bitdistill.cli import main

main(sys.argv[1:], prog_name="bitdistill")
"""


def test_a_training_in_a_process_that_has_asked_transformers(tmp_path: Path) -> None:
    scipy = tmp_path / "packages" / "scipy"
    scipy.mkdir(parents=True)
    (scipy / "__init__.py").write_text('__version__ = "1.0"\n')
    (scipy / "optimize.py").write_text("linear_sum_assignment = None\n")
    assert train_one_step(AFTER_TRANSFORMERS, tmp_path) == [str(tmp_path / "run" / "base")]


COMPILERS = """
import os
import signal
from pathlib import Path

from bitdistill.hardware import start_compilers
from bitdistill.schema import Machine

start_compilers(Machine(device="cpu", compile=True))
tasks = Path("/proc/self/task").glob("*/children")
children = [child for task in tasks for child in task.read_text().split()]
for child in children:
    status = Path(f"/proc/{child}/status").read_text()
    ignored = int(status.split("SigIgn:")[1].split()[0], 16)
    print(bool(ignored >> (signal.SIGTERM - 1) & 1))
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="signals are read from /proc")
def test_compilers_outlive_what_ends_a_whole_job() -> None:
    """A trainer that waits for a kernel saves its state on SIGTERM; it needs the kernel first."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILERS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == {"True"}
