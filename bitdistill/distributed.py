"""Several devices, one process each, as `torchrun` starts them: who this is, and what all agree on.

Parameters, gradients and optimizer state are sharded by PyTorch's FSDP2 (`fully_shard`): a group
for each few decoder layers, and one for the rest. Master weights travel in fp32, because trits are
taken from them as they are. Clipping, optimizer and saved states work on plain tensors, a device's
own parts: through DTensors they took more of a step than the model. Everything else here is a few
numbers that every process must know alike: counts, whether to save or stop, whether a file was
written.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from bitdistill.hardware import Hardware, TrainingError
from bitdistill.student import layers_of

BACKEND = "cpu:gloo,cuda:nccl"
GROUP_BYTES = 2**28  # of weights gathered at a time, while those before compute
LOCK_SECONDS = 60.0  # that the first process waits for a lock before it tells the others
WHOLE_BYTES = 2**32  # of a student whose weights are gathered once a step and then kept
Module = TypeVar("Module", bound=nn.Module)


def _acquire(lock: FileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    return True


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

    @contextmanager
    def locked(self, file: Path, *, wait: bool = True) -> Iterator[None]:
        """Within it this run holds a lock that others wait for.

        Without `wait`, TrainingError where another process holds it.
        """
        lock = FileLock(file)
        held = False
        while not self.any(held):  # again and again: no collective may take half an hour
            with self.phase():
                if self.main:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    held = _acquire(lock, LOCK_SECONDS if wait else 0)
                    if not held and not wait:
                        raise TrainingError(
                            f"another training is writing to {file.parent}; wait until it ends, "
                            "or choose another --out"
                        )
        try:
            yield
        finally:
            if self.main:
                lock.release()

    def share(self, total: int, what: str) -> int:
        """This process' part of `total`; ValueError unless all parts are equal."""
        if total % self.size:
            raise ValueError(
                f"{what} = {total} cannot be shared by {self.size} devices; give a multiple of "
                f"{self.size} (a smaller batch_size keeps the product)"
            )
        return total // self.size

    def part(self, full: Tensor) -> Tensor:
        """This process' rows of a whole tensor, as FSDP2 cuts it: like `torch.chunk`, so that the
        last parts may be smaller or empty."""
        if full.ndim == 0:
            return full
        rows = -(-len(full) // self.size)
        return full[self.rank * rows :][:rows]

    def clip_gradients(self, parts: Sequence[Tensor], limit: float) -> Tensor:
        """Scale gradients down to a common norm of `limit` at most; the norm before, 0-d."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in parts if p.grad is not None])
        if self.size > 1:
            square = norm.square()
            dist.all_reduce(square)
            norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(parts, limit, norm)
        return norm


ALONE = World()


def layer_groups(student: nn.Module) -> list[list[nn.Module]]:
    """Neighbouring layers that are gathered together: of GROUP_BYTES or little more, or one."""
    groups: list[list[nn.Module]] = []
    size = GROUP_BYTES
    for layer in layers_of(student):
        if size >= GROUP_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += bytes_of(layer)
    return groups


def bytes_of(module: nn.Module) -> int:
    """Of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())


def kept_whole(student: nn.Module) -> bool:
    """Whether gathered weights stay until the step's last backward pass, for small students."""
    return bytes_of(student) <= WHOLE_BYTES


def shard(objective: nn.Module, student: nn.Module, device: torch.device) -> None:
    """Shard the student's parameters over all devices; the objective is the root group.

    What is not on the device yet is moved there a group at a time, by FSDP2: the whole student
    never lies on one.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    freed = not kept_whole(student)
    for group in layer_groups(student):
        fully_shard(group, mesh=mesh, reshard_after_forward=freed)
    fully_shard(objective, mesh=mesh)


def exchange_gradients(objective: nn.Module, now: bool, whole: bool) -> None:
    """Whether the next backward pass exchanges gradients, as is the rule: once a step.

    Until then weights that are kept `whole` stay gathered. It walks through all modules.
    """
    assert isinstance(objective, FSDPModule)
    objective.set_requires_gradient_sync(now)
    objective.set_reshard_after_backward(now or not whole)


def local(tensor: Tensor) -> Tensor:
    """This device's part of a tensor (all of one that is not sharded)."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the devices if it is sharded; each of them has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_parts(model: nn.Module) -> dict[str, Tensor]:
    """What this device trains, by name: parameters, or its parts of them in the same memory."""
    return {
        name: local(p.detach()) if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
        if p.requires_grad
    }


@torch.no_grad()  # else a DTensor's part would be one more step of autograd's
def hand_gradients(parameters: Iterable[Tensor], parts: Iterable[Tensor]) -> None:
    """Give each part the gradient of its parameter, which then has none."""
    for parameter, part in zip(parameters, parts, strict=True):
        part.grad = None if parameter.grad is None else local(parameter.grad)
        parameter.grad = None


def skeleton(model: Module) -> Module:
    """A copy whose parameters are shapes without memory, for `collect` to fill."""
    shapes: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, shapes)


@torch.no_grad()
def collect(sharded: nn.Module, into: nn.Module, world: World) -> None:
    """Give the first process' skeleton of a sharded model its parameters, on the CPU.

    All processes have to help; the others' skeletons stay empty.
    """
    shapes, filled = dict(into.named_parameters()), {}
    for name, parameter in sharded.named_parameters():  # one at a time
        full = whole(parameter.detach())
        if world.main:
            filled[id(shapes[name])] = nn.Parameter(full.cpu(), parameter.requires_grad)
    for module in into.modules() if world.main else ():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, filled[id(parameter)])  # tied ones stay tied
