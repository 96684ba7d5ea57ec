"""Pictures of runs and of scores against tokens: what they show is what the lines say."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from test_report import result

from bitdistill.evals import plot_runs
from bitdistill.evals.plots import compact, figures
from bitdistill.evals.run_plots import keep_records, near_threshold, read_records, run_figures
from bitdistill.monitor import BINS, REACH

KINDS = ("q_proj", "down_proj")


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def histogram(value: float) -> list[int]:
    """Ten weights, all of `value` in units of the scale."""
    counts = [0] * BINS
    counts[int((value + REACH) / (2 * REACH) * BINS)] = 10
    return counts


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs: one with stage 2, of which a step was done twice, and one without."""
    for name, factor in (("a", 1.0), ("b", 2.0)):
        log = [
            {"stage": "student", "step": s, "tokens": 100 * s, "ce": factor / s, "logits": 0.5}
            for s in (10, 20, 30)
        ]
        if name == "a":
            twice = {"stage": "pretrained", "step": 10, "tokens": 5}
            log = [twice | {"ce": 9.0}, twice | {"ce": 4.0}, *log]
        write(tmp_path / name / "log.jsonl", log)
        before, after = (
            {"stage": "student", "step": s, "histogram": dict.fromkeys(KINDS, histogram(value))}
            for s, value in ((0, 0.45), (30, 1.5))
        )
        shares = [
            {"stage": "student", "step": s}
            | {"zero_fraction": {k: [0.1, 0.2, 0.01 * s] for k in KINDS}}
            | ({} if s == 10 else {"flip_rate": {k: [0.0, 0.1, 0.2] for k in KINDS}})
            for s in (10, 20, 30)
        ]
        write(tmp_path / name / "weights.jsonl", [before, *shares, after])
    return [tmp_path / "a", tmp_path / "b"]


def lines_of(axes: Any) -> dict[str, list[list[float]]]:
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_losses_of_all_runs_and_weights_of_each(runs: list[Path]) -> None:
    pytest.importorskip("matplotlib")
    found = run_figures(runs)
    assert list(found) == [
        "loss-pretrained", "loss-student",
        "a-weights-student", "a-layers-student", "b-weights-student", "b-layers-student",
    ]  # fmt: skip
    assert lines_of(found["loss-pretrained"].axes[0]) == {"a": [[5, 4.0]]}  # the later of the two
    ce, logits = found["loss-student"].axes
    assert lines_of(ce)["b"] == [[1000, 0.2], [2000, 0.1], [3000, pytest.approx(2 / 30)]]
    assert (ce.get_ylabel(), logits.get_ylabel()) == ("cross-entropy", "logits KL, weighted")
    assert set(lines_of(logits)) == {"a", "b"}
    found["loss-student"].draw_without_rendering()
    assert "2.5k" in [label.get_text() for label in logits.get_xticklabels()]
    panels = found["a-weights-student"].axes
    assert [axes.get_title() for axes in panels] == [
        f"{kind}: near a threshold before 100.0%, after 0.0%" for kind in KINDS
    ]
    zeros, zero_map, *_ = found["a-layers-student"].axes
    assert lines_of(zeros)["down_proj"] == [[0, 0.1], [1, 0.2], [2, 0.3]]
    colours = zero_map.collections[0].get_array()
    assert colours.shape == (3, 3)
    assert colours[2].tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert len(found["a-layers-student"].axes) == 4 + 2  # and two scales of colours


def test_pictures_are_files_and_repeat(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "b" / "weights.jsonl").unlink()  # a run of several devices has none
    paths = plot_runs(runs, tmp_path / "new" / "p")
    assert len(paths) == 8
    drawing = next(path for path in paths if path.suffix == ".svg")
    before = drawing.read_bytes()
    plot_runs(runs, tmp_path / "new" / "p")
    assert drawing.read_bytes() == before


