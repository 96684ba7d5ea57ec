"""What a training run shows of itself besides its losses: trits that move, arithmetic, memory."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.hardware import Hardware
from bitdistill.objective import Objective
from bitdistill.quantize import bit_linears, ternarize
from bitdistill.student import layers_of

# dense bf16 operations a second, by a part of the device's name
PEAK_OPERATIONS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}


def forward_operations(model: PreTrainedModel, length: int) -> float:
    """Operations of a forward pass a token: 2 a matrix weight, head included, and attention.

    `length` is that of the sequences; causal attention reads half of it on average.
    """
    body = sum(p.numel() for p in layers_of(model).parameters() if p.ndim > 1)
    config = model.config
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    attention = 2 * width * config.num_hidden_layers * length / 2
    return 2 * (body + model.lm_head.weight.numel() + attention)


class Monitor:
    """Reads a run's state every now and then, on the device that trains."""

    def __init__(self, objective: Objective, hardware: Hardware, *, sharded: bool) -> None:
        self.objective, self.hardware = objective, hardware
        # the trits of a part of a matrix cannot be known without the rest of it
        self._layers = [] if sharded else bit_linears(objective.student)
        self._trits: list[Tensor] = []
        name = torch.cuda.get_device_name(hardware.device) if hardware.cuda else ""
        self._peak = next((rate for part, rate in PEAK_OPERATIONS.items() if part in name), None)

    @torch.no_grad()
    def trits(self) -> dict[str, float]:
        """Share of zeros, and of trits that changed since the last call; nothing of a teacher."""
        if not self._layers:
            return {}
        trits = [ternarize(layer.weight)[0] for layer in self._layers]
        weights = sum(t.numel() for t in trits)
        zeros = torch.stack([(t == 0).sum() for t in trits]).sum()
        shares = {"zero_fraction": float(zeros) / weights}
        if self._trits:
            pairs = zip(trits, self._trits, strict=True)
            changed = torch.stack([(now != before).sum() for now, before in pairs]).sum()
            shares["flip_rate"] = float(changed) / weights
        self._trits = trits
        return shares

    def machine(self, tokens: int, length: int, seconds: float) -> dict[str, float]:
        """Peak memory (GiB), and the share of the device's bf16 rate that the models' own
        arithmetic takes: forward and backward of the student, forward of the teacher."""
        if not self.hardware.cuda:
            return {}
        read = {"peak_gib": torch.cuda.max_memory_allocated(self.hardware.device) / 2**30}
        if self._peak is not None:
            operations = 3 * forward_operations(self.objective.student, length)
            if self.objective.teacher is not None:
                operations += forward_operations(self.objective.teacher, length)
            read["utilisation"] = operations * tokens / seconds / self._peak
        return read
