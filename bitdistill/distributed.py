"""Several devices, one process each, as `torchrun` starts them: who this is, and what all agree on.

Parameters, gradients and optimizer state are sharded by PyTorch's FSDP2 (`fully_shard`): one group
a decoder layer, and one for the rest. Master weights travel in fp32, because trits are taken from
them as they are. Everything else here is a few numbers that every process must know alike: counts,
whether to save or stop, whether a file was written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bitdistill.hardware import Hardware
from bitdistill.student import layers_of

BACKEND = "cpu:gloo,cuda:nccl"


class PeerError(RuntimeError):
    """Another process of the run failed; its own message says why."""


@dataclass(frozen=True)
class World:
    """This process among those of a run."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says; alone without it."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @contextmanager
    def joined(self, hardware: Hardware) -> Iterator[None]:
        """Within it the processes can talk to each other."""
        if self.size == 1 or dist.is_initialized():
            yield
            return
        dist.init_process_group(BACKEND if hardware.cuda else "gloo")
        try:
            yield
        finally:
            dist.destroy_process_group()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value, summed over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """The JSON-like value of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def phase(self) -> Iterator[None]:
        """All processes do this, or all fail: an error in one raises PeerError in the others."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerError("another process of this run failed; its message says why")

    def share(self, total: int, what: str) -> int:
        """This process' part of `total`; ValueError unless all parts are equal."""
        if total % self.size:
            raise ValueError(
                f"{what} = {total} cannot be shared by {self.size} devices; give a multiple of "
                f"{self.size} (a smaller batch_size keeps the product)"
            )
        return total // self.size


ALONE = World()


def shard(objective: nn.Module, student: nn.Module, device: torch.device) -> None:
    """Shard the student's parameters over all devices; the objective is the root group."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in layers_of(student):
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def exchange_gradients(objective: nn.Module, now: bool) -> None:
    """Whether the next backward pass exchanges gradients: once a step, after the last batch."""
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(now)


def local(tensor: Tensor) -> Tensor:
    """This device's part of a tensor (all of one that is not sharded)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(parameter: Tensor, full: Tensor) -> Tensor:
    """This device's part of a whole tensor, sharded as `parameter` is and on its device.

    FSDP2 cuts the first dimension as `torch.chunk` does; the last parts may be smaller or empty.
    """
    if not isinstance(parameter, DTensor) or full.ndim == 0:
        return full.to(parameter.device, copy=True)
    mesh = parameter.device_mesh
    rows = -(-len(full) // mesh.size())
    mine = full[mesh.get_local_rank() * rows :][:rows].to(parameter.device, copy=True)
    return DTensor.from_local(
        mine,
        mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def collect(sharded: nn.Module, into: nn.Module) -> None:
    """Copy every parameter of a sharded model into a whole one of the same names, on the CPU."""
    targets = dict(into.named_parameters())
    for name, parameter in sharded.named_parameters():
        targets[name].copy_(whole(parameter.detach()))
