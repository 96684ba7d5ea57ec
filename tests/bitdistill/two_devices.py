"""What one device and two are compared by: on the CPU (test_distributed) and on GPUs (test_gpu)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from short_runs import log_of, stages_of

from bitdistill import checkpoint
from bitdistill.config import dump_config
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.training_state import saved_states

SCRIPT = Path(__file__).with_name("devices.py")
SHARED = ("accumulate=4", "steps=6")


def started_on_two(config: Config, out: Path, *more: str) -> subprocess.Popen[str]:
    """A run, or the rest of one that was interrupted."""
    file = out.with_suffix(".yaml")
    file.write_text(dump_config(config), encoding="utf-8")
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen(
        [sys.executable, "-m", *command, str(SCRIPT), str(file), str(out), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


class Ended(NamedTuple):
    returncode: int
    stderr: str


def ended(run: subprocess.Popen[str]) -> Ended:
    """What it came to, in four minutes at most."""
    try:
        _, errors = run.communicate(timeout=240)
    finally:
        run.kill()
    return Ended(run.returncode, errors)


def on_two_devices(config: Config, out: Path, *more: str) -> Ended:
    return ended(started_on_two(config, out, *more))


def shared_recipe(recipe: Callable[..., Config], *more: str) -> Config:
    """Two micro-batches a step and device, a corpus stage, records and states every few steps."""
    stages = ("teacher", "distill")
    options = [f"{stage}.{option}" for stage in stages for option in SHARED]
    text = ["pretrain.enabled=true", "pretrain.steps=3", "pretrain.accumulate=2"]
    sizes = ["pretrain.batch_size=2", "pretrain.max_length=16", "corpus.document_mask=true"]
    return recipe(*options, *text, *sizes, "machine.save_steps=3", *more)


def terms_of(out: Path) -> list[tuple[str, int, float, float]]:
    return [(r["stage"], r["step"], r["ce"], r["gradient_norm"]) for r in log_of(out)]


def same_student(one: Path, other: Path) -> None:
    weights = checkpoint.load(one / "student").state_dict()
    for name, value in checkpoint.load(other / "student").state_dict().items():
        error = (value - weights[name]).norm() / weights[name].norm()
        assert float(error) < 2e-3, name


def check_two_devices(config: Config, folder: Path) -> None:
    """The same steps at the same global batch, to fp32 sums in another order; then a resumption."""
    one, two, cut = (folder / name for name in ("one", "two", "cut"))
    train(config, one, quiet=True)
    done = on_two_devices(config, two)
    assert done.returncode == 0, done.stderr[-3000:]
    assert stages_of(two) == stages_of(one)
    for alone, shared in zip(terms_of(one), terms_of(two), strict=True):
        assert shared[:2] == alone[:2]
        assert shared[2:] == pytest.approx(alone[2:], rel=2e-3), alone
    for mine, both in zip(log_of(one), log_of(two), strict=True):
        assert both.keys() == mine.keys()
        assert both["tokens"] == mine["tokens"]
    same_student(one, two)

    done = on_two_devices(config, cut, "4")
    assert done.returncode != 0
    (state,) = saved_states(cut / "student.training")
    files = sorted(path.name for path in state.glob("model*.safetensors"))
    assert files == ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    train(config, cut, resume=True, quiet=True)  # on one device
    same_student(one, cut)
