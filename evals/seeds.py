"""A table over training seeds, made from results alone: what a recipe gives, not what a run gave.

For every task, split and metric: methods, the mean over seeds, each seed's figure, and the mean
difference to the FP16 teacher of the same seed (Δ FP16). Its interval is the mean of the seeds'
paired 95 % intervals: the seeds share their examples, so the mean's own interval is no wider. It
says what other examples could give; how far seeds are apart, their figures say.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.tables import DECIMALS, MISSING, SECONDARY, TASK_METRICS, Grid

TEACHER = "fp16-sft"
EXACT = " in fp64"  # how the precision of a row that only serves as a floor ends
METRICS = [m for m in TASK_METRICS if m not in (*SECONDARY, "agreement", "bleu", "rougeLsum")]
HEADER = ["Task", "Metric", "Method", "Mean", "Seeds", "Δ FP16", "95 %", "fp64 flips"]
Seed = int | None


@dataclass
class SeedRow:
    """One method on one metric: results by training seed, None for what was not trained here."""

    task: str
    split: str
    metric: str
    method: str
    backend: str
    variant: str = ""
    by_seed: dict[Seed, Result] = field(default_factory=dict)
    teachers: dict[Seed, Result] = field(default_factory=dict)  # of the same task and metric
    differences: dict[Seed, Result] = field(default_factory=dict)  # to those, where paired
    changed: dict[Seed, int] = field(default_factory=dict)  # predictions, by fp64

    @property
    def label(self) -> str:
        """Method, with its variant and its backend where they are not the usual."""
        name = self.method if self.backend == "torch" else f"{self.method} ({self.backend})"
        return f"{name}: {self.variant}" if self.variant else name

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(r.value for r in self.by_seed.values())

    @property
    def difference(self) -> float | None:
        """The mean difference to the teacher of the same seed, over seeds that have one."""
        pairs = [(r, self.teachers[s]) for s, r in self.by_seed.items() if s in self.teachers]
        if self.method == TEACHER or not pairs:
            return None
        return fmean(mine.value - theirs.value for mine, theirs in pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean difference; None unless every seed's was paired."""
        found = [self.differences[s].interval for s in self.by_seed if s in self.differences]
        known = [interval for interval in found if interval is not None]
        if not known or len(known) < len(self.by_seed):
            return None
        low, high = (fmean(ends) for ends in zip(*known, strict=True))
        return low, high

    @property
    def majority(self) -> float | None:
        """Percent that the most frequent label scores."""
        details = next(iter(self.by_seed.values())).details
        if self.metric != "accuracy" or "confusion" not in details:
            return None
        counts = [sum(row) for row in details["confusion"]]
        return 100 * max(counts) / sum(counts)


def seed_rows(results: Iterable[Result]) -> list[SeedRow]:
    """Rows in order of task, metric and first appearance; of two runs of a seed the later wins.

    ValueError where no result has a task's metric.
    """
    rows: dict[tuple[str, ...], SeedRow] = {}
    found = list(results)
    for r in found:
        if r.metric in METRICS and not r.precision.endswith(EXACT):
            key = (r.task, r.split, r.metric, r.method, r.backend, r.variant)
            rows.setdefault(key, SeedRow(*key)).by_seed[r.seed] = r
    if not rows:
        raise ValueError("there are no scores to show by seed; run `bitdistill eval` first")
    for row in rows.values():
        row.by_seed = dict(sorted(row.by_seed.items(), key=lambda item: (item[0] is None, item[0])))
        teacher = (row.task, row.split, row.metric, TEACHER, "torch")
        theirs = rows.get((*teacher, row.variant)) or rows.get((*teacher, ""))
        row.teachers = theirs.by_seed if theirs else {}
        for r in found:
            same = (r.task, r.split, r.method, r.backend, r.variant) == key_of(row)
            mine = row.by_seed.get(r.seed)
            if not same or mine is None:
                continue
            if r.metric == "difference" and _is_difference(r, mine, row.teachers.get(r.seed)):
                row.differences[r.seed] = r
            elif r.metric == "agreement" and _is_floor(r, mine):
                row.changed[r.seed] = round(r.n * (1 - r.value / 100))
    parts = list(dict.fromkeys((row.task, row.split) for row in rows.values()))
    return sorted(
        rows.values(), key=lambda row: (parts.index(key_of(row)[:2]), METRICS.index(row.metric))
    )


def key_of(row: SeedRow) -> tuple[str, str, str, str, str]:
    """What a row has in common with its results of every metric."""
    return row.task, row.split, row.method, row.backend, row.variant


def _is_difference(found: Result, mine: Result, teacher: Result | None) -> bool:
    against = found.details["against"]
    return (
        found.artifact_hash == mine.artifact_hash
        and found.details["of"] == mine.metric
        and teacher is not None
        and against["artifact_hash"] == teacher.artifact_hash
    )


def _is_floor(found: Result, mine: Result) -> bool:
    return found.precision.endswith(EXACT) and found.student == mine.student


def seed_grid(results: Iterable[Result]) -> Grid:
    """The table as text."""
    rows = []
    for row in seed_rows(results):
        digits = DECIMALS.get(next(iter(row.by_seed.values())).unit, 2)
        rows.append(_cells(row, digits))
    return Grid("", 3, HEADER, rows)


def _cells(row: SeedRow, digits: int) -> list[str]:
    counts = sorted({r.n for r in row.by_seed.values()})
    task = f"{row.task}, {row.split}, n={'/'.join(f'{n:,}' for n in counts)}"
    if row.majority is not None:
        task += f", majority {row.majority:.{digits}f}"
    seeds = [
        f"{r.value:.{digits}f}" if s is None else f"{s}: {r.value:.{digits}f}"
        for s, r in row.by_seed.items()
    ]
    difference, interval = row.difference, row.interval
    return [
        task,
        TASK_METRICS[row.metric],
        row.label,
        f"{row.mean:.{digits}f}",
        ", ".join(seeds),
        MISSING if difference is None else f"{difference:+.{digits}f}",
        MISSING if interval is None else "{:+.1f}, {:+.1f}".format(*interval),
        ", ".join(str(row.changed[s]) for s in row.by_seed if s in row.changed) or MISSING,
    ]


def seed_records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows as numbers, for programs."""
    records = []
    for row in seed_rows(results):
        low, high = row.interval or (None, None)
        records.append(
            {
                "task": row.task,
                "split": row.split,
                "metric": row.metric,
                "method": row.method,
                "backend": row.backend,
                "variant": row.variant,
                "mean": row.mean,
                "n": max(r.n for r in row.by_seed.values()),
                "majority": row.majority,
                "difference": row.difference,
                "difference low": low,
                "difference high": high,
            }
            | {f"seed {s}": r.value for s, r in row.by_seed.items()}
            | {f"seed {s} fp64 flips": n for s, n in row.changed.items()}
        )
    return records
