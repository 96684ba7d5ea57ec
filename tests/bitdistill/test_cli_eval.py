"""`bitdistill eval` and `report` as a user runs them: tasks, splits, files of every kind."""

from __future__ import annotations

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from short_runs import Done

from bitdistill.tasks import TASKS

Cli = Callable[..., Done]
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()
SPLITS = ("validation_matched", "validation_mismatched")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def invented(path: Path) -> None:
    """Three files of a 3-way pair task, with MNLI's columns and the names of its splits."""
    draw = random.Random(0)
    for name in ("train", *SPLITS):
        rows = [
            {
                "premise": " ".join(draw.choices(WORDS, k=9)),
                "hypothesis": " ".join(draw.choices(WORDS, k=5)),
                "label": i % 3,
                "idx": i,
            }
            for i in range(24)
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def wordnet(path: Path) -> None:
    """Real sentence pairs; the two splits are two halves of the validation file."""
    source = SHARED / "mnli-wordnet"
    if not source.is_dir():
        pytest.skip("no shared/data beside the checkout: real files are not distributed")
    lines = (source / "train.jsonl").read_text().splitlines(keepends=True)
    (path / "train.jsonl").write_text("".join(lines[:60]))
    lines = (source / "validation.jsonl").read_text().splitlines(keepends=True)
    for name, part in zip(SPLITS, (lines[:40], lines[-40:]), strict=True):
        (path / f"{name}.jsonl").write_text("".join(part))


@pytest.mark.parametrize("make", [invented, pytest.param(wordnet, marks=pytest.mark.slow)])
def test_a_pair_task_from_training_to_the_table(
    cli: Cli, make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path,
    make: Callable[[Path], None],
) -> None:  # fmt: skip
    make(tmp_path)
    model = make_teacher("qwen3", max_position_embeddings=256)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    settings = [f"model.source={tmp_path / 'm'}", "base.enabled=false", "bitnet_sft.enabled=false"]
    settings += ["task.name=mnli", f"task.train={tmp_path / 'train.jsonl'}"]
    settings += [f"task.validation={tmp_path / SPLITS[0]}.jsonl", "student.calibration_batches=1"]
    settings += [f"{s}.{k}" for s in ("teacher", "distill") for k in ("steps=1", "batch_size=2")]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert cli("train", "--out", "run", *arguments).code == 0
    done = cli("export", "run/student", "--target", "onnx", "--out", "run/onnx", "--no-parity")
    assert done.code == 0
    data = [part for name in SPLITS for part in ("--data", tmp_path / f"{name}.jsonl")]
    rows = ["run/student", "run/onnx"]
    done = cli("eval", *rows, *data, "--no-speed", "--format", "csv", "--out", "results.jsonl")
    assert done.code == 0
    table = list(csv.DictReader(io.StringIO(done.out)))
    n = 24 if make is invented else 40
    for row in table:
        for split in ("matched", "mismatched"):
            assert int(row[f"mnli {split} Accuracy (%) n"]) == n
            low, value, high = (
                float(row[f"mnli {split} Accuracy (%){part}"]) for part in (" low", "", " high")
            )
            assert 0 <= low <= value <= high <= 100
    assert float(table[1]["mnli matched Agreement (%)"]) > 50
    lines = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()]
    accuracy = next(line for line in lines if line["metric"] == "accuracy")
    assert accuracy["details"]["labels"] == ["True", "Neither", "False"]
    assert sum(map(sum, accuracy["details"]["confusion"])) == n
    assert accuracy["settings"]["single_token_answers"] is False
    # the same again is read from the store, and so is a report of it
    again = cli("eval", *rows, *data, "--no-speed", "--format", "csv")
    assert (again.out, again.err) == (done.out, "")
    assert cli("report", "results.jsonl", "--format", "csv").out == done.out
    header = cli("report", "results.jsonl", "--format", "markdown").out.splitlines()[0]
    assert f"| mnli matched Accuracy (%, n={n}) |" in header
    assert f"| mnli mismatched Accuracy (%, n={n}) |" in header


