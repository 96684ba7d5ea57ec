"""Two processes on the CPU (gloo): the same training as one, and states that change hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from two_devices import check_two_devices, shared_recipe

from bitdistill import distributed
from bitdistill.distributed import World, own_parts
from bitdistill.schema import Config
from bitdistill.student import layers_of, make_student


@pytest.mark.slow
def test_two_devices_train_as_one(recipe: Callable[..., Config], tmp_path: Path) -> None:
    check_two_devices(shared_recipe(recipe), tmp_path)


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
