"""Implementation name -> the function that makes it ready. A new row is one entry here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from bitdistill.backends.kernels.bench import direct, heads, runtime
from bitdistill.backends.kernels.bench.figures import Case, Pass


@dataclass(frozen=True)
class Row:
    """`every_isa`: one line for each instruction set of ours, otherwise one line in all. A row with
    `shapes` is measured at those and M = 1 only, not at the grid of the layers."""

    ready: Callable[[Case], AbstractContextManager[Pass]]
    every_isa: bool = False
    shapes: tuple[tuple[int, int], ...] = ()


ROWS: dict[str, Row] = {
    "ternary-2bit": Row(direct.ternary_pass, every_isa=True),
    "ternary-base3": Row(direct.ternary_pass, every_isa=True),
    "head-int8": Row(heads.head, every_isa=True, shapes=heads.HEADS),
    "head-int4": Row(heads.head, every_isa=True, shapes=heads.HEADS),
    "head-16bit": Row(heads.half, every_isa=True, shapes=heads.HEADS),
    **{name: Row(runtime.session_pass) for name in runtime.LAYERS},
}
