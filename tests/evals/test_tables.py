"""Results to JSON lines and tables, and back."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill.evals import Result, read_jsonl, render, write_jsonl


def result(metric: str, value: float, unit: str = "%", **other: Any) -> Result:
    fields: dict[str, Any] = {
        "method": "bitdistill", "model": "tiny", "backend": "onnx", "task": "sst2",
        "split": "validation", "n": 872, "stderr": 0.5 if unit == "%" else None, "seed": 0,
        "artifact": "out", "artifact_hash": "f00",
    }  # fmt: skip
    return Result(metric=metric, value=value, unit=unit, **(fields | other))


TEACHER = {"method": "fp16-sft", "backend": "torch", "artifact": "teacher", "artifact_hash": "1"}
TO_TEACHER: dict[str, Any] = {"details": {"against": {"artifact_hash": "1"}}}
RESULTS = [
    result("accuracy", 93.125, interval=(92.0, 94.0), **TEACHER),
    result("size_on_disk", 1234.56, "MiB", **TEACHER),
    result("size_ratio", 1.0, "x", **TEACHER, **TO_TEACHER),
    result("decode_speed", 420.1, "tokens/s", **TEACHER),
    result("decode_ratio", 1.0, "x", **TEACHER, **TO_TEACHER),
    result("decode_speed", 1050.25, "tokens/s"),
    result("decode_ratio", 2.5, "x", **TO_TEACHER),
    result("token_p95", 1.25, "ms"),
    result("agreement", 99.5),
    result("accuracy", 92.0),
    result("ece", 3.0),
    result("difference", 1.0),
]


def test_json_lines_round_trip_and_append(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    write_jsonl(RESULTS[:2], path)
    path.write_text(path.read_text().rstrip("\n"))  # as some editors save it
    write_jsonl(RESULTS[2:], path)
    assert read_jsonl(path) == RESULTS
    first = json.loads(path.read_text().splitlines()[0])
    assert (first["metric"], first["value"], first["n"], first["stderr"]) == (
        "accuracy", 93.125, 872, 0.5,
    )  # fmt: skip


def test_a_line_ends_where_json_lines_end(tmp_path: Path) -> None:
    """And not at what else Unicode takes for the end of a line."""
    named = result("accuracy", 90.0, details={"labels": ["a\u2028b", "c\u0085d\x1e"]})
    write_jsonl([named, *RESULTS], tmp_path / "r.jsonl")
    assert read_jsonl(tmp_path / "r.jsonl") == [named, *RESULTS]
    windows = (tmp_path / "r.jsonl").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "windows.jsonl").write_bytes(windows)
    assert read_jsonl(tmp_path / "windows.jsonl") == [named, *RESULTS]


@pytest.mark.parametrize("line", ["{", '{"metric": "accuracy"}', "3"])
def test_a_line_that_is_no_result_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    write_jsonl(RESULTS[:1], path)
    with path.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 2 is not a result .*; remove the line"):
        read_jsonl(path)


def test_what_is_no_file_of_results_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=r"results\.jsonl is not UTF-8 text; give the file that"):
        read_jsonl(path)
    with pytest.raises(ValueError, match=rf"{tmp_path} is a folder; give the file that"):
        read_jsonl(tmp_path)


def test_a_result_that_is_not_a_number_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_jsonl([RESULTS[0], result("accuracy", float("nan"))], tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


def test_markdown() -> None:
    assert render(RESULTS, "markdown") == (
        "| Method | Backend | Accuracy (%, n=872) | Agreement (%, n=872) | Decode (×, tok/s) "
        "| Size (×, MiB) |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |\n"
        "| fp16-sft | torch | 93.12 ± 0.50 | – | 1.00× (420) | 1.00× (1,234.6) |\n"
        "| bitdistill | onnx | 92.00 ± 0.50 | 99.50 | 2.50× (1,050) | – |\n"
    )


def test_latex() -> None:
    assert render(RESULTS, "latex") == (
        "\\begin{tabular}{llrrrr}\n\\toprule\n"
        "Method & Backend & Accuracy (\\%, n=872) & Agreement (\\%, n=872) & "
        "Decode ($\\times$, tok/s) & Size ($\\times$, MiB) \\\\\n\\midrule\n"
        "fp16-sft & torch & 93.12 $\\pm$ 0.50 & -- & 1.00$\\times$ (420) & "
        "1.00$\\times$ (1,234.6) \\\\\n"
        "bitdistill & onnx & 92.00 $\\pm$ 0.50 & 99.50 & 2.50$\\times$ (1,050) & -- \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )
    assert r"a\_b\&\textbackslash{}c" in render(
        [result("accuracy", 1.0, method=r"a_b&\c")], "latex"
    )


def test_csv_and_json_hold_full_numbers_and_every_metric() -> None:
    rows = list(csv.DictReader(io.StringIO(render(RESULTS, "csv"))))
    assert [row["Accuracy (%)"] for row in rows] == ["93.125", "92.0"]
    assert (rows[0]["Accuracy (%) stderr"], rows[0]["Accuracy (%) n"]) == ("0.5", "872")
    assert (rows[0]["Accuracy (%) low"], rows[0]["Accuracy (%) high"]) == ("92.0", "94.0")
    assert (rows[0]["Decode (tok/s)"], rows[1]["Size (MiB)"]) == ("420.1", "")
    assert (rows[1]["Decode (tok/s)"], rows[1]["Decode (tok/s) ratio"]) == ("1050.25", "2.5")
    records = json.loads(render(RESULTS, "json"))
    assert records[0]["Size (MiB)"] == 1234.56
    assert records[0]["Agreement (%)"] is None
    assert records[1]["backend"] == "onnx"
    assert (records[1]["ECE (%)"], records[1]["Token p95 (ms)"]) == (3.0, 1.25)


def test_csv_and_json_tell_seeds_and_variants_apart() -> None:
    """Runs that were evaluated one by one have artifacts of one name."""
    changed = {"settings": {"variant": "no norms"}}
    runs = [result("accuracy", 90.0 + s, seed=s, artifact_hash=str(s)) for s in (0, 1)]
    runs.append(result("accuracy", 80.0, artifact_hash="2", **changed))
    rows = csv.DictReader(io.StringIO(render(runs, "csv")))
    assert [(row["seed"], row["variant"], row["Accuracy (%)"]) for row in rows] == [
        ("0", "", "90.0"), ("1", "", "91.0"), ("0", "no norms", "80.0"),
    ]  # fmt: skip
    assert [row["seed"] for row in json.loads(render(runs, "json"))] == [0, 1, 0]


def test_tasks_of_several_exports_are_not_mixed() -> None:
    """In whatever order they come: the 8-bit export on one task stands beside itself on another."""
    made = [("sst2", "a/onnx", 91.0), ("sst2", "a/onnx8", 90.0), ("qnli", "b/onnx8", 80.0),
            ("qnli", "b/onnx", 81.0)]  # fmt: skip
    table = render([
        result("accuracy", value, task=task, artifact=name, artifact_hash=task + name)
        for task, name, value in made
    ])  # fmt: skip
    assert [line.split("|")[3:6] for line in table.splitlines()[2:]] == [
        [" a/onnx ", " 91.00 ± 0.50 ", " 81.00 ± 0.50 "],
        [" a/onnx8 ", " 90.00 ± 0.50 ", " 80.00 ± 0.50 "],
    ]


def test_artifacts_stand_with_their_student() -> None:
    """A seed that was trained twice for a task: the second student's artifact is in its row."""
    made = [("sst2", "torch", "s", 90.0), ("sst2", "onnx", "s", 89.0), ("qnli", "torch", "q", 80.0),
            ("qnli", "torch", "again", 70.0), ("qnli", "onnx", "again", 71.0)]  # fmt: skip
    table = render([
        result("accuracy", value, task=task, backend=backend, student=student,
               artifact_hash=backend + student)
        for task, backend, student, value in made
    ])  # fmt: skip
    lines = [line.split("|")[2:5] for line in table.splitlines()[2:]]
    assert [[cell.strip()[:5] for cell in cells] for cells in lines] == [
        ["torch", "90.00", "80.00"], ["onnx", "89.00", "–"],
        ["torch", "–", "70.00"], ["onnx", "–", "71.00"],
    ]  # fmt: skip