def test_runs_of_one_name_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path / "c" / "a" / "log.jsonl", read_records(runs[0] / "log.jsonl"))
    found = run_figures([runs[0], tmp_path / "c" / "a"])
    assert len(lines_of(found["loss-student"].axes[0])) == 2


def test_mass_near_the_thresholds() -> None:
    for value, share in ((0.41, 1.0), (-0.59, 1.0), (0.61, 0.0), (0.39, 0.0), (0.0, 0.0)):
        assert near_threshold(histogram(value)) == share


def test_broken_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no log.jsonl; give a directory of `train`"):
        read_records(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text('{"stage": "student", "step": 1}\n{"stage"\n')
    with pytest.raises(ValueError, match="line 2 is not JSON; remove the line"):
        read_records(tmp_path / "log.jsonl")


def test_records_are_kept_thinned(tmp_path: Path) -> None:
    """First, last and even ones of every stage, the last of a repeated step, all histograms."""
    log = [
        {"stage": stage, "step": s, "tokens": 10**9 + s, "ce": 1.23456789, "time": 1e9, "lr": None}
        for stage in ("teacher", "student")
        for s in range(10, 6010, 10)
    ]
    write(tmp_path / "run" / "log.jsonl", [*log, log[-1] | {"ce": 2.0}])
    before = {"stage": "student", "step": 0, "histogram": {"q_proj": [12345, 678901]}}
    shares = [
        {"stage": "student", "step": s, "zero_fraction": {"q_proj": [0.333333, 0.5]}}
        for s in range(10, 6010, 10)
    ]
    after = before | {"step": 6000}
    write(tmp_path / "run" / "weights.jsonl", [before, *shares, after])
    keep_records(tmp_path / "run", tmp_path / "new" / "kept")
    kept = read_records(tmp_path / "new" / "kept" / "log.jsonl")
    assert kept[0] == {
        "stage": "teacher",
        "step": 10,
        "tokens": 10**9 + 10,
        "ce": 1.235,
        "lr": None,
    }
    assert kept[-1]["ce"] == 2.0
    for stage in ("teacher", "student"):
        steps = [record["step"] for record in kept if record["stage"] == stage]
        assert (len(steps), steps[0], steps[-1]) == (60, 10, 6000)
        assert {b - a for a, b in itertools.pairwise(steps)} == {100, 110}
    weights = read_records(tmp_path / "new" / "kept" / "weights.jsonl")
    assert (len(weights), weights[0], weights[-1]) == (12, before, after)
    assert weights[1]["zero_fraction"] == {"q_proj": [0.3333, 0.5]}


def test_short_runs_are_kept_whole(runs: list[Path], tmp_path: Path) -> None:
    (runs[1] / "weights.jsonl").unlink()
    for run in runs:
        keep_records(run, tmp_path / "kept" / run.name)
    for name in ("log.jsonl", "weights.jsonl"):
        kept, whole = (read_records(folder / name) for folder in (tmp_path / "kept" / "a", runs[0]))
        assert [(r["step"], r.keys()) for r in kept] == [(r["step"], r.keys()) for r in whole]
    assert [path.name for path in (tmp_path / "kept" / "b").iterdir()] == ["log.jsonl"]
    with pytest.raises(FileNotFoundError, match="has no log"):
        keep_records(tmp_path / "none", tmp_path / "kept" / "none")
    assert not (tmp_path / "kept" / "none").exists()


def scored(value: float, tokens: int, method: str = "bitdistill", **other: Any) -> Any:
    fields: dict[str, Any] = {
        "backend": "torch", "method": method, "artifact_hash": f"{method}{tokens}",
        "student": None if method == "fp16-sft" else f"{method}{tokens}",
        "interval": (value - 1, value + 1), "settings": {"training_tokens": tokens},
    }  # fmt: skip
    return result(other.pop("metric", "accuracy"), value, **(fields | other))


def test_scores_against_training_tokens() -> None:
    """Points are means over seeds, teachers are lines; single lengths are no curve."""
    pytest.importorskip("matplotlib")
    results = [scored(92.0, 50, "fp16-sft"), scored(94.0, 51, "fp16-sft"), scored(80.0, 1000)]
    results += [scored(88.0, 4000, seed=0), scored(90.0, 4010, seed=1)]  # other examples drawn
    results.append(scored(70.0, 4100, "bitdistill-paper"))
    results += [scored(10.0, n, precision="1.58-bit in fp64") for n in (1000, 4000)]
    results += [scored(-5.0, n, metric="difference") for n in (1000, 4000)]
    found = figures(results)
    assert list(found) == ["sst2-validation-accuracy-tokens"]
    axes = found["sst2-validation-accuracy-tokens"].axes[0]
    assert lines_of(axes)["bitdistill"] == [[1000, 80.0], [4005, 89.0]]
    assert lines_of(axes)["bitdistill-paper"] == [[4100, 70.0]]
    assert [y for _, y in lines_of(axes)["fp16-sft"]] == [93.0, 93.0]
    dots, _ = axes.collections
    assert dots.get_offsets().tolist() == [[1000, 80.0], [4005, 88.0], [4005, 90.0]]
    assert axes.get_xscale() == "log"


def test_a_model_is_one_dot_and_a_variant_one_line() -> None:
    """However often it was evaluated; and what trained it otherwise is no point of its line."""
    pytest.importorskip("matplotlib")
    results = [scored(80.0, 1000), scored(84.0, 1000, seed=1), scored(90.0, 4000)]
    results.append(scored(82.0, 1000))  # the first once more
    results += [scored(92.0, 50, "fp16-sft"), scored(60.0, 50, "fp16-sft", precision="bf16")]
    results[-1] = dataclasses.replace(results[-1], artifact_hash="bf16")
    less = {"training_tokens": 2000, "variant": "no norms"}
    results.append(dataclasses.replace(scored(50.0, 2000), settings=less))
    said = {"training_tokens": 1000, "options": {"scoring": "greedy"}}  # is another figure
    results.append(dataclasses.replace(scored(5.0, 1000), settings=said))
    axes = figures(results)["sst2-validation-accuracy-tokens"].axes[0]
    assert lines_of(axes)["bitdistill"] == [[1000, 83.0], [4000, 90.0]]
    assert lines_of(axes)["bitdistill: no norms"] == [[2000, 50.0]]
    assert [y for _, y in lines_of(axes)["fp16-sft"]] == [92.0, 92.0]


def test_seeds_of_one_length_are_no_curve() -> None:
    """Nor is another method of another length."""
    pytest.importorskip("matplotlib")
    seeds = [scored(90.0, 95_998_315), scored(91.0, 96_005_078, seed=1)]
    with pytest.raises(ValueError, match="nothing to draw"):
        figures([*seeds, scored(80.0, 1_000_000, "bitnet-sft"), scored(92.0, 50, "fp16-sft")])


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        ((95_998_315, 101_000_000), ["96M", "101M"]),
        ((2_000_000, 900_000_000, 960_000_000), ["2M", "900M"]),
        ((1000, 1234, 1500, 1800, 2345, 2900), ["1k", "1.234k", "1.5k", "1.8k", "2.345k", "2.9k"]),
    ],
)
def test_labels_of_tokens_do_not_overlap(tokens: tuple[int, ...], labels: list[str]) -> None:
    pytest.importorskip("matplotlib")
    figure = figures([scored(90.0, n) for n in tokens])["sst2-validation-accuracy-tokens"]
    figure.draw_without_rendering()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    shown = [t.label1 for t in axes.xaxis.get_major_ticks() if low <= t.get_loc() <= high]
    assert [label.get_text() for label in shown] == labels
    boxes = [label.get_window_extent() for label in shown]
    assert all(left.x1 + 4 < right.x0 for left, right in itertools.pairwise(boxes))


def test_counts_are_short() -> None:
    counts = (0, 950, 1500, 96_005_078, 1.5e9)
    assert [compact(count) for count in counts] == ["0", "950", "1.5k", "96.01M", "1.5B"]
