"""Pictures and the HTML report: complete, self-contained, and opened by a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bitdistill.evals import Result, plot, run, write_report
from bitdistill.evals.plots import MARKERS, OKABE_ITO
from bitdistill.tasks import Task

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PNG = b"\x89PNG"
TASK = Task("mood", "label", "{text}\n<b>Mood</b>:", ("text",), "label", (" bad", " good"))


def result(metric: str, value: float, unit: str = "%", **other: Any) -> Result:
    fields: dict[str, Any] = {
        "method": "bitdistill", "model": "tiny", "backend": "onnx", "task": "sst2",
        "split": "validation", "n": 872, "stderr": None, "seed": 0, "artifact": "out",
        "artifact_hash": "f00",
    }  # fmt: skip
    return Result(metric=metric, value=value, unit=unit, **(fields | other))


RESULTS = [
    result(metric, value, unit, method=method, artifact_hash=method, interval=interval)
    for method, factor in (("fp16-sft", 1.0), ("bitdistill", 0.2))
    for metric, value, unit, interval in (
        ("accuracy", 90.0 + factor, "%", (88.0, 93.0)),
        ("decode_speed", 50 / factor, "tokens/s", None),
        ("memory", 400 * factor, "MiB", None),
    )
]


def test_pictures_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = plot(RESULTS, tmp_path / "new" / "p")
    assert [path.name for path in paths] == [
        "p-sst2-validation-accuracy.png", "p-sst2-validation-accuracy.svg",
        "p-decode_speed.png", "p-decode_speed.svg",
    ]  # fmt: skip
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(PNG)
        else:
            ElementTree.parse(path)
    before = paths[1].read_bytes()
    plot(RESULTS, tmp_path / "new" / "p")
    assert paths[1].read_bytes() == before


def test_what_a_picture_says() -> None:
    pytest.importorskip("matplotlib")
    from bitdistill.evals.plots import figures

    found = figures(RESULTS)["sst2-validation-accuracy"].axes[0]
    assert found.get_xlabel() == "Memory (MiB) over a bare process"
    assert found.get_ylabel() == "Accuracy (%)"
    assert [text.get_text() for text in found.get_legend().get_texts()] == [
        "fp16-sft, onnx", "bitdistill, onnx",
    ]  # fmt: skip
    points = [container[0].get_xydata().tolist() for container in found.containers]
    assert points == [[[400.0, 91.0]], [[80.0, 90.2]]]


def test_rows_of_a_picture_are_told_apart_as_in_a_table() -> None:
    """Seeds, variants and exports of one method."""
    pytest.importorskip("matplotlib")
    from bitdistill.evals.plots import figures

    rows: list[dict[str, Any]] = [
        {"seed": 0}, {"seed": 1}, {"settings": {"variant": "no norms"}},
        {"seed": None, "method": "base"},
    ]  # fmt: skip
    found = figures([
        result(metric, 80.0, unit, artifact_hash=str(i), **row)
        for i, row in enumerate(rows)
        for metric, unit in (("accuracy", "%"), ("memory", "MiB"))
    ])["sst2-validation-accuracy"].axes[0]  # fmt: skip
    assert [text.get_text() for text in found.get_legend().get_texts()] == [
        "bitdistill, onnx, seed 0", "bitdistill, onnx, seed 1",
        "bitdistill, onnx, no norms, seed 0", "base, onnx",
    ]  # fmt: skip


def test_label_and_summary_tasks_share_a_picture_of_speed() -> None:
    pytest.importorskip("matplotlib")
    from bitdistill.evals.plots import figures

    summary = {"task": "news", "artifact": "s", "artifact_hash": "s", "precision": "int4"}
    found = figures([
        result("accuracy", 91.0), result("decode_speed", 10.0, "tokens/s"),
        result("memory", 80.0, "MiB"), result("rougeL", 20.0, **summary),
        result("decode_speed", 20.0, "tokens/s", **summary),
        result("memory", 40.0, "MiB", **summary),
    ])  # fmt: skip
    assert list(found) == ["sst2-validation-accuracy", "news-validation-rougeL", "decode_speed"]
    speeds = found["decode_speed"].axes[0].containers
    assert [bars[0].get_xydata().tolist() for bars in speeds] == [[[80.0, 10.0]], [[40.0, 20.0]]]


def test_colours_stay_apart_in_grey_and_markers_without_colour() -> None:
    def luminance(colour: str) -> float:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    assert len(set(MARKERS)) == len(MARKERS) > len(OKABE_ITO)
    assert len(set(OKABE_ITO)) == len(OKABE_ITO)
    assert all(luminance(colour) < 0.75 for colour in OKABE_ITO)  # none vanishes on white paper


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to draw: memory or size is missing"):
        plot([result("accuracy", 1.0)], tmp_path / "p")


def test_without_matplotlib_the_pip_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"run: pip install 'bitdistill\[plot\]'"):
        plot(RESULTS, tmp_path / "p")


class Page(HTMLParser):
    """Texts, tags, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "data", "action", "xlink:href") and value:
                self.fetched += [value] if not value.startswith("#") else []

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture
def report(student_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """The report of two real rows, one of which says the opposite of what it thinks."""
    from bitdistill.backends import load
    from bitdistill.evals.worker import execute

    data = tmp_path / "test.jsonl"
    words = ["the film is not good", "we liked it <i>", "very dull & bright", "it is bad", "a plot"]
    rows = [{"text": f"{a} {b}", "label": i % 2} for i, a in enumerate(words) for b in words]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = [student_dir("qwen3"), student_dir("llama")]
    store = tmp_path / "store"

    def contrary(path: str, **options: Any) -> Any:
        runtime = load(path, **options)
        if path == str(paths[1]):
            score = runtime.score
            runtime.score = lambda *asked, **how: [-s for s in score(*asked, **how)]  # type: ignore[method-assign]
        return runtime

    results = run(
        paths, TASK, data, store=store, speed=False,
        execute=lambda job, progress: execute(job, progress, contrary),
    )  # fmt: skip
    write_report(results, tmp_path / "new" / "report.html", store)
    return tmp_path / "new" / "report.html"


def test_a_report_is_complete_and_fetches_nothing(report: Path) -> None:
    text = report.read_text()
    page = Page(text)
    assert page.fetched == []
    assert "script" not in page.tags
    assert not re.search(r"url\((?!#)|@import", text)
    for heading in ("Evaluation of random", "Classification", "Differences between rows",
                    "Confusion matrices", "Disagreements", "Settings"):  # fmt: skip
        assert heading in page.texts
    assert "McNemar p" in page.texts
    disagreements = int(re.search(r"(\d+) examples on which rows differ", text)[1])  # type: ignore[index]
    assert disagreements > 0
    assert "we liked it <i> it is bad\n<b>Mood</b>:" in page.texts or disagreements < 25
    assert "<i>" not in text  # it is shown, not obeyed
    assert any('"batch_size": 16' in part for part in page.texts)


def test_a_report_without_its_store_says_so(tmp_path: Path) -> None:
    """It does not know that rows agree, which "0 examples" would say."""
    kept = {"examples": "e", "predictions": "p.jsonl"}
    write_report([result("accuracy", 90.0, settings=kept)], tmp_path / "r.html", tmp_path / "none")
    page = Page((tmp_path / "r.html").read_text())
    assert "Settings" in page.texts
    told = f"not known, {tmp_path / 'none'} does not hold the predictions of every row."
    assert f"sst2 validation: {told}" in page.texts
    assert not any("examples on which rows differ" in text for text in page.texts)


def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no browser; run: apt-get install chromium")
    return found


@pytest.mark.slow
def test_a_browser_shows_the_report_without_a_network(report: Path, tmp_path: Path) -> None:
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,2000",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
    ]  # fmt: skip
    options: dict[str, Any] = {"capture_output": True, "timeout": 120, "check": True}
    shown = subprocess.run([*command, "--dump-dom", report.as_uri()], **options).stdout.decode()
    page = Page(shown)
    written = Page(report.read_text())
    assert page.tags.count("tr") == written.tags.count("tr") > 10
    assert page.tags.count("svg") == written.tags.count("svg") > 0
    assert "Evaluation of random" in page.texts
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", report.as_uri()], **options)
    assert picture.read_bytes().startswith(PNG)
    assert picture.stat().st_size > 20_000  # an empty page of this size has 6,000 bytes
    pdf = tmp_path / "page.pdf"
    subprocess.run([*command, f"--print-to-pdf={pdf}", report.as_uri()], **options)
    assert pdf.read_bytes().startswith(b"%PDF")
