"""Means over training seeds, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill.evals import Result, read_jsonl, render, rich_tables
from bitdistill.evals.seeds import seed_rows

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "results"


def scored(value: float, seed: int | None, method: str = "bitdistill", **other: Any) -> Result:
    fields: dict[str, Any] = {
        "metric": "accuracy", "unit": "%", "model": "tiny", "backend": "torch", "task": "sst2",
        "split": "validation", "n": 200, "stderr": 1.0, "artifact": method,
        "artifact_hash": f"{method}{seed}", "student": None if method == "fp16-sft" else f"s{seed}",
        "precision": "fp32" if method == "fp16-sft" else "1.58-bit",
        "details": {"confusion": [[70, 50], [30, 50]]},
    }  # fmt: skip
    return Result(value=value, seed=seed, method=method, **(fields | other))


def paired(value: float, seed: int, low: float, high: float, of: str = "accuracy") -> Result:
    against = {"artifact_hash": f"fp16-sft{seed}"}
    return scored(
        value,
        seed,
        metric="difference",
        interval=(low, high),
        details={"of": of, "against": against},
    )


RESULTS = [
    scored(90.0, 1, "fp16-sft"),
    scored(88.0, 1),
    paired(-2.0, 1, -4.0, 0.0),
    paired(-9.0, 1, -9.0, -9.0, of="ece"),
    scored(99.0, 1, metric="agreement", precision="1.58-bit in fp64"),
    scored(50.0, 1, precision="1.58-bit in fp64"),
    scored(92.0, 0, "fp16-sft"),
    scored(70.0, 0),  # an earlier evaluation
    scored(93.0, 0),
    paired(1.0, 0, -1.0, 3.0),
    scored(80.0, 0, "bitnet-sft"),
]


def test_means_differences_and_intervals() -> None:
    teacher, student, direct = seed_rows(RESULTS)
    assert [row.method for row in (teacher, student, direct)] == [
        "fp16-sft", "bitdistill", "bitnet-sft",
    ]  # fmt: skip
    assert (teacher.mean, teacher.difference, teacher.interval) == (91.0, None, None)
    assert (student.mean, student.difference, student.interval) == (90.5, -0.5, (-2.5, 1.5))
    assert (student.majority, [run.flips for run in student.runs]) == (60.0, [None, 2])
    assert (direct.difference, direct.interval) == (-12.0, None)  # seen beside no teacher


def test_the_table_in_each_format() -> None:
    cells = "| sst2, validation, n=200, majority 60.00 | Accuracy | bitdistill "
    assert cells + "| 90.50 | 0: 93.00, 1: 88.00 | -0.50 | -2.5, +1.5 | 2 |" in render(
        RESULTS, "markdown", seeds=True
    )
    records = json.loads(render(RESULTS, "json", seeds=True))
    assert (records[1]["seed 0"], records[1]["seed 1 fp64 flips"]) == (93.0, 2)
    assert (records[1]["difference low"], records[1]["difference high"]) == (-2.5, 1.5)
    assert r"& Seeds & $\Delta$ FP16 &" in render(RESULTS, "latex", seeds=True)
    assert render(RESULTS, "csv", seeds=True).splitlines()[2].startswith("sst2,validation,accuracy")
    (table,) = rich_tables(RESULTS, seeds=True)
    assert table.row_count == 3


def test_models_that_were_not_trained_here_have_no_seed() -> None:
    (row,) = seed_rows([scored(75.0, None, "gguf")])
    assert ([run.seed for run in row.runs], row.difference) == ([None], None)
    assert "| 75.00 | 75.00 |" in render([scored(75.0, None)], "markdown", seeds=True)


def test_a_seed_that_was_trained_twice_counts_twice() -> None:
    """Each student beside its own teacher, whichever came last."""
    again = {"artifact_hash": "again", "student": "s0 again"}
    against = {"of": "accuracy", "against": {"artifact_hash": "fp16-sft0"}}
    results = [
        *RESULTS,
        scored(80.0, 0, "fp16-sft", artifact_hash="another"),
        scored(95.0, 0, **again),
        scored(3.0, 0, **again, metric="difference", interval=(1.0, 5.0), details=against),
    ]
    teacher, student, direct = seed_rows(results)
    assert teacher.mean == pytest.approx((92 + 80 + 90) / 3)
    assert [(run.seed, run.result.value) for run in student.runs] == [(0, 93), (0, 95), (1, 88)]
    assert (student.mean, student.difference) == (92.0, pytest.approx((1 + 3 - 2) / 3))
    assert student.interval == pytest.approx((-4 / 3, 8 / 3))
    assert direct.difference == 0.0  # compared with none: the seed's last
    (_, record, _) = json.loads(render(results, "json", seeds=True))
    assert (record["seed 0"], record["seed 0 run 2"], record["seed 1"]) == (93, 95, 88)


def test_a_model_in_another_precision_is_no_other_seed() -> None:
    """Nor a teacher to compare with; its own difference has no interval where it has no figure."""
    half = {"precision": "bf16", "artifact_hash": "half"}
    against = {"of": "accuracy", "against": {"artifact_hash": "fp16-sft1"}}
    results = [
        *RESULTS,
        scored(60.0, 1, "fp16-sft", **half),
        scored(-30.0, 1, "fp16-sft", **half, metric="difference", interval=(-31.0, -29.0),
               details=against),
        scored(86.0, 1, precision="int4", artifact_hash="four"),
    ]  # fmt: skip
    rows = {row.label: row for row in seed_rows(results)}
    assert list(rows) == [
        "fp16-sft", "bitdistill", "bitnet-sft", "fp16-sft (bf16)", "bitdistill (int4)",
    ]  # fmt: skip
    assert (rows["fp16-sft"].mean, rows["bitdistill"].difference) == (91.0, -0.5)
    assert (rows["fp16-sft (bf16)"].difference, rows["fp16-sft (bf16)"].interval) == (None, None)
    assert rows["bitdistill (int4)"].difference == -4.0


def test_two_artifacts_of_a_student_are_rows_of_their_own() -> None:
    made = [
        scored(value, seed, backend="onnx", artifact=name, artifact_hash=f"{name}{seed}")
        for seed, name, value in [(0, "s0/onnx", 90.0), (0, "s0/kv32", 92.0), (1, "s1/onnx", 80.0)]
    ]
    rows = {row.label: [run.result.value for run in row.runs] for row in seed_rows(made)}
    assert rows == {"bitdistill (onnx)": [90.0, 80.0], "bitdistill (onnx, kv32)": [92.0]}
    (row,) = seed_rows(made[::2])  # one artifact of each needs no name
    assert (row.label, row.mean) == ("bitdistill (onnx)", 85.0)
    again = scored(91.0, 0, backend="onnx", artifact="s0/onnx", artifact_hash="exported again")
    (row,) = seed_rows([*made[::2], again])
    assert [run.result.value for run in row.runs] == [91.0, 80.0]
    published = seed_rows(read_jsonl(PUBLISHED / "showcase-artifacts-before.jsonl"))
    boolq = {row.label: len(row.runs) for row in published if row.task == "boolq"}
    assert boolq["bitdistill (onnx)"] == 2
    assert boolq["bitdistill (onnx-kv32)"] == 1


def test_a_directory_may_be_evaluated_under_two_names() -> None:
    """Alone it is `student`, beside those of other seeds `s0/student`."""
    results = [scored(90.0 + s, s, artifact=f"s{s}/student") for s in (0, 1, 2)]
    (row,) = seed_rows([*results, scored(93.0, 0, artifact="student")])
    assert (row.label, [run.result.value for run in row.runs]) == ("bitdistill", [93.0, 91.0, 92.0])


def test_evaluations_of_other_examples_are_not_mixed() -> None:
    """A short evaluation's difference, agreement and teacher say nothing of the whole."""
    short = [
        dataclasses.replace(r, n=50)
        for r in [scored(88.0, 1), paired(7.0, 1, 6.0, 8.0),
                  scored(50.0, 1, metric="agreement", precision="1.58-bit in fp64")]
    ]  # fmt: skip
    for results in ([*short, *RESULTS], [*RESULTS, *short[1:]]):
        (student,) = [row for row in seed_rows(results) if row.method == "bitdistill"]
        assert (student.difference, student.interval) == (-0.5, (-2.5, 1.5))
        assert [run.flips for run in student.runs] == [None, 2]
    (alone,) = [row for row in seed_rows([scored(92.0, 0, "fp16-sft"), dataclasses.replace(
        scored(80.0, 0), n=50)]) if row.method == "bitdistill"]  # fmt: skip
    assert alone.difference is None
    asked = [scored(92.0, 0, "fp16-sft", settings={"examples": "a"}),
             scored(80.0, 0, settings={"examples": "b"})]  # fmt: skip
    assert [row.difference for row in seed_rows(asked)] == [None, None]


