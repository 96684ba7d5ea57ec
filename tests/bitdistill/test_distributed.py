"""Two processes on the CPU (gloo): the same training as one, and states that change hands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import two_fits
from safetensors.torch import load_file
from short_runs import log_of
from two_devices import (
    check_two_devices,
    ended,
    on_two_devices,
    shared_recipe,
    started_on_two,
)
from two_fits import keep_weights, make_fit

from bitdistill import distributed, training
from bitdistill.distributed import World, own_parts
from bitdistill.schema import Config
from bitdistill.student import layers_of, make_student
from bitdistill.training_state import saved_states


@pytest.mark.slow
def test_two_devices_train_as_one(recipe: Callable[..., Config], tmp_path: Path) -> None:
    check_two_devices(shared_recipe(recipe), tmp_path)


@torch.no_grad()
def apart(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two students' tensors."""
    assert weights.keys() == others.keys()
    return max(float((w - others[n]).norm() / w.norm()) for n, w in weights.items())


def test_two_processes_train_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records, weights, and states that either world continues: two's own to the bit."""
    for name, value in two_fits.OFTEN.items():
        monkeypatch.setattr(training, name, value)
    one = make_fit(tmp_path / "one")
    one.run()
    keep_weights(one, tmp_path / "one.safetensors")
    command = [sys.executable, two_fits.__file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    alone, shared = log_of(tmp_path / "one"), log_of(tmp_path / "two")
    assert [record["step"] for record in shared] == [2, 4, 6, 8]
    clocks = {"seconds", "time", "tokens_per_second", "data_wait"}
    for one_record, two_record in zip(alone, shared, strict=True):
        assert two_record.pop("stage") == one_record.pop("stage")
        assert two_record.keys() == one_record.keys()
        for key in two_record.keys() - clocks:
            trits = 5e-4 if key in ("zero_fraction", "flip_rate") else 0  # few of 16,000
            assert two_record[key] == pytest.approx(one_record[key], rel=2e-3, abs=trits), key
    assert 0 < shared[-1]["flip_rate"] < 1
    before, last = shared[-2:]  # tokens of both, in the seconds between two records
    speed = (last["tokens"] - before["tokens"]) / (last["seconds"] - before["seconds"])
    assert last["tokens_per_second"] == pytest.approx(speed, rel=0.1)
    *trits, machine = json.loads((tmp_path / "seen.json").read_text())
    assert machine["peak_gib"] == 2
    one_machine = two_fits.machine_of(one)
    assert machine["utilisation"] == pytest.approx(one_machine["utilisation"] / 2)

    names = ("one", "two", "again", "taken", "continued")
    ends = {name: load_file(tmp_path / f"{name}.safetensors") for name in names}
    assert apart(ends["one"], ends["two"]) < 2e-3
    assert apart(ends["two"], ends["again"]) == 0
    assert apart(ends["one"], ends["continued"]) < 2e-3
    rest = make_fit(tmp_path / "one")
    rest.restore()
    assert apart(dict(rest.model.named_parameters()), ends["taken"]) == 0
    assert trits == two_fits.trits_of(rest)
    rest.state_dir = tmp_path / "two" / "student.training"
    rest.restore()
    rest.run()
    assert apart(ends["one"], dict(rest.model.named_parameters())) < 2e-3


@pytest.mark.slow
def test_a_signal_stops_two_processes(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """SIGTERM to torchrun: both save the same step and end; the rest is to the bit the same."""
    options = ("distill.steps=60", "machine.save_steps=20", "pretrain.enabled=false")
    config = shared_recipe(recipe, *options)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert on_two_devices(config, whole).returncode == 0
    run = started_on_two(config, cut)
    while not saved_states(cut / "student.training"):
        assert run.poll() is None
        time.sleep(0.02)
    run.terminate()
    stopped = ended(run)
    assert stopped.returncode != 0
    last = saved_states(cut / "student.training")[-1]
    step = json.loads((last / "position.json").read_text())["step"]
    assert 20 <= step < 60
    said = f"stage student was stopped at step {step} of 60 and its state saved"
    assert stopped.stderr.count(f"TrainingError: {said}") >= 2  # by both
    assert on_two_devices(config, cut).returncode == 0
    assert log_of(cut)[-1]["step"] == 60
    ends = [load_file(run / "student/model.safetensors") for run in (whole, cut)]
    assert apart(*ends) == 0


def test_parts_must_be_equal() -> None:
    world = World(rank=1, size=2)
    assert world.share(4, "accumulate") == 2
    with pytest.raises(ValueError, match="accumulate = 3 cannot be shared by 2 devices; give a"):
        world.share(3, "accumulate")


@pytest.mark.parametrize(("allowed", "sizes"), [(1, [1, 1]), (2**28, [2])])
def test_neighbours_are_gathered_together(
    allowed: int,
    sizes: list[int],
    make_teacher: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(make_teacher("qwen3"))
    monkeypatch.setattr(distributed, "GROUP_BYTES", allowed)
    groups = distributed.layer_groups(student)
    assert [len(group) for group in groups] == sizes
    assert [layer for group in groups for layer in group] == list(layers_of(student))


@pytest.mark.parametrize("rows", [8, 5, 1])
def test_parts_are_those_of_chunk(rows: int) -> None:
    whole = torch.arange(2 * rows).view(rows, 2)
    parts = [World(rank, 3).part(whole) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole)
    for part, chunk in zip(parts, whole.chunk(3), strict=False):
        assert torch.equal(part, chunk)


def test_clipping_is_pytorchs(make_teacher: Callable[..., Any]) -> None:
    student = make_student(make_teacher("qwen3"))
    parts = list(own_parts(student).values())
    for part in parts:
        part.grad = torch.full_like(part, 0.5)
    norm = float(World().clip_gradients(parts, 2.0))
    assert norm == pytest.approx(0.5 * sum(p.numel() for p in parts) ** 0.5)
    clipped = sum(float(p.grad.square().sum()) for p in parts if p.grad is not None) ** 0.5
    assert clipped == pytest.approx(2.0, rel=1e-5)


def test_a_skeleton_is_filled(make_teacher: Callable[..., Any]) -> None:
    """It has no weights of its own until the trained model's are collected, on the main process."""
    student = make_student(make_teacher("qwen3"))
    empty, other = distributed.skeleton(student), distributed.skeleton(student)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not any(buffer.is_meta for buffer in empty.buffers())
    distributed.collect(student, empty, World())
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert apart(dict(student.named_parameters()), dict(empty.named_parameters())) == 0
    ids = torch.arange(5).view(1, 5)
    assert torch.equal(empty(ids).logits, student(ids).logits)
    distributed.collect(student, other, World(1, 2))
    assert all(parameter.is_meta for parameter in other.parameters())


def test_alone_everything_is_local() -> None:
    world = World()
    assert world.sum([1.5, 2]) == [1.5, 2]
    assert world.gather({"a": 1}) == [{"a": 1}]
    assert not world.any(False)
    with pytest.raises(OSError, match="full"), world.phase():
        raise OSError("full")


def test_torchrun_says_who_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert World.from_environment() == World(3, 4)
    assert not World(3, 4).main
    assert torch.distributed.is_available()
