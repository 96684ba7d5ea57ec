"""Predictions on disk: whole lines only, the right ones, and none lost when a run is killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill import manifest
from bitdistill.evals.store import PredictionLog, Store, read_complete, read_disagreements

IDENTITY = {"directory": "abc", "examples": "def"}


def fill(path: Path, records: int, *, finish: bool = False) -> None:
    with PredictionLog(path, IDENTITY) as log:
        log.append([{"i": i, "label": i % 2} for i in range(records)])
        if finish:
            log.finish({"truncated": 0})


def test_a_file_is_continued_and_complete_at_its_last_line(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    fill(path, 2)
    assert read_complete(path, 2) is None
    with PredictionLog(path, IDENTITY) as log:
        assert log.known == {0: {"i": 0, "label": 0}, 1: {"i": 1, "label": 1}}
        log.append([{"i": 1, "label": 7}, {"i": 2, "label": 1}])  # said again: the later counts
        log.finish({"truncated": 5})
    assert read_complete(path, 3) == {
        "truncated": 5, "records": [{"i": 0, "label": 0}, {"i": 1, "label": 7},
                                    {"i": 2, "label": 1}],
    }  # fmt: skip
    assert read_complete(path, 4) is None
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_every_cut_leaves_whole_lines(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    fill(whole, 3, finish=True)
    content = whole.read_bytes()
    for size in range(len(content)):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        assert read_complete(path, 3) is None
        with PredictionLog(path, IDENTITY) as log:
            assert len(log.known) == max(0, content[:size].count(b"\n") - 1)
            log.append([{"i": 3, "label": 0}])
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    fill(path, 1)
    other = PredictionLog(path, {"directory": "other"})
    with pytest.raises(manifest.FormatError, match="holds something else; remove it"):
        other.__enter__()


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.once({"a": 1}, lambda: [1.5]) == [1.5]
    assert store.once({"a": 1}, lambda: pytest.fail("measured twice")) == [1.5]
    assert store.once({"a": 2}, lambda: [2.5]) == [2.5]


def test_disagreements(tmp_path: Path) -> None:
    for name, labels in (("a", [0, 1, 1]), ("b", [0, 0, 1])):
        with PredictionLog(tmp_path / name, IDENTITY) as log:
            log.append([{"i": i, "label": label} for i, label in enumerate(labels)])
            log.finish({})
    Store(tmp_path).keep_examples("e", [{"prompt": text} for text in "xyz"])
    found = read_disagreements(tmp_path, "e", ["a", "b"])
    assert found == [({"prompt": "y"}, [{"i": 1, "label": 1}, {"i": 1, "label": 0}])]
    assert read_disagreements(tmp_path, "e", ["a", "missing"]) is None
    assert read_disagreements(tmp_path, "missing", ["a", "b"]) is None


# --- a run of 1,000 examples, killed again and again ----------------------------------------------


PROGRAM = """
import sys
from bitdistill.evals import Plan, render, run

results = run(sys.argv[3:], data=sys.argv[1], store=sys.argv[2], threads=1, plan=Plan(8, 2, 1))
print(render(results, "csv"), end="")
"""


@pytest.fixture
def thousand(tmp_path: Path) -> Path:
    words = "the film is not good bad but very dull bright and we liked it a plot".split()
    draw = random.Random(0)
    path = tmp_path / "thousand.jsonl"
    rows = [
        {"sentence": " ".join(draw.choices(words, k=draw.randint(1, 12))), "label": i % 2}
        for i in range(1000)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def predicted(store: Path) -> int:
    """Lines of predictions so far; every one of them but a last half is JSON."""
    count = 0
    for path in store.glob("*.jsonl"):
        lines = path.read_bytes().split(b"\n")[:-1]
        count += sum("i" in json.loads(line) for line in lines)
    return count


def without_timings(table: str) -> list[list[str]]:
    """The columns that a second run on the same machine repeats exactly."""
    rows = [line.split(",") for line in table.splitlines()]
    keep = [i for i, name in enumerate(rows[0]) if "Accuracy" in name or "Agree" in name
            or "Perplexity" in name or "ECE" in name or name in ("method", "backend")]  # fmt: skip
    return [[row[i] for i in keep] for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_killed_run_goes_on_to_the_same_table(
    student_dir: Callable[..., Path], thousand: Path, tmp_path: Path, whole_group: bool
) -> None:
    """Killed with its workers, and alone: then the worker that is left ends or is waited for."""
    from bitdistill.exporters.base import export
    from bitdistill.tasks import TASKS

    student = student_dir("qwen3", task=TASKS["sst2"].to_json())
    rows = [student, export(student, "onnx", tmp_path / "onnx")]
    straight = start(thousand, tmp_path / "straight", *rows)
    expected = straight.communicate()[0].decode()
    assert straight.returncode == 0
    store, kills = tmp_path / "killed", 0
    for target in (1, 300, 990, 1100, 1700):
        process = start(thousand, store, *rows)
        while process.poll() is None and predicted(store) < target:
            time.sleep(0.002)
        if process.poll() is None:
            kills += 1
            (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        process.communicate()
    assert kills >= 3
    last = start(thousand, store, *rows)
    table = last.communicate()[0].decode()
    assert last.returncode == 0
    assert without_timings(table) == without_timings(expected)
    again = start(thousand, store, *rows)
    assert again.communicate()[0].decode() == table  # timings too: nothing was measured again