def test_answers_got_in_another_way_are_not_mixed() -> None:
    """Labels that were said are compared with those that a teacher said, of the same model."""
    said = {"settings": {"options": {"scoring": "greedy"}}}
    results = [*RESULTS, scored(40.0, 0, **said), scored(20.0, 1, **said)]
    rows = {row.label: row for row in seed_rows(results)}
    assert (rows["bitdistill"].mean, rows["bitdistill"].difference) == (90.5, -0.5)
    own = rows["bitdistill (said greedily)"]
    assert ([run.result.value for run in own.runs], own.difference) == ([40.0, 20.0], None)
    rows = {row.label: row for row in seed_rows([*results, scored(50.0, 1, "fp16-sft", **said)])}
    assert rows["bitdistill (said greedily)"].difference == -30.0
    assert rows["fp16-sft"].mean == 91.0


def test_variants_are_rows_of_their_own() -> None:
    """Of an ablation; each is compared with the teacher of its variant, else with the plain one."""
    own = {"settings": {"variant": "smaller teacher"}}
    results = [scored(90.0, 0, "fp16-sft"), scored(86.0, 0, "fp16-sft", **own)]
    results += [scored(85.0, 0, **own), scored(84.0, 0, settings={"variant": "no KL"})]
    rows = {row.label: row.difference for row in seed_rows([*results, scored(88.0, 0)])}
    assert rows == {
        "fp16-sft": None, "fp16-sft: smaller teacher": None, "bitdistill: smaller teacher": -1.0,
        "bitdistill: no KL": -6.0, "bitdistill": -2.0,
    }  # fmt: skip


