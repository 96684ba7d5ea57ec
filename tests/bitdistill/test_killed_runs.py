"""A whole run, killed again and again, ends with what it would have ended with."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from bitdistill import checkpoint
from bitdistill.schema import Config


@pytest.mark.slow
def test_a_run_killed_at_random_points(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """SIGKILL again and again, --resume each time: the student is the uninterrupted run's."""
    config = recipe(
        *("teacher.steps=60", "distill.steps=60", "machine.save_steps=1", "pretrain.enabled=true"),
        *("pretrain.steps=60", "machine.workers=2", "machine.threads=1"),
    )
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "bitdistill", "train", "--recipe", str(file), "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    out, generator, kills = tmp_path / "run", random.Random(), 0
    while not (out / "student").exists():
        run = subprocess.Popen(
            [*command, str(out), "--resume"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        _wait_for_progress(out, run)
        if kills < 5:
            time.sleep(generator.uniform(0.0, 1.5))
            kills += run.poll() is None
            run.kill()
        _, errors = run.communicate()
        assert run.returncode in (0, -signal.SIGKILL), errors.decode()
    assert kills >= 3
    whole, resumed = (checkpoint.load(tmp_path / name / "student") for name in ("whole", "run"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert not list(out.glob("*.training"))


def _wait_for_progress(out: Path, run: subprocess.Popen[bytes]) -> None:
    """Until the run has saved a state or written a stage that was not there when it began."""
    began = set(out.glob("*/step-*")) | set(out.glob("*/bitdistill.json"))
    while run.poll() is None:
        if (set(out.glob("*/step-*")) | set(out.glob("*/bitdistill.json"))) - began:
            return
        time.sleep(0.02)