def test_answers_got_in_another_way_have_rows_of_their_own() -> None:
    """A label by likelihood beside one that was said, or beams beside greedy, are no comparison."""
    said = {"settings": {"options": {"scoring": "greedy"}}}
    usual = {"settings": {"options": {"scoring": "likelihood", "search": {"beams": 1}}}}
    table = render([
        result("accuracy", 90.0, **usual, **TEACHER), result("accuracy", 80.0, **usual),
        result("accuracy", 10.0, **said),
    ])  # fmt: skip
    assert [line.split(" | ")[:4] for line in table.splitlines()[2:]] == [
        ["| fp16-sft", "torch", "", "90.00 ± 0.50 |"],
        ["| bitdistill", "onnx", "", "80.00 ± 0.50 |"],
        ["| bitdistill", "onnx", "said greedily", "10.00 ± 0.50 |"],
    ]  # fmt: skip
    search = {"beams": 4, "length_penalty": 0.5, "min_new_tokens": 3}
    (row,) = json.loads(
        render([result("rougeL", 20.0, settings={"options": {"search": search}})], "json")
    )
    assert row["answers"] == "4 beams, length penalty 0.5, at least 3 tokens"


def test_summary_columns_come_in_the_order_of_the_paper() -> None:
    names = ["rougeLsum", "rouge1", "bleu", "rougeL", "rouge2"]
    header = render([result(name, 1.0) for name in names], "markdown").splitlines()[0]
    places = [header.index(n) for n in ("BLEU", "ROUGE-1", "ROUGE-2", "ROUGE-L ", "ROUGE-Lsum")]
    assert places == sorted(places)


