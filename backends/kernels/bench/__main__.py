"""The command; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from bitdistill.backends.kernels import bench
from bitdistill.backends.kernels.bench.ceilings import Machine
from bitdistill.backends.kernels.bench.figures import Case
from bitdistill.backends.kernels.bench.measured import PairedFigure, ceiling_figures, measure
from bitdistill.backends.kernels.bench.rows import ROWS
from bitdistill.backends.kernels.binding import Kernels, available_isas
from bitdistill.backends.kernels.pool import Pool

SHAPES = [
    (1024, 2048), (1024, 1024), (2048, 1024), (1024, 3072), (3072, 1024), (2560, 9728),
    (9728, 2560),
]  # fmt: skip
TOKENS = [1, 4, 32, 128, 512]
QUICK_SHAPES, QUICK_TOKENS = [(1024, 3072)], [1, 128]
SLOWEST = 2e9  # products of one scalar layer that are still worth waiting for, a second or so


def _shape(text: str) -> tuple[int, int]:
    k, n = text.split("x")
    return int(k), int(n)


def _isas(name: str, chosen: list[str]) -> list[str]:
    """Instruction sets to measure a row with."""
    if ROWS[name].every_isa:
        return chosen
    return [Kernels().isa if name.startswith("ternary") else "-"]


def _cases(arguments: argparse.Namespace, threads: int) -> Iterator[Case]:
    """Implementations beside each other, so that a disturbance of the machine meets all."""
    grid = [(k, n, m) for k, n in arguments.shapes for m in arguments.tokens]
    for k, n, m in grid:
        for name in arguments.only:
            for isa in _isas(name, arguments.isa) if not ROWS[name].shapes else []:
                if isa != "scalar" or m * k * n < SLOWEST / 100:
                    yield Case(name, isa, threads, k, n, m)
    for name in arguments.only:
        shapes = ROWS[name].shapes[-1:] if arguments.quick else ROWS[name].shapes
        for k, n in shapes:
            for isa in _isas(name, arguments.isa):
                if isa != "scalar":
                    yield Case(name, isa, threads, k, n, 1)


def _figures(arguments: argparse.Namespace) -> Iterator[PairedFigure]:
    machine = Machine()
    for threads in arguments.threads:
        rows = []
        with Pool(threads) as pool, Pool(1) as one:
            for case in _cases(arguments, threads):
                row = ROWS[case.implementation]
                pools = [pool, one] if row.every_isa and threads > 1 else [pool]
                isa = arguments.isa[0] if case.isa == "-" else case.isa
                with row.ready(case) as opened:
                    rows.append(measure(case, opened, machine, pools, isa, arguments.seconds))
                yield rows[-1].figure()
        yield from ceiling_figures(rows)


def _cell(value: object) -> object:
    """Of the table: of quartiles the median."""
    return value[1] if isinstance(value, tuple) else "-" if value is None else value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bitdistill.backends.kernels.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one shape, within 40 seconds")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="+", help="values of M")
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="KxN")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    isas = available_isas()
    parser.add_argument("--isa", nargs="+", choices=isas, default=isas, help="of our rows")
    parser.add_argument("--seconds", type=float, help="of one row and its ceilings")
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    arguments.tokens = arguments.tokens or (QUICK_TOKENS if arguments.quick else TOKENS)
    if arguments.seconds is None:
        arguments.seconds = 0.1 if arguments.quick else 2.0
    return arguments


def main() -> None:
    """Print a table, or JSON lines, on stdout."""
    arguments = _arguments()
    form = "{:<16} {:<11} {:>7} {:>6} {:>7} {:>4} {:>13} {:>8} {:>12}"
    form += " {:>6} {:>7} {:>6} {:>7} {:>15} {:>19}"
    if not arguments.json:
        print(form.format(*PairedFigure.__dataclass_fields__))
    for figure in _figures(arguments):
        line = asdict(figure)
        print(json.dumps(line) if arguments.json else form.format(*map(_cell, line.values())))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
