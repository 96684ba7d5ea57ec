"""A row beside the ceilings of its own moments, and the ceilings of a run, as lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from bitdistill.backends.kernels.bench.ceilings import READS, Machine, products, read_of
from bitdistill.backends.kernels.bench.figures import Case, Figure, Pass, figure_of
from bitdistill.backends.kernels.bench.paired import Quartiles, Rounds, Sample, ratios, take_turns
from bitdistill.backends.kernels.pool import Pool

CEILINGS = ("read", "fma", "int8")


@dataclass(frozen=True)
class PairedFigure(Figure):
    """A line with its ratios, as quartiles over `rounds`; None where there is no such ceiling."""

    rounds: int
    of_read: Quartiles | None = None
    of_fma: Quartiles | None = None
    of_int8: Quartiles | None = None
    over_one_thread: Quartiles | None = None
    fma_over_one_thread: Quartiles | None = None


@dataclass(frozen=True)
class Measured:
    """Rates a second in each round: layers of a case ("layer") and CEILINGS, on its threads and,
    where that was asked for, on one thread (else empty)."""

    case: Case
    isa: str  # of the ceilings
    weight_bytes: int
    rates: Rounds
    one_thread: Rounds

    def figure(self) -> PairedFigure:
        """The line of the case."""
        case, layers = self.case, self.rates["layer"]
        operations = 2 * case.M * case.K * case.N
        line = figure_of(case, 1 / statistics.median(layers), self.weight_bytes)
        return PairedFigure(
            **asdict(line),
            rounds=len(layers),
            of_read=self._of("read", self.weight_bytes),
            of_fma=self._of("fma", operations),
            of_int8=self._of("int8", operations),
            over_one_thread=self._over_one_thread("layer"),
            fma_over_one_thread=self._over_one_thread("fma"),
        )

    def _over_one_thread(self, name: str) -> Quartiles | None:
        if name not in self.one_thread:
            return None
        return ratios(self.rates[name], self.one_thread[name])

    def _of(self, ceiling: str, amount: int) -> Quartiles | None:
        """`amount` is what a layer takes of the ceiling's operations or bytes."""
        if ceiling not in self.rates:
            return None
        return ratios(self.rates["layer"], self.rates[ceiling], amount)


def _samples(opened: Pass, machine: Machine, pool: Pool, isa: str) -> dict[str, Sample]:
    """The layer between ceilings. The reads behind it empty the caches of its weights."""
    layers = {"layer": lambda: opened.copies / opened.run(pool)}
    return products(pool, isa) | layers | machine.reads(pool)


def _settled(rounds: Rounds) -> Rounds:
    """With one "read" for all the ways to read."""
    others = {name: rates for name, rates in rounds.items() if name not in READS}
    return others | {"read": read_of(rounds)}


def measure(
    case: Case, opened: Pass, machine: Machine, pools: Sequence[Pool], isa: str, seconds: float
) -> Measured:
    """Rounds of a case on the first of `pools` and, where there is a second, of one thread, on that
    one too, with the ceilings of `isa` on each."""
    samples = [_samples(opened, machine, pool, isa) for pool in pools]
    named = {f"{i} {name}": s for i, each in enumerate(samples) for name, s in each.items()}
    for pool in pools:
        opened.run(pool)  # warms up
    rounds = take_turns(named, seconds)
    settled = [
        _settled({name: rounds[f"{i} {name}"] for name in each}) for i, each in enumerate(samples)
    ]
    return Measured(case, isa, opened.weight_bytes, settled[0], dict(*settled[1:]))


def ceiling_figures(rows: Sequence[Measured]) -> Iterator[PairedFigure]:
    """ceiling-read, then ceiling-fma and ceiling-int8 of each instruction set that has them:
    medians over all rounds of rows on as many threads."""
    yield _ceiling("read", "-", rows)
    for isa in dict.fromkeys(row.isa for row in rows):
        for name in CEILINGS[1:]:
            having = [row for row in rows if row.isa == isa and name in row.rates]
            if having:
                yield _ceiling(name, isa, having)


def _ceiling(name: str, isa: str, rows: Sequence[Measured]) -> PairedFigure:
    rates = [rate for row in rows for rate in row.rates[name]]
    compared = [row for row in rows if name in row.one_thread]
    over = (
        ratios(
            [rate for row in compared for rate in row.rates[name]],
            [rate for row in compared for rate in row.one_thread[name]],
        )
        if compared
        else None
    )
    giga = 1e-9 * statistics.median(rates)
    gops, gbytes = (0.0, round(giga, 3)) if name == "read" else (round(giga, 2), 0.0)
    return PairedFigure(
        f"ceiling-{name}", isa, rows[0].case.threads, 0, 0, 0, 0.0, gops, gbytes, len(rates),
        over_one_thread=over,
    )  # fmt: skip
