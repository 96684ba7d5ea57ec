"""Results to JSON lines and tables, and back."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill.evals import Result, read_jsonl, render, rich_table, write_jsonl


def result(metric: str, value: float, unit: str = "%", **other: Any) -> Result:
    fields: dict[str, Any] = {
        "method": "bitdistill", "model": "tiny", "backend": "onnx", "task": "sst2",
        "split": "validation", "n": 872, "stderr": 0.5 if unit == "%" else None, "seed": 0,
        "artifact": "out", "artifact_hash": "f00",
    }  # fmt: skip
    return Result(metric=metric, value=value, unit=unit, **(fields | other))


TEACHER = {"method": "fp16-sft", "backend": "torch", "artifact": "teacher", "artifact_hash": "1"}
RESULTS = [
    result("accuracy", 93.125, **TEACHER),
    result("size_on_disk", 1234.56, "MiB", **TEACHER),
    result("decode_speed", 50.25, "tokens/s"),
    result("agreement", 99.5),
    result("accuracy", 92.0),
    result("peak_memory_evaluation", 9.0, "MiB"),
]


def test_json_lines_round_trip_and_append(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    write_jsonl(RESULTS[:2], path)
    write_jsonl(RESULTS[2:], path)
    assert read_jsonl(path) == RESULTS
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["metric"], first["value"], first["n"], first["stderr"]) == (
        "accuracy", 93.125, 872, 0.5,
    )  # fmt: skip


@pytest.mark.parametrize("line", ["{", '{"metric": "accuracy"}', "3"])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    write_jsonl(RESULTS[:1], path)
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 2 is not a result .*; remove the line"):
        read_jsonl(path)


def test_a_result_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_jsonl([RESULTS[0], result("accuracy", float("nan"))], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_markdown() -> None:
    assert render(RESULTS, "markdown") == (
        "| Method | Backend | Accuracy (%, n=872) | Agreement (%, n=872) | Decode (tok/s) "
        "| Size (MiB) |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| fp16-sft | torch | 93.12 ± 0.50 | – | – | 1,234.6 |\n"
        "| bitdistill | onnx | 92.00 ± 0.50 | 99.50 | 50 | – |\n"
    )


def test_csv_and_json_hold_full_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(render(RESULTS, "csv"))))
    assert [row["Accuracy (%)"] for row in rows] == ["93.125", "92.0"]
    assert (rows[0]["Accuracy (%) stderr"], rows[0]["Accuracy (%) n"]) == ("0.5", "872")
    assert rows[0]["Decode (tok/s)"] == ""
    records = json.loads(render(RESULTS, "json"))
    assert records[0]["Size (MiB)"] == 1234.56
    assert records[0]["Agreement (%)"] is None
    assert records[1]["backend"] == "onnx"


def test_rich_table_shows_the_same_cells() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200)
    console.print(rich_table(RESULTS))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("sst2 (validation)", "n=872)", "93.12 ± 0.50", "–"):
        assert part in text


def test_summary_columns_come_in_the_order_of_the_paper() -> None:
    names = ["bleu", "rougeLsum", "rouge1", "rougeL", "rouge2"]
    header = render([result(name, 1.0) for name in names], "markdown").splitlines()[0]
    places = [header.index(n) for n in ("ROUGE-1", "ROUGE-2", "ROUGE-L ", "ROUGE-Lsum", "BLEU")]
    assert places == sorted(places)


def test_rows_and_columns_that_would_look_alike_are_told_apart() -> None:
    other = result("accuracy", 1.0, artifact="other", artifact_hash="2", model="big", task="mnli")
    twin = result("accuracy", 2.0, artifact="twin", artifact_hash="3")
    lines = render([*RESULTS, other, twin], "markdown").splitlines()
    assert lines[0].startswith("| Model | Method | Backend | Artifact | sst2 Accuracy (%, n=872) |")
    assert "mnli Accuracy (%, n=872)" in lines[0]
    assert len(lines) == 2 + 4


def test_n_stands_in_the_cells_where_it_differs() -> None:
    short = dataclasses.replace(RESULTS[0], n=100, backend="mlx", artifact_hash="4")
    text = render([RESULTS[0], short], "markdown")
    assert "Accuracy (%) |" in text
    assert "93.12 ± 0.50 (n=872)" in text
    assert "93.12 ± 0.50 (n=100)" in text


def test_unknown_format_and_no_results_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown format 'markdwn'; did you mean 'markdown'\?"):
        render(RESULTS, "markdwn")
    with pytest.raises(ValueError, match="no results to show; run `bitdistill eval` first"):
        render([], "csv")
