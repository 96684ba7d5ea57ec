"""What a training run shows of itself besides its losses: trits that move, arithmetic, memory.

Numbers of every linear are lists over the layers, by kind: {"q_proj": [of layer 0, ...], ...}.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.decoder import head_width
from bitdistill.distributed import ALONE, World
from bitdistill.hardware import Hardware
from bitdistill.objective import Objective
from bitdistill.quantize import WEIGHT_EPS, BitLinear, round_to_bf16, ternarize, ternary_scale
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
    """Reads a run's state every now and then, on the devices that train.

    `parts` are this device's rows of the student's parameters, by name (`own_parts`); every device
    has to ask at the same steps, and is given the numbers of all.
    """

    def __init__(
        self,
        objective: Objective,
        hardware: Hardware,
        parts: dict[str, Tensor],
        world: World = ALONE,
    ) -> None:
        self.objective, self.hardware, self.world = objective, hardware, world
        named = _bit_linears_by_name(objective.student)
        self._kinds = [name.rsplit(".", 1)[-1] for name in named]
        self._weights = [parts[f"{name}.weight"] for name in named]
        self._sizes = [layer.weight.numel() for layer in named.values()]  # of whole matrices
        self._trits: list[Tensor] = []
        self.linears: dict[str, ByKind] = {}  # of the last call of `trits`
        name = torch.cuda.get_device_name(hardware.device) if hardware.cuda else ""
        self._peak = next((rate for part, rate in PEAK_OPERATIONS.items() if part in name), None)

    @torch.no_grad()
    def trits(self) -> dict[str, float]:
        """Share of zeros, and of trits that changed since the last call; nothing of a teacher."""
        if not self._weights:
            return {}
        pairs = zip(self._weights, self._scales(), strict=True)
        trits = [ternarize(weight, scale)[0] for weight, scale in pairs]
        found = [(t == 0).sum() for t in trits]
        if self._trits:
            found += [(a != b).sum() for a, b in zip(trits, self._trits, strict=True)]
        self._trits = trits
        counts, matrices = self.world.sum(torch.stack(found).tolist()), len(trits)
        shares = {"zero_fraction": counts[:matrices]}
        if len(counts) > matrices:
            shares["flip_rate"] = counts[matrices:]
        self.linears = {name: self._by_kind(count) for name, count in shares.items()}
        return {name: sum(count) / sum(self._sizes) for name, count in shares.items()}

    def _scales(self) -> list[Tensor]:
        """D of every matrix, of which the devices add up their parts' magnitudes."""
        if self.world.size == 1:
            return [ternary_scale(weight) for weight in self._weights]
        sums = torch.stack([weight.float().abs().sum() for weight in self._weights])
        totals = zip(self.world.sum(sums.tolist()), self._sizes, strict=True)
        means = torch.tensor([total / size for total, size in totals], device=sums.device)
        return list(round_to_bf16(means))

    def _by_kind(self, counts: list[float]) -> ByKind:
        shares: ByKind = {}
        for kind, count, size in zip(self._kinds, counts, self._sizes, strict=True):
            shares.setdefault(kind, []).append(round(count / size, 6))
        return shares

    @torch.no_grad()
    def histogram(self) -> dict[str, list[int]]:
        """Master weights in units of their scale, by kind of linear: counts in BINS bins from
        -REACH to REACH, of which the outer ones hold what lies beyond. Empty for a teacher."""
        if not self._weights:
            return {}
        counts: dict[str, Tensor] = {}
        for kind, weight, scale in zip(self._kinds, self._weights, self._scales(), strict=True):
            unit = weight.float() / (scale + WEIGHT_EPS)
            found = torch.histc(unit.clamp(-REACH, REACH), BINS, -REACH, REACH)
            counts[kind] = counts[kind] + found if kind in counts else found
        sums = iter(self.world.sum(torch.cat(list(counts.values())).tolist()))
        return {kind: [int(next(sums)) for _ in range(BINS)] for kind in counts}

    def machine(self, tokens: int, length: int, seconds: float) -> dict[str, float]:
        """Peak memory (GiB) of the device that had most, and the share of the devices' bf16 rate
        that the models' own arithmetic takes: forward and backward of the student, forward of the
        teacher. `tokens` are those of all devices."""
        if not self.hardware.cuda:
            return {}
        peak = torch.cuda.max_memory_allocated(self.hardware.device) / 2**30
        read = {"peak_gib": max(self.world.gather(peak))}
        if self._peak is not None:
            operations = 3 * forward_operations(self.objective.student, length)
            if self.objective.teacher is not None:
                operations += forward_operations(self.objective.teacher, length)
            read["utilisation"] = operations * tokens / seconds / self._peak / self.world.size
        return read
