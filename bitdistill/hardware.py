"""The device and arithmetic that a run resolves to."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

import torch
from torch import Tensor

from bitdistill.interrupt import ignored
from bitdistill.schema import Machine


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to change."""


@dataclass(frozen=True)
class Hardware:
    """The resolved device and arithmetic of a run."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def resolve(cls, machine: Machine) -> Hardware:
        """`auto` takes CUDA with bfloat16 where there is one, else the CPU in fp32."""
        name = machine.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise TrainingError("machine.device is cuda, but torch sees no GPU; use cpu or auto")
        if name == "mps" and not torch.backends.mps.is_available():
            raise TrainingError("machine.device is mps, but torch has no Metal; use cpu or auto")
        precision = machine.precision
        if precision == "auto":
            precision = "bfloat16" if name == "cuda" else "float32"
        device = torch.device(name)
        if name == "cuda":  # one process a device, as torchrun numbers them
            device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        return cls(device, getattr(torch, precision))

    @property
    def cuda(self) -> bool:
        """Whether kernels run on a CUDA device."""
        return self.device.type == "cuda"

    def wants(self, switch: bool | str) -> bool:
        """A setting that is true, false, or `auto`: on CUDA only."""
        return self.cuda if switch == "auto" else bool(switch)

    def autocast(self) -> torch.autocast:
        """The context in which a forward pass runs."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def move(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch on the device; from page-locked memory the copies do not wait."""
        if self.cuda:
            batch = {key: value.pin_memory() for key, value in batch.items()}
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


def start_compilers(machine: Machine) -> None:
    """Start the processes that compile kernels, if the run will compile; models load meanwhile.

    They take seconds to start, and until they run PyTorch compiles one kernel after the other. As
    they do with Ctrl-C, they ignore SIGTERM, which batch systems send to every process of a job: a
    trainer that still waits for a kernel saves first, and they end with it.
    """
    if not Hardware.resolve(machine).wants(machine.compile):
        return
    from torch._inductor.async_compile import AsyncCompile

    with ignored(signal.SIGTERM):  # new processes inherit it
        AsyncCompile.warm_pool()
        if hasattr(AsyncCompile, "use_process_pool"):  # newer ones wait for a first question
            AsyncCompile.use_process_pool()
