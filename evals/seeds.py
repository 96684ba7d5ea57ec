"""A table over training seeds, made from results alone: what a recipe gives, not what a run gave.

For every task, split and metric: methods, the mean over runs, each run's seed and figure, and the
mean difference to the FP16 teacher that a run was compared with, else to the one of its seed
(Δ FP16). Its interval is the mean of the runs' paired 95 % intervals: they share their examples, so
the mean's own interval is no wider. It says what other examples could give; how far runs are apart,
their figures say. A seed that was trained twice (on a GPU it gives another model) counts twice;
one model held or loaded in two ways does not: each way is a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from bitdistill.evals.results import Result
from bitdistill.evals.tables import DECIMALS, MISSING, SECONDARY, TASK_METRICS, Grid

TEACHER = "fp16-sft"
USUAL = ("", "fp32", "1.58-bit")  # precisions that go without saying; "" in older results
EXACT = " in fp64"  # how the precision of a row that only serves as a floor ends
METRICS = [m for m in TASK_METRICS if m not in (*SECONDARY, "agreement", "bleu", "rougeLsum")]
HEADER = ["Task", "Metric", "Method", "Mean", "Seeds", "Δ FP16", "95 %", "fp64 flips"]
Place = tuple[str, str, str, str, str, str, str, str]  # the first fields of a SeedRow
Model = tuple[int | None, str]  # its seed, and its student's fingerprint or its own hash


@dataclass
class SeedRun:
    """One model's result, and what it was compared with."""

    result: Result
    teacher: Result | None = None  # of the same task and metric
    paired: Result | None = None  # the difference to that teacher, on the same examples
    flips: int | None = None  # predictions that fp64 changes

    @property
    def seed(self) -> int | None:
        """None for what was not trained here."""
        return self.result.seed


@dataclass
class SeedRow:
    """One method on one metric: its runs, in order of their seeds."""

    task: str
    split: str
    metric: str
    method: str
    backend: str
    variant: str = ""
    precision: str = ""
    answers: str = ""
    artifact: str = ""  # where a student has several that differ in nothing else
    runs: list[SeedRun] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Method, with what is not the usual of its backend, precision, artifact and variant."""
        said = self.backend == "torch" or self.artifact.startswith(self.backend)
        words = [] if said else [self.backend]
        words += [self.precision] if self.precision not in USUAL else []
        words += [self.answers] if self.answers else []
        words += [self.artifact] if self.artifact else []
        name = f"{self.method} ({', '.join(words)})" if words else self.method
        return f"{name}: {self.variant}" if self.variant else name

    @property
    def mean(self) -> float:
        """Over the runs."""
        return fmean(run.result.value for run in self.runs)

    @property
    def difference(self) -> float | None:
        """The mean difference to their teachers, over runs that have one."""
        pairs = [(run.result, run.teacher) for run in self.runs if run.teacher is not None]
        if self.method == TEACHER or not pairs:
            return None
        return fmean(mine.value - theirs.value for mine, theirs in pairs)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Of the mean difference; None unless every run's was paired."""
        if self.difference is None:
            return None
        found = [run.paired.interval for run in self.runs if run.paired is not None]
        known = [interval for interval in found if interval is not None]
        if not known or len(known) < len(self.runs):
            return None
        low, high = (fmean(ends) for ends in zip(*known, strict=True))
        return low, high

    @property
    def majority(self) -> float | None:
        """Percent that the most frequent label scores."""
        details = self.runs[0].result.details
        if self.metric != "accuracy" or "confusion" not in details:
            return None
        counts = [sum(row) for row in details["confusion"]]
        return 100 * max(counts) / sum(counts)


def seed_rows(results: Iterable[Result]) -> list[SeedRow]:
    """Rows in order of task, metric and first appearance; what was evaluated twice, as it was last.

    ValueError where no result has a task's metric.
    """
    found = list(results)
    by_place: dict[Place, list[Result]] = {}
    for r in found:
        if r.metric in METRICS and not r.precision.endswith(EXACT):
            key = (r.asked, r.split, r.metric, r.method, r.backend, r.variant, r.precision)
            by_place.setdefault((*key, r.answers), []).append(r)
    if not by_place:
        raise ValueError("there are no scores to show by seed; run `bitdistill eval` first")
    teachers: dict[tuple[str, ...], list[Result]] = {}
    for (*part, method, backend, variant, precision, answers), own in by_place.items():
        if (method, backend) == (TEACHER, "torch") and precision in USUAL:
            teachers.setdefault((*part, answers, variant), []).extend(_latest(own))
    rows = []
    for place, own in by_place.items():
        *_, variant, _, answers = place
        asked = (*place[:3], answers)
        theirs = teachers.get((*asked, variant)) or teachers.get((*asked, ""), [])
        for artifact, some in _by_artifact(own).items():
            models = sorted(_latest(some), key=lambda r: (r.seed is None, r.seed or 0))
            runs = [_run(mine, theirs, found) for mine in models]
            rows.append(SeedRow(*place, artifact, runs))
    parts = list(dict.fromkeys((r.task, r.split) for r in rows))
    return sorted(rows, key=lambda r: (parts.index((r.task, r.split)), METRICS.index(r.metric)))