def test_a_label_task_in_yaml(
    cli: Cli, refused: Callable[..., str], artifact: Path, tmp_path: Path
) -> None:
    task = {
        "name": "tickets", "kind": "label", "prompt": "{subject}\n{body}\nTeam:",
        "inputs": ["subject", "body"], "target": "team", "labels": [" good", " dull", " plot"],
        "metrics": ["accuracy", "ece"], "version": 2, "columns": {"team": "who"},
        "validation": str(tmp_path / "tickets.csv"),
    }  # fmt: skip
    rows = ["subject,body,who", "the film,is not good,dull", "a plot,we liked it,2", "it,is bad,0"]
    (tmp_path / "tickets.csv").write_text("\n".join(rows))
    file = tmp_path / "tickets.yaml"
    file.write_text(yaml.safe_dump(task))
    arguments = ["eval", artifact, "--no-speed", "--format", "json", "--task", file]
    found = json.loads(cli(*arguments).out)
    assert found[0]["Accuracy (%) n"] == 3
    assert "ECE (%)" in found[0]
    assert "Perplexity" not in found[0]
    file.write_text(yaml.safe_dump({"name": "own", "task": task}))  # as it stands in a recipe
    assert json.loads(cli(*arguments).out) == found
    greedy = json.loads(cli(*arguments, "--scoring", "greedy").out)
    assert "ECE (%)" not in greedy[0]
    file.write_text(yaml.safe_dump(task | {"labls": []}))
    message = refused(*arguments)
    assert message == f"{file}: unknown key 'labls'; did you mean 'labels'?"
    file.write_text(yaml.safe_dump(task | {"metrics": ["bleu"]}))
    assert refused(*arguments).startswith("a label task has no metric 'bleu'; known: accuracy,")


