"""Two processes on the CPU (gloo): the same training as one, and states that change hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from two_devices import check_two_devices, shared_recipe

from bitdistill.distributed import World
from bitdistill.schema import Config


@pytest.mark.slow
def test_two_devices_train_as_one(recipe: Callable[..., Config], tmp_path: Path) -> None:
    check_two_devices(shared_recipe(recipe), tmp_path)


def test_parts_must_be_equal() -> None:
    world = World(rank=1, size=2)
    assert world.share(4, "accumulate") == 2
    with pytest.raises(ValueError, match="accumulate = 3 cannot be shared by 2 devices; give a"):
        world.share(3, "accumulate")


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
