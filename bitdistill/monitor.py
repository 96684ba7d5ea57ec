"""What a training run shows of itself besides its losses: trits that move, arithmetic, memory.

Numbers of every linear are lists over the layers, by kind: {"q_proj": [of layer 0, ...], ...}.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.decoder import head_width
from bitdistill.hardware import Hardware
from bitdistill.objective import Objective
from bitdistill.quantize import WEIGHT_EPS, BitLinear, ternarize, ternary_scale
from bitdistill.student import layers_of

# dense bf16 operations a second, by a part of the device's name
PEAK_OPERATIONS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}

BINS, REACH = 120, 3.0  # of histograms; rounding thresholds, +-0.5, are edges of bins
ByKind = dict[str, list[float]]


def _bit_linears_by_name(model: PreTrainedModel) -> dict[str, BitLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BitLinear)}


def forward_operations(model: PreTrainedModel, length: int) -> float:
    """Operations of a forward pass a token: 2 a matrix weight, head included, and attention.

    `length` is that of the sequences; causal attention reads half of it on average.
    """
    body = sum(p.numel() for p in layers_of(model).parameters() if p.ndim > 1)
    config = model.config
    width = config.num_attention_heads * head_width(config)
    attention = 2 * width * config.num_hidden_layers * length / 2
    return 2 * (body + model.lm_head.weight.numel() + attention)


class Monitor:
    """Reads a run's state every now and then, on the device that trains."""

    def __init__(self, objective: Objective, hardware: Hardware, *, sharded: bool) -> None:
        self.objective, self.hardware = objective, hardware
        # the trits of a part of a matrix cannot be known without the rest of it
        named = {} if sharded else _bit_linears_by_name(objective.student)
        self._layers = list(named.values())
        self._kinds = [name.rsplit(".", 1)[-1] for name in named]
        self._trits: list[Tensor] = []
        self.linears: dict[str, ByKind] = {}  # of the last call of `trits`
        name = torch.cuda.get_device_name(hardware.device) if hardware.cuda else ""
        self._peak = next((rate for part, rate in PEAK_OPERATIONS.items() if part in name), None)

    @torch.no_grad()
    def trits(self) -> dict[str, float]:
        """Share of zeros, and of trits that changed since the last call; nothing of a teacher."""
        if not self._layers:
            return {}
        trits = [ternarize(layer.weight)[0] for layer in self._layers]
        counts = {"zero_fraction": torch.stack([(t == 0).sum() for t in trits]).tolist()}
        if self._trits:
            pairs = zip(trits, self._trits, strict=True)
            changed = torch.stack([(now != before).sum() for now, before in pairs])
            counts["flip_rate"] = changed.tolist()
        self._trits = trits
        sizes = [t.numel() for t in trits]
        self.linears = {name: self._by_kind(count, sizes) for name, count in counts.items()}
        return {name: sum(count) / sum(sizes) for name, count in counts.items()}

    def _by_kind(self, counts: list[int], sizes: list[int]) -> ByKind:
        shares: ByKind = {}
        for kind, count, size in zip(self._kinds, counts, sizes, strict=True):
            shares.setdefault(kind, []).append(round(count / size, 6))
        return shares

    @torch.no_grad()
    def histogram(self) -> dict[str, list[int]]:
        """Master weights in units of their scale, by kind of linear: counts in BINS bins from
        -REACH to REACH, of which the outer ones hold what lies beyond. Empty for a teacher."""
        counts: dict[str, Tensor] = {}
        for kind, layer in zip(self._kinds, self._layers, strict=True):
            unit = layer.weight.float() / (ternary_scale(layer.weight) + WEIGHT_EPS)
            found = torch.histc(unit.clamp(-REACH, REACH), BINS, -REACH, REACH)
            counts[kind] = counts[kind] + found if kind in counts else found
        return {kind: [int(n) for n in found.tolist()] for kind, found in counts.items()}

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