def test_seeds_and_variants_have_rows_of_their_own() -> None:
    """Seed 0 on one task does not stand beside seed 1 on another."""
    found = [
        result("accuracy", 80.0 + seed, task=task, seed=seed, artifact_hash=f"{task}{seed}")
        for task in ("sst2", "qnli")
        for seed in (0, 1)
    ]
    found.append(result("accuracy", 70.0, settings={"variant": "without norms"}))
    lines = render(found, "markdown").splitlines()
    assert lines[0].startswith("| Method | Backend | Variant | Seed |")
    assert [line.split("|")[3:7] for line in lines[2:]] == [
        ["  ", " 0 ", " 80.00 ± 0.50 ", " 80.00 ± 0.50 "],
        ["  ", " 1 ", " 81.00 ± 0.50 ", " 81.00 ± 0.50 "],
        [" without norms ", " 0 ", " 70.00 ± 0.50 ", " – "],
    ]


def test_methods_are_rows_and_tasks_are_columns() -> None:
    """A student for each task: one row, as in the paper; summaries have a table of their own."""
    found = [result("size_on_disk", 9.0, "MiB", artifact="first", artifact_hash="mnli")]
    for task, split in (("mnli", "validation_matched"), ("mnli", "validation_mismatched"),
                        ("sst2", "validation")):  # fmt: skip
        own = {"task": task, "split": split, "artifact": "first", "artifact_hash": task}
        found.append(result("accuracy", 90.0, **own))
        found.append(result("accuracy", 95.0, **own, method="fp16-sft"))
    found.append(result("bleu", 14.0, task="cnn_dailymail", artifact_hash="b"))
    first, second = render(found, "markdown").split("\n\n")
    lines = first.splitlines()
    assert lines[0] == (
        "| Method | Backend | mnli matched Accuracy (%, n=872) | "
        "mnli mismatched Accuracy (%, n=872) | sst2 Accuracy (%, n=872) | Size (MiB) |"
    )
    assert lines[2:] == [
        "| bitdistill | onnx | 90.00 ± 0.50 | 90.00 ± 0.50 | 90.00 ± 0.50 | 9.0 |",
        "| fp16-sft | onnx | 95.00 ± 0.50 | 95.00 ± 0.50 | 95.00 ± 0.50 | – |",
    ]
    assert second.splitlines()[0] == "| Method | Backend | BLEU (%, n=872) | Size (MiB) |"
    assert len(second.splitlines()) == 3
    tables = [row["table"] for row in json.loads(render(found, "json"))]
    assert tables == ["Classification", "Classification", "Summarisation"]


def test_ratios_to_another_reference_are_not_shown() -> None:
    """Of two evaluations in one file, each has a first row of 1.00×."""
    later = {"details": {"against": {"artifact_hash": "2"}}}
    second = {"artifact": "second", "artifact_hash": "2", "method": "bitnet-sft"}
    found = [
        *RESULTS,
        result("decode_speed", 99.0, "tokens/s", **second),
        result("decode_ratio", 1.0, "x", **second, **later),
    ]
    lines = render(found, "markdown").splitlines()
    assert [line.split("|")[5] for line in lines[2:]] == [
        " 1.00× (420) ", " 2.50× (1,050) ", " 99 ",
    ]  # fmt: skip
    assert json.loads(render(found, "json"))[2]["Decode (tok/s) ratio"] is None


def test_two_files_of_one_name_are_two_rows() -> None:
    """What is timed only has no task that would say it is one method on another."""
    speeds = [
        result("decode_speed", value, "tokens/s", method="gguf", artifact=name, artifact_hash=name)
        for name, value in (("a/Q4_0.gguf", 10.0), ("b/Q4_0.gguf", 20.0))
    ]
    lines = render([*RESULTS, *speeds], "markdown").splitlines()
    assert len(lines) == 2 + 4
    assert "| b/Q4_0.gguf | – | – | 20 | – |" in lines[-1]


def test_what_is_secondary_is_shown_where_nothing_else_is() -> None:
    assert "ECE" in render([result("ece", 3.0)], "markdown")
    assert "ECE" not in render(RESULTS, "markdown")


def test_precision_tells_rows_apart() -> None:
    rows = [result("accuracy", 1.0, precision=p, artifact_hash=p) for p in ("fp32", "int4")]
    assert render(rows, "markdown").startswith("| Method | Backend | Precision | Accuracy")


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
