"""The decoder's layers one after another, over batches that are held in memory.

Post-training quantisers change a layer and then look at what the next one receives. Running whole
models for that costs a forward pass for every linear; here each layer runs alone on the hidden
states that the layers before it left, whatever has been done to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitdistill.quantize import BitLinear, wide
from bitdistill.student import layers_of


class LayerWalk:
    """The state before layer `index` of a student: hidden states (B, T, D) of every batch."""

    def __init__(self, student: PreTrainedModel, batches: Iterable[dict[str, Tensor]]) -> None:
        self.layers = layers_of(student)
        self.index = 0
        self._hidden: list[Tensor] = []
        self._real: list[Tensor] = []  # flat (B * T,), False where a token is padding
        self._options: list[list[dict[str, Any]]] = []  # of each batch, for each layer
        for batch in batches:
            self._begin(student, batch)
        if not self._hidden:
            raise ValueError("no calibration batches; raise student.calibration_batches")

    @torch.no_grad()
    def _begin(self, student: PreTrainedModel, batch: dict[str, Tensor]) -> None:
        """What the layers are called with: masks and rotations do not depend on the weights."""
        first: list[Tensor] = []
        options: list[dict[str, Any]] = []

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not first:
                first.append(args[0])
            options.append(kwargs)

        handles = [
            layer.register_forward_pre_hook(record, with_kwargs=True) for layer in self.layers
        ]
        try:
            mask = batch["attention_mask"]
            student.model(input_ids=batch["input_ids"], attention_mask=mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._hidden += first
        self._real.append(mask.flatten().bool())
        self._options.append(options)

    @property
    def layer(self) -> nn.Module:
        """The layer that is next."""
        return self.layers[self.index]

    def linear(self, name: str) -> BitLinear:
        """A linear of that layer, such as `self_attn.q_proj`."""
        found = self.layer.get_submodule(name)
        assert isinstance(found, BitLinear)
        return found

    @torch.no_grad()
    def _run(self) -> Iterator[Tensor]:
        """The layer's output for each batch."""
        for hidden, options in zip(self._hidden, self._options, strict=True):
            out = self.layer(hidden, **options[self.index])
            yield out[0] if isinstance(out, tuple) else out

    def visit(self, name: str, use: Callable[[Tensor], None]) -> None:
        """Run the layer, and hand `use` what a linear multiplies: its real tokens (M, K), wide.

        That is the linear's input after its own norm, before activations are rounded.
        """
        linear = self.linear(name)
        with _inputs(linear, use, iter(self._real)):
            for _ in self._run():
                pass

    def step(self) -> None:
        """Go on to the next layer, with this one as it now is."""
        self._hidden = list(self._run())
        self.index += 1

    def __iter__(self) -> Iterator[int]:
        """The index of every layer, in order; `step` happens between them."""
        while self.index < len(self.layers):
            yield self.index
            self.step()


@contextmanager
def _inputs(
    linear: BitLinear, use: Callable[[Tensor], None], real: Iterator[Tensor]
) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0] if linear.norm is None else linear.norm(args[0])
        use(wide(x).flatten(0, -2)[next(real)])

    handle = linear.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
