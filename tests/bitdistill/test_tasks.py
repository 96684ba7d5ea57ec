"""Local files of every format, labels as words or numbers, and how bad data is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bitdistill.config import ConfigError, load_config
from bitdistill.distributed import World
from bitdistill.evals.examples import read_sets
from bitdistill.feeds import task_batches
from bitdistill.tasks import TASKS, Task, check_beginnings, get_task, load_examples

ROWS = [
    {"review": "not good", "verdict": 0},
    {"review": " bright film ", "verdict": 1},
    {"review": "100 % {awful} {0} %s", "verdict": 0},
]
COLUMNS = {"sentence": "review", "label": "verdict"}
SST2 = TASKS["sst2"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder: Path, form: str, rows: Sequence[dict[str, Any]]) -> Path:
    file = folder / f"data.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif form == "json":
        file.write_text(json.dumps(list(rows)), encoding="utf-8")
    elif form == "csv":
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("limit", [None, 2])
def test_local_files_with_mapped_columns(form: str, limit: int | None, tmp_path: Path) -> None:
    file = write(tmp_path, form, ROWS)
    examples = load_examples(SST2, file, limit=limit, columns=COLUMNS)
    assert len(examples) == (limit or 3)
    assert [e.label for e in examples] == [0, 1, 0][:limit]
    assert examples[1].prompt == (
        "bright film\nQuestion: Is this sentence positive or negative?\nAnswer:"
    )
    assert (examples[1].answer, examples[1].index) == (" positive", 1)


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_braces_and_percent_signs_are_data(form: str, tmp_path: Path) -> None:
    examples = load_examples(SST2, write(tmp_path, form, ROWS), columns=COLUMNS)
    assert examples[2].prompt.startswith("100 % {awful} {0} %s\nQuestion:")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    "labels", [["Negative", " positive "], ["0", "1"], [0.0, 1.0], ["0.0", "1.0"], [0, 1]]
)
def test_labels_as_words_and_numbers(form: str, labels: list[Any], tmp_path: Path) -> None:
    rows = [{"sentence": "a", "label": value} for value in labels]
    examples = load_examples(SST2, write(tmp_path, form, rows))
    assert [e.label for e in examples] == [0, 1]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_booleans_are_words_where_the_task_has_them(form: str, tmp_path: Path) -> None:
    rows = [{"premise": "a", "hypothesis": "b", "label": value} for value in (True, False)]
    examples = load_examples(TASKS["mnli"], write(tmp_path, form, rows))
    assert [e.answer for e in examples] == [" True", " False"]


def test_words_win_over_ids(tmp_path: Path) -> None:
    """A column of stars holds the answers "1" to "3", not ids from 0."""
    stars = dataclasses.replace(SST2, name="stars", labels=(" 1", " 2", " 3"), hub=None)
    rows = [{"sentence": "a", "label": value} for value in (1, 3, "2", 3.0, "1.0")]
    found = [e.label for e in load_examples(stars, write(tmp_path, "jsonl", rows))]
    assert found == [0, 2, 1, 2, 0]


def test_ids_are_refused_where_the_answers_are_numbers(tmp_path: Path) -> None:
    """Ids 0..2 of the answers 1..3 would otherwise be one answer too low, and no error."""
    stars = dataclasses.replace(SST2, name="stars", labels=(" 1", " 2", " 3"), hub=None)
    rows = [{"sentence": "a", "label": value} for value in (2, 1, 0)]
    with pytest.raises(ValueError, match=r"example 2 has label 0, .* has \(1, 2, 3\); fix"):
        load_examples(stars, write(tmp_path, "jsonl", rows))
    codes = dataclasses.replace(SST2, name="codes", labels=(" 01", " 02"), hub=None)
    rows = [{"sentence": "a", "label": value} for value in (1, 2.0, "01")]
    assert [e.label for e in load_examples(codes, write(tmp_path, "jsonl", rows))] == [0, 1, 0]


def test_null_and_na_are_text_in_a_csv(tmp_path: Path) -> None:
    rows = [{"sentence": text, "label": 1} for text in ("null", "NA", "None")]
    examples = load_examples(SST2, write(tmp_path, "csv", rows))
    assert [e.prompt.split("\n")[0] for e in examples] == ["null", "NA", "None"]


def test_cells_of_a_csv_are_the_text_that_stands_there(tmp_path: Path) -> None:
    """No column is taken for numbers, whatever its first ten thousand rows hold."""
    file = tmp_path / "orders.csv"
    text = '"He said ""007"",\nor 1.50"'
    rows = ["007,1,12", "1.50,01,12", f"{text},0,12", *["1e5,1,12"] * 12_000, "5,positive,B12"]
    file.write_text("\ufeffsentence,label,shelf\n" + "\n".join(rows) + "\n", encoding="utf-8")
    inputs = [example.inputs[0] for example in load_examples(SST2, file)]
    assert inputs[:4] == ["007", "1.50", 'He said "007",\nor 1.50', "1e5"]
    assert inputs[-1] == "5"
    long = "word " * 40_000
    file.write_text(f"sentence,label\n{long},1\n\n", encoding="utf-8")
    assert load_examples(SST2, file)[0].inputs == (long.strip(),)


def test_summaries(tmp_path: Path) -> None:
    rows = [{"document": "A long {story}.", "summary": " Short. ", "other": 1}]
    examples = load_examples(
        TASKS["cnn_dailymail"],
        write(tmp_path, "jsonl", rows),
        columns={"article": "document", "highlights": "summary"},
    )
    assert examples[0].prompt == "A long {story}.\n\nSummary:"
    assert (examples[0].answer, examples[0].label) == (" Short.", None)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("label", [2, -1, "neutral", 0.5, "", "nan"])
def test_labels_that_are_not_in_the_task(form: str, label: Any, tmp_path: Path) -> None:
    rows = [{"sentence": "b", "label": label}]
    with pytest.raises(ValueError) as caught:
        load_examples(SST2, write(tmp_path, form, rows))
    message = str(caught.value)
    assert message.startswith("example 0 has label ")
    assert "task 'sst2' has 0..1 (negative, positive); fix the data or map" in message


@pytest.mark.parametrize("column", ["sentence", "label"])
def test_a_missing_value(column: str, tmp_path: Path) -> None:
    rows = [{"sentence": "a", "label": 1}, {"sentence": "a", "label": 1, column: None}]
    with pytest.raises(ValueError, match=f"example 1 has no value in column '{column}'; fix"):
        load_examples(SST2, write(tmp_path, "jsonl", rows))


def test_an_empty_summary_is_a_missing_one(tmp_path: Path) -> None:
    data = write(tmp_path, "csv", [{"article": "a", "highlights": ""}])
    with pytest.raises(ValueError, match="example 0 has no value in column 'highlights'; fix"):
        load_examples(TASKS["cnn_dailymail"], data)


@pytest.mark.parametrize("value", [["a", "b"], {"text": "a"}, b"a"])
def test_what_is_no_text_is_not_written_out_as_python(value: Any, tmp_path: Path) -> None:
    data = write(tmp_path, "parquet", [{"sentence": value, "label": 1}])
    name = type(value).__name__
    with pytest.raises(ValueError, match=f"example 0 has a {name} in column 'sentence', not text"):
        load_examples(SST2, data)


def test_a_missing_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_examples(SST2, write(tmp_path, "jsonl", [{"sentense": "a", "label": 1}]))
    assert str(caught.value) == (
        "column 'sentence' is missing; the data has sentense, label; map it with "
        "--set task.columns.sentence=NAME, its name in the data"
    )
    load_config("tiny", ["task.columns.sentence=NAME"])  # what it says is a setting


def test_a_map_of_no_column_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path, "jsonl", [{"sentence": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"task 'sst2' has no column 'sentense'; did you mean 's"):
        load_examples(SST2, data, columns={"sentense": "sentence"})
    with pytest.raises(ValueError, match=r"no column 'foo'; known: sentence, label"):
        read_sets([], SST2, data, None, None, {"foo": "bar"})


@pytest.mark.parametrize("field", ["{sentence!z}", "{sentence:d}", "{sentence:{width}}"])
def test_a_prompt_that_no_text_can_fill_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=r"prompt '.*' cannot be filled in with texts \(.*; write"):
        dataclasses.replace(SST2, prompt=f"{field}\nAnswer:")
    with pytest.raises(ConfigError, match=r"^task: prompt "):
        load_config("tiny", [f"task.prompt='{field}'", "task.inputs=[sentence]",
                             "task.target=label", "task.labels=[a, b]"])  # fmt: skip


def test_a_missing_column_of_an_evaluation_is_mapped_on_the_command_line(tmp_path: Path) -> None:
    data = write(tmp_path, "jsonl", [{"sentense": "a", "label": 1}])
    with pytest.raises(ValueError, match="map it with --column sentence=NAME, its name in"):
        read_sets([], SST2, data, None, None, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty; give a file with at least one example"),
        ("a.jsonl", b"\n", "holds no examples"),
        ("a.csv", b"sentence,label\n", "holds no examples"),
        ("a.jsonl", b'{"sentence": "a", "label": 1}\nnot json\n', "(line 2: Expecting value"),
        ("a.csv", b'sentence,label\na,1\n"open,1\n', "read as csv (unexpected end of data"),
        ("a.csv", b"sentence,label\ngood,really,1\n", "(line 2: 3 cells, the header has 2; a text"),
        ("a.csv", b"sentence,label\na,1\ngood\n", "(line 3: 1 cells, the header has 2; a text"),
        ("a.csv", b"label,sentence,sentence\n1,a,b\n", "(two columns are called 'sentence')"),
        ("a.csv", b"sentence,label\n\xff\xfe,1\n", "cannot be read as csv ("),
        ("a.parquet", b"PAR1 no more", "cannot be read as parquet ("),
        ("a.txt", b"text", "a.txt: unknown format; use .jsonl, .json, .csv, .parquet"),
    ],
)
@pytest.mark.parametrize("limit", [None, 5])
def test_files_that_are_refused(
    name: str, content: bytes, message: str, limit: int | None, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_examples(SST2, tmp_path / name, limit=limit)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data file .*none.csv does not exist; check"):
        load_examples(SST2, tmp_path / "none.csv")


def test_unknown_tasks_and_tasks_without_data() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'sst3'; did you mean 'sst2'?"):
        get_task("sst3")
    own = dataclasses.replace(SST2, name="own", hub=None)
    with pytest.raises(ValueError, match="task 'own' has no hub data set; give a data file"):
        load_examples(own)
    with pytest.raises(ValueError, match="splits train, validation, not 'test'"):
        load_examples(TASKS["tiny"], split="test")


def test_hub_names() -> None:
    assert {name: task.hub for name, task in TASKS.items()} == {
        "sst2": ("nyu-mll/glue", "sst2"),
        "qnli": ("nyu-mll/glue", "qnli"),
        "mnli": ("nyu-mll/glue", "mnli"),
        "cnn_dailymail": ("abisee/cnn_dailymail", "3.0.0"),
        "tiny": None,
    }
    assert TASKS["mnli"].splits == ("train", "validation_matched", "validation_mismatched")
    assert TASKS["mnli"].evaluation_splits == ("validation_matched", "validation_mismatched")


@pytest.mark.parametrize("name", ["sst2", "cnn_dailymail"])
def test_no_network_is_one_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub = TASKS[name].hub
    assert hub is not None
    with pytest.raises(ValueError) as caught:
        load_examples(TASKS[name])
    message = str(caught.value)
    assert message.startswith(f"data set {hub[0]} (validation) cannot be had (")
    assert message.endswith("); check the name and the network, or give a local file")
    assert "\n" not in message


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_survives_json(task: Task) -> None:
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task


def test_answers_that_begin_one_another(tokenizer: Any, tmp_path: Path) -> None:
    """Stars from 1 to 10, in a vocabulary of digits; found before anything is trained."""
    stars = [str(i) for i in range(1, 11)]
    data = write(tmp_path, "jsonl", [{"review": "not good", "stars": star} for star in stars])
    task = {"name": "stars", "prompt": "{review}:", "inputs": ["review"], "target": "stars",
            "labels": [f" {star}" for star in stars], "train": str(data)}  # fmt: skip
    config = load_config("tiny", [f"task={json.dumps(task)}"])
    with pytest.raises(ValueError, match=r"answer ' 1' of task 'stars' begin those of ' 10'"):
        task_batches(config, config.distill, tokenizer, World())
    task["labels"] = [f" {star:0>2}" for star in stars]
    config = load_config("tiny", [f"task={json.dumps(task)}"])
    answers = [tokenizer.encode(label) for label in config.task.labels]
    assert {len(ids) for ids in answers} == {3}
    check_beginnings(config.task.resolve(), answers)