def test_a_summary_task_in_yaml(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    task = {
        "name": "gist", "kind": "summary", "prompt": "{text}\nGist:", "inputs": ["text"],
        "target": "gist", "max_new_tokens": 6, "validation": str(tmp_path / "gist.jsonl"),
        "metrics": ["bleu", "rougeL", "perplexity"],
    }  # fmt: skip
    rows = [{"text": " ".join(WORDS[i:]), "gist": " ".join(WORDS[: i + 2])} for i in range(5)]
    (tmp_path / "gist.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "gist.yml"
    file.write_text(yaml.safe_dump(task))
    arguments = ["eval", artifact, "--no-speed", "--format", "json", "--task", file]
    found = [
        json.loads(cli(*arguments, *more).out)[0]
        for more in ([], ["--beams", "3", "--min-new-tokens", "2", "--max-new-tokens", "4"])
    ]
    assert list(found[0])[8:] == [
        "BLEU (%)", "BLEU (%) stderr", "BLEU (%) low", "BLEU (%) high", "BLEU (%) n",
        "ROUGE-L (%)", "ROUGE-L (%) stderr", "ROUGE-L (%) low", "ROUGE-L (%) high",
        "ROUGE-L (%) n", "Perplexity", "Perplexity stderr", "Perplexity low", "Perplexity high",
        "Perplexity n", "Size (MiB)", "Size (MiB) ratio",
    ]  # fmt: skip
    assert found[0]["Perplexity"] > 1
    assert found[0] != found[1]
    said = "3 beams, length penalty 1, at least 2 tokens"
    assert [record["answers"] for record in found] == ["", said]


@pytest.mark.slow
def test_everything_at_once(
    cli: Cli, refused: Callable[..., str], artifact: Path, reviews: Path,
    make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path,
) -> None:  # fmt: skip
    """Baselines, timings, results, pictures and a report, by one command."""
    from bitdistill import checkpoint

    pytest.importorskip("matplotlib")
    content = {"method": "fp16-sft", "base_model": "random", "task": TASKS["sst2"].to_json()}
    teacher = tmp_path / "teacher"
    checkpoint.save(teacher, make_teacher("qwen3"), tokenizer, "teacher", content, "# A teacher\n")
    arguments = ["eval", teacher, artifact, "--data", reviews, "--limit", "4", "--threads", "1"]
    arguments += ["--baseline", "torch-bf16", "--baseline", "onnx-int4", "--format", "json"]
    arguments += ["--out", "r.jsonl", "--plot", "pictures/p", "--html", "r.html"]
    done = cli(*arguments)
    assert done.code == 0
    rows = json.loads(done.out)
    names = [(row["method"], row["backend"], row["precision"]) for row in rows]
    assert names == [
        ("fp16-sft", "torch", "fp32"), ("bitdistill", "onnx", "1.58-bit"),
        ("fp16-sft", "torch", "bf16"), ("fp16-sft", "onnx", "int4"),
    ]  # fmt: skip
    assert rows[0]["Decode (tok/s) ratio"] == 1.0
    assert all(row["Decode (tok/s) ratio"] > 0 and row["Memory (MiB)"] > 0 for row in rows)
    files = done.err.splitlines()[-7:]
    assert files[0] == "pictures/p-sst2-reviews-accuracy.png"
    assert all(Path(file).stat().st_size > 0 for file in files)
    assert files[-1] == "r.html"
    again = cli(*arguments[:-6])
    assert again.out == done.out  # timings too: nothing is measured again
    assert refused("eval", artifact, "--baseline", "torch-bf16", "--data", reviews) == (
        "baselines are made of the teacher; give its directory as well"
    )


def test_baselines_of_a_hugging_face_model(
    cli: Cli, reviews: Path, make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    make_teacher("llama").save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    done = cli(
        "eval", tmp_path / "plain", "--task", "sst2", "--data", reviews, "--limit", "4",
        "--baseline", "onnx-fp32", "--no-speed", "--format", "json",
    )  # fmt: skip
    assert done.code == 0, done.err
    torch_row, onnx_row = json.loads(done.out)
    assert (torch_row["method"], torch_row["backend"]) == ("base", "torch")
    assert (onnx_row["method"], onnx_row["backend"]) == ("base", "onnx")
    assert onnx_row["Accuracy (%)"] == torch_row["Accuracy (%)"]


def test_mistakes_in_a_report(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("")
    assert refused("report", tmp_path / "r.jsonl") == (
        "there are no results to show; run `bitdistill eval` first"
    )
    for option in ("--html", "--plot"):
        message = refused("report", tmp_path / "r.jsonl", option, tmp_path / "r.jsonl" / "x")
        assert message.endswith(f"cannot be a file there; choose another {option}")
    none = tmp_path / "none.jsonl"
    assert refused("report", none) == f"results file {none} does not exist; check the path"


def test_nothing_is_written_over_results_or_appended_to_data(
    refused: Callable[..., str], artifact: Path, reviews: Path, tmp_path: Path
) -> None:
    results, before = tmp_path / "r.jsonl", reviews.read_text()
    results.write_text("")
    message = "r.jsonl is read or appended to; write the report to another file"
    assert message in refused("report", results, "--html", results)
    asked = ["eval", artifact, "--data", reviews, "--no-speed"]
    assert message in refused(*asked, "--out", results, "--html", results)
    assert "is read or appended to" in refused(*asked, "--html", reviews)
    assert f"{reviews}, line 1 is not a result (" in refused(*asked, "--out", reviews)
    assert (results.read_text(), reviews.read_text()) == ("", before)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared/data beside the checkout")
def test_real_articles_are_summarised(cli: Cli, artifact: Path) -> None:
    done = cli(
        "eval", artifact, "--task", "cnn_dailymail", "--no-speed", "--limit", "3",
        "--data", SHARED / "summary-bbc" / "validation.jsonl", "--column", "article=document",
        "--column", "highlights=summary", "--max-new-tokens", "12", "--format", "csv",
    )  # fmt: skip
    assert done.code == 0
    (row,) = csv.DictReader(io.StringIO(done.out))
    assert float(row["ROUGE-Lsum (%)"]) >= 0
    assert row["BLEU (%) n"] == "3"
