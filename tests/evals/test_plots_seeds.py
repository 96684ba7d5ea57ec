"""Pictures of methods over seeds: dots, means and lines are the numbers of seeds.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_seeds import RESULTS, paired, scored

from bitdistill.evals import plot
from bitdistill.evals.seed_plots import seed_figures


def drawn(axes: Any) -> dict[str, list[tuple[list[float], list[float]]]]:
    """(x, y) of what an axes has, by what its legend says."""
    found: dict[str, list[tuple[list[float], list[float]]]] = {}
    for line in axes.lines:
        points = ([float(x) for x in line.get_xdata()], [float(y) for y in line.get_ydata()])
        found.setdefault(line.get_label(), []).append(points)
    return found


def test_a_dot_a_seed_and_their_means() -> None:
    pytest.importorskip("matplotlib")
    figure = seed_figures(RESULTS)["accuracy-seeds"]
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "fp16-sft", "bitdistill", "bitnet-sft",
    ]  # fmt: skip
    lines = drawn(axes)
    assert lines["a run"] == [([92.0, 90.0], [0, 0]), ([93.0, 88.0], [1, 1]), ([80.0], [2])]
    assert lines["mean"] == [([91.0], [0]), ([90.5], [1]), ([80.0], [2])]
    assert [x for x, _ in lines["teacher's mean"]] == [[91.0, 91.0]]
    assert [x for x, _ in lines["most frequent label"]] == [[60.0, 60.0]]
    assert lines["difference to the teacher, paired 95 %"] == [([88.5, 92.5], [1, 1])]
    assert axes.get_title(loc="left") == "sst2, validation, n=200"
    assert axes.get_xlabel() == "Accuracy (%)"
    low, high = axes.get_ylim()
    assert low > high  # from top to bottom


def test_a_panel_a_task_and_a_figure_a_metric() -> None:
    """Every method looks alike in all panels."""
    pytest.importorskip("matplotlib")
    other = [scored(70.0, 0, task="boolq"), scored(75.0, 0, "fp16-sft", task="boolq")]
    summary = scored(40.0, 0, task="news", metric="rouge1", details={})
    found = seed_figures([*RESULTS, *other, summary])
    assert list(found) == ["accuracy-seeds", "rouge1-seeds"]
    first, second = found["accuracy-seeds"].axes
    assert drawn(second)["a run"] == [([70.0], [0]), ([75.0], [1])]
    colours = [
        {
            line.get_xdata()[0]: line.get_color()
            for line in axes.lines
            if line.get_label() == "a run"
        }
        for axes in (first, second)
    ]
    assert colours[0][92.0] == colours[1][75.0]
    assert colours[0][93.0] == colours[1][70.0] != colours[0][92.0]
    (axes,) = found["rouge1-seeds"].axes
    assert set(drawn(axes)) == {"a run", "mean"}  # neither teacher nor labels


def test_variants_of_an_ablation_are_rows() -> None:
    """A variant may have a teacher of its own; without, it is compared with the plain one."""
    pytest.importorskip("matplotlib")
    more, less = ({"variant": text, "recipe": "r"} for text in ("seven mixtures", "no mixtures"))
    results = [
        scored(90.0, 0, "fp16-sft"),
        scored(89.0, 0, artifact_hash="bitdistill0", settings=more),
        paired(-1.0, 0, -3.0, 1.0),
        scored(80.0, 0, settings=less),
        scored(86.0, 0, "fp16-sft", settings=less),
    ]
    results[2].settings.update(more)
    (axes,) = seed_figures(results)["accuracy-seeds"].axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "fp16-sft", "bitdistill: seven mixtures", "bitdistill: no mixtures",
        "fp16-sft: no mixtures",
    ]  # fmt: skip
    lines = drawn(axes)
    assert [x for x, _ in lines["teacher's mean"]] == [[90.0, 90.0]]
    assert lines["difference to the teacher, paired 95 %"] == [([87.0, 91.0], [1, 1])]


def test_dollars_in_a_name_are_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = [scored(90.0, 0, settings={"variant": "labels at $1 and $x^"})]
    (axes,) = seed_figures(results)["accuracy-seeds"].axes
    (name,) = axes.get_yticklabels()
    assert name.get_text() == "bitdistill: labels at $1 and $x^"
    assert not name.get_parse_math()
    assert plot([scored(90.0, 0, task="$x^$")], tmp_path / "p", seeds=True)


def test_files(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plot(RESULTS, tmp_path / "p", seeds=True)
    assert [path.name for path in paths] == ["p-accuracy-seeds.png", "p-accuracy-seeds.svg"]
    before = paths[1].read_bytes()
    plot(RESULTS, tmp_path / "p", seeds=True)
    assert paths[1].read_bytes() == before
