"""Run by torchrun in test_distributed.py: a recipe, and at STEP of its last stage an interruption.

With STEP every layer is gathered alone, twice a micro-batch; without it neighbours are gathered
together, once a step.

torchrun --nproc_per_node 2 devices.py CONFIG.yaml OUT [STEP]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from bitdistill import distributed
from bitdistill.config import load_config
from bitdistill.recipe import train
from bitdistill.training import Fit


def interrupt_at(step: int) -> None:
    optimize = Fit.optimize

    def stopping(self: Fit, window: Any) -> None:
        if self.name == "student" and self.step == step:
            raise KeyboardInterrupt
        optimize(self, window)

    Fit.optimize = stopping  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 3:
        interrupt_at(int(sys.argv[3]))
        distributed.GROUP_BYTES, distributed.WHOLE_BYTES = 1, 0
    train(load_config(sys.argv[1], []), Path(sys.argv[2]), quiet=True, resume=True)