def test_published_ablations_are_read() -> None:
    """Every variant is compared with its own teacher, as it was recorded."""
    found = {
        name: {row.variant: row for row in seed_rows(read_jsonl(PUBLISHED / f"{name}.jsonl"))
               if row.method == "bitdistill"}
        for name in ("boolq-ablation", "sst2-movie-ablation")
    }  # fmt: skip
    for row in found["boolq-ablation"].values():
        (run,) = row.runs
        assert run.paired is not None
        assert row.interval == run.paired.interval
        assert row.difference == pytest.approx(run.paired.value, abs=0.011)  # rounded
    two_seeds = found["sst2-movie-ablation"]["as showcase/sst2-movie was then"]
    assert two_seeds.difference == pytest.approx((90.02 - 90.71 + 90.02 - 90.02) / 2)
    assert [run.flips for run in two_seeds.runs] == [3, 1]
    assert (len(found["boolq-ablation"]), len(found["sst2-movie-ablation"])) == (4, 7)


def test_nothing_to_show() -> None:
    with pytest.raises(ValueError, match="no scores"):
        seed_rows([scored(1.0, 0, metric="size_on_disk", unit="MiB")])


def test_versions_of_a_task_are_not_mixed() -> None:
    """Another prompt or other answers: neither one mean nor one column, nor compared."""
    results = [*RESULTS, scored(60.0, 0, task_version=2), scored(95.0, 0, "gguf", task_version=2)]
    rows = {(row.task, row.label): row for row in seed_rows(results)}
    assert rows["sst2", "bitdistill"].mean == 90.5
    second = rows["sst2-v2", "bitdistill"]
    assert (second.mean, second.difference) == (60.0, None)
    header, _, *lines = render(results[-3:], "markdown").splitlines()
    assert "| sst2 Accuracy (%, n=200) | sst2-v2 Accuracy (%, n=200) |" in header
    assert [line.split("|")[-3:-1] for line in lines] == [
        [" 80.00 ± 1.00 ", " – "], [" – ", " 60.00 ± 1.00 "], [" – ", " 95.00 ± 1.00 "],
    ]  # fmt: skip
