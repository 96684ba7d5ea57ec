"""One optimizer step on a device: forward, backward, clip, update; on CUDA as a captured graph.

Training a small model is bound by the launching of kernels, thousands a step. A step whose shapes
have been seen before is therefore replayed as one CUDA graph. What a graph reads from outside lives
in tensors of fixed address: the batch, the learning rate, the share of quantisation.

Every shape's first steps run as usual, which lets compilers and libraries set themselves up; they
train like any other. Gradients live only within a step, so that graphs may share their memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitdistill.data import Batch
from bitdistill.distributed import (
    ALONE,
    World,
    exchange_gradients,
    hand_gradients,
    kept_whole,
)
from bitdistill.hardware import Hardware
from bitdistill.objective import Objective
from bitdistill.quantize import cache_weights, forget_weights

WARM_UP = 2  # steps of a shape before it is captured
MAX_GRAPHS = 64  # a shape beyond that many runs without one


class Engine:
    """Runs optimizer steps and sums up their terms; `graphs` replays steps as CUDA graphs.

    `parts` is what this device's optimizer moves (`own_parts` of the student).
    """

    def __init__(
        self,
        objective: Objective,
        parts: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        clip_norm: float,
        hardware: Hardware,
        world: World = ALONE,
        *,
        graphs: bool = False,
    ) -> None:
        self.objective, self.optimizer, self.clip_norm = objective, optimizer, clip_norm
        self.hardware, self.world = hardware, world
        self.totals: dict[str, Tensor] = {}
        named = dict(objective.student.named_parameters())
        self._trained = [named[name] for name in parts]
        self._parts = list(parts.values())
        self._whole = kept_whole(objective.student)
        self._graphs: dict[Any, _Captured] | None = {} if graphs else None
        # capture needs a stream of its own, and autograd remembers streams: all training uses it
        self._stream = torch.cuda.Stream() if graphs else None
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The context in which a run calls everything that touches the model."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def step(self, window: list[Batch], rate: float) -> None:
        """One update at a learning rate from prepared micro-batches (CPU tensors)."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        if self._graphs is None or len(window) > 1:
            self._run([self.hardware.move(batch) for batch in window])
            return
        key = self._key(window[0])
        captured = self._graphs.get(key)
        if captured is not None:
            for name, value in window[0].items():
                captured.batch[name].copy_(value.pin_memory(), non_blocking=True)
        elif len(self._graphs) < MAX_GRAPHS:
            captured = self._graphs[key] = _Captured(self.hardware.move(window[0]))
        if captured is None:
            self._run([self.hardware.move(window[0])])
        else:
            self._replay(captured)

    def forget_graphs(self) -> None:
        """The model computes differently from now on: capture its steps anew."""
        if self._graphs:
            self._graphs.clear()

    def _key(self, batch: Batch) -> Any:
        """What a graph holds fixed: the shapes, and the weight decay."""
        shapes = tuple((name, tuple(value.shape)) for name, value in batch.items())
        return shapes, tuple(group["weight_decay"] for group in self.optimizer.param_groups)

    def _replay(self, captured: _Captured) -> None:
        """The step of the batch that lies in the captured one's buffers."""
        if captured.graph is not None:
            captured.graph.replay()
        elif captured.seen < WARM_UP:
            captured.seen += 1
            self._run([captured.batch])
        else:
            captured.graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            # other threads (data) may allocate pinned memory meanwhile
            with torch.cuda.graph(
                captured.graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                self._run([captured.batch])
            captured.graph.replay()

    def _run(self, window: list[Batch]) -> None:
        """The step itself: a fixed sequence of kernels for the shapes of the batches."""
        sharded = self.world.size > 1
        cached = len(window) > 1 and not sharded  # a shard cannot be rounded without the others
        if cached:
            cache_weights(self.objective.student, self.hardware.dtype)
        for index, batch in enumerate(window):
            if sharded and len(window) > 1:
                exchange_gradients(self.objective, index == len(window) - 1, self._whole)
            with self.hardware.autocast():
                loss, terms = self.objective(batch)
            loss.backward()
            self._add(terms)
        if cached:
            forget_weights(self.objective.student)
        if sharded:
            hand_gradients(self._trained, self._parts)
        norm = self.world.clip_gradients(self._parts, self.clip_norm)
        self._add({"gradient_norm": norm})
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _add(self, terms: dict[str, Tensor]) -> None:
        for name, term in terms.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros_like(term)
            self.totals[name] += term

    def read(self, steps: int) -> dict[str, float]:
        """Mean terms of the last `steps` steps over all devices, which are then forgotten."""
        sums = self.world.sum([float(total) for total in self.totals.values()])
        parts = steps * self.world.size
        means = {name: value / parts for name, value in zip(self.totals, sums, strict=True)}
        for total in self.totals.values():
            total.zero_()
        return means


@dataclass
class _Captured:
    """The input buffers of one shape, how often it was seen, and its graph once there is one."""

    batch: Batch
    seen: int = 0
    graph: torch.cuda.CUDAGraph | None = None