def model_of(r: Result) -> Model:
    """What makes two results those of one model, however often it was evaluated."""
    return r.seed, r.student or r.artifact_hash


def _latest(own: Iterable[Result]) -> list[Result]:
    """The last result of each model."""
    return list({model_of(r): r for r in own}.values())


def _by_artifact(own: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by artifact where a student has several, such as two exports; else all under "".

    By the name's last part where that tells a student's artifacts apart: `s0/onnx` and `s1/onnx`
    are one artifact of two seeds. A directory has the name of its last evaluation, since names
    depend on what else was evaluated.
    """
    own = list({(model_of(r), r.artifact_hash): r for r in own}.values())
    whole = len({(model_of(r), r.artifact) for r in own})
    if whole == len({model_of(r) for r in own}):
        return {"": own}
    told = len({(model_of(r), _last(r)) for r in own}) == whole
    found: dict[str, list[Result]] = {}
    for r in own:
        found.setdefault(_last(r) if told else r.artifact, []).append(r)
    return found


def _last(r: Result) -> str:
    return r.artifact.rpartition("/")[2]


def _run(mine: Result, teachers: Sequence[Result], found: Iterable[Result]) -> SeedRun:
    """A model's result with the last of the teachers that it was paired with, or of its seed."""
    teachers = [t for t in teachers if _same_examples(t, mine)]
    run = SeedRun(mine, next((t for t in reversed(teachers) if t.seed == mine.seed), None))
    for r in found:
        if _kind_of(r) != _kind_of(mine) or not _same_examples(r, mine):
            continue
        if r.metric == "difference" and _is_of(r, mine):
            against = r.details["against"]["artifact_hash"]
            teacher = next((t for t in teachers if t.artifact_hash == against), None)
            if teacher is not None:
                run.teacher, run.paired = teacher, r
        elif r.metric == "agreement" and r.precision.endswith(EXACT) and r.student == mine.student:
            run.flips = round(r.n * (1 - r.value / 100))
    return run


def _kind_of(r: Result) -> tuple[str, ...]:
    return r.asked, r.split, r.method, r.backend, r.variant, r.answers


def _same_examples(one: Result, other: Result) -> bool:
    """Whether two evaluations asked the same; by their number where a result names no examples."""
    asked = {r.settings["examples"] for r in (one, other) if "examples" in r.settings}
    return one.n == other.n and len(asked) < 2


def _is_of(difference: Result, mine: Result) -> bool:
    return (
        difference.artifact_hash == mine.artifact_hash
        and difference.seed == mine.seed
        and difference.details["of"] == mine.metric
    )


def seed_grid(results: Iterable[Result]) -> Grid:
    """The table as text."""
    rows = []
    for row in seed_rows(results):
        digits = DECIMALS.get(row.runs[0].result.unit, 2)
        rows.append(_cells(row, digits))
    return Grid("", 3, HEADER, rows)


def _cells(row: SeedRow, digits: int) -> list[str]:
    counts = sorted({run.result.n for run in row.runs})
    task = f"{row.task}, {row.split}, n={'/'.join(f'{n:,}' for n in counts)}"
    if row.majority is not None:
        task += f", majority {row.majority:.{digits}f}"
    values = [(run.seed, f"{run.result.value:.{digits}f}") for run in row.runs]
    difference, interval = row.difference, row.interval
    return [
        task,
        TASK_METRICS[row.metric],
        row.label,
        f"{row.mean:.{digits}f}",
        ", ".join(value if seed is None else f"{seed}: {value}" for seed, value in values),
        MISSING if difference is None else f"{difference:+.{digits}f}",
        MISSING if interval is None else "{:+.1f}, {:+.1f}".format(*interval),
        ", ".join(str(run.flips) for run in row.runs if run.flips is not None) or MISSING,
    ]


def seed_records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows as numbers, for programs; a seed's second run is `seed S run 2`."""
    records = []
    for row in seed_rows(results):
        low, high = row.interval or (None, None)
        record: dict[str, Any] = {
            "task": row.task,
            "split": row.split,
            "metric": row.metric,
            "method": row.method,
            "backend": row.backend,
            "variant": row.variant,
            "precision": row.precision,
            "answers": row.answers,
            "artifact": row.artifact,
            "mean": row.mean,
            "n": max(run.result.n for run in row.runs),
            "majority": row.majority,
            "difference": row.difference,
            "difference low": low,
            "difference high": high,
        }
        times: Counter[int | None] = Counter()
        flips = {}
        for run in row.runs:
            times[run.seed] += 1
            name = f"seed {run.seed}" + (f" run {times[run.seed]}" if times[run.seed] > 1 else "")
            record[name] = run.result.value
            if run.flips is not None:
                flips[f"{name} fp64 flips"] = run.flips
        records.append(record | flips)
    return records
