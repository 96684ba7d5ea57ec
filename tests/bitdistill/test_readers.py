"""Corpus sources: every format, entered at any position; what is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from bitdistill.config import load_config
from bitdistill.data import check_sources, task_examples
from bitdistill.documents import Source, open_source
from bitdistill.inputs import Inputs
from bitdistill.readers import JsonLines, Parquet, Texts
from bitdistill.sources import file_rows

TEXTS = [f"document {i}\nwith ümläuts and {'more ' * (i % 7)}text" for i in range(700)]
FORMS = ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "parquet", "array", "folder", "pattern"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "body": t}) + "\n" for t in texts).encode()


def write(folder: Path, form: str, texts: list[str]) -> str:
    """A corpus of one form; the name to give as a source."""
    import pandas as pd
    import pyarrow as pa

    file = folder / f"corpus.{form}"
    frame = pd.DataFrame({"body": texts, "n": 1})
    if form == "jsonl":
        half = lines(texts[:5]).replace(b"\n", b"\n\n")  # empty lines are no documents
        file.write_bytes(half + lines(texts[5:])[:-1])  # and the last line need not end
    elif form == "jsonl.gz":  # two members, as appending makes them
        file.write_bytes(gzip.compress(lines(texts[:100])) + gzip.compress(lines(texts[100:])))
    elif form == "jsonl.zst":
        with pa.CompressedOutputStream(str(file), "zstd") as stream:
            stream.write(lines(texts))
    elif form == "csv":
        frame.to_csv(file, index=False)
    elif form == "parquet":
        frame.to_parquet(file, row_group_size=100)
    elif form == "array":
        file = folder / "corpus.json"
        file.write_text(json.dumps([{"body": t} for t in texts]))
    else:
        inside = folder / "parts"
        inside.mkdir()
        (inside / "b.jsonl").write_bytes(lines(texts[300:]))
        frame[:300].to_parquet(inside / "a.parquet", row_group_size=64)
        (inside / "README.md").write_text("not a corpus")
        return str(inside if form == "folder" else inside / "[ab]*")
    return str(file)


def source_of(name: str, *settings: str) -> Source:
    config = load_config("tiny", [f"corpus.{setting}" for setting in settings])
    return open_source(name, config.corpus, config.task, config.seed)


def take(source: Source, count: int) -> list[str]:
    return [source.next() for _ in range(count)]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_from_any_position(form: str, tmp_path: Path) -> None:
    """Round and round; a position is JSON and means the same in another process."""
    name = write(tmp_path, form, TEXTS)
    whole = source_of(name, "column=body")
    states = []
    for index in range(2 * len(TEXTS) + 3):
        if index % 173 in (0, 1) or index in (700, 701):
            states.append((index, json.dumps(whole.state())))
        assert take(whole, 1) == [TEXTS[index % len(TEXTS)]]
    for index, state in states:
        again = source_of(name, "column=body")
        again.restore(json.loads(state))
        assert take(again, 2) == [TEXTS[index % 700], TEXTS[(index + 1) % 700]], index


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "csv", "parquet"])
def test_a_limit(form: str, tmp_path: Path) -> None:
    source = source_of(write(tmp_path, form, TEXTS), "column=body", "limit=2")
    assert take(source, 5) == [TEXTS[i] for i in (0, 1, 0, 1, 0)]
    again = source_of(write(tmp_path, form, TEXTS), "column=body", "limit=2")
    again.restore(source.state())
    assert take(again, 2) == [TEXTS[1], TEXTS[0]]


def test_a_position_is_entered_without_reading_what_is_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON lines from their byte, parquet from its row group: damage before it is not even met."""
    file = Path(write(tmp_path, "jsonl", TEXTS))
    reader = JsonLines(file, "body")
    rows = reader.rows(None)
    for _ in range(500):
        row = next(rows)
    position = reader.position
    content = file.read_bytes()
    file.write_bytes(b"\xff" * position + content[position:])
    again = JsonLines(file, "body")
    assert again.value(next(again.rows(position))) == TEXTS[500]
    assert reader.value(row) == TEXTS[499]

    from pyarrow import parquet

    table = Path(write(tmp_path, "parquet", TEXTS))
    asked: list[range] = []
    original = parquet.ParquetFile.iter_batches

    def noted(self: Any, size: int, groups: range, *rest: Any, **options: Any) -> Any:
        asked.append(groups)
        return original(self, size, groups, *rest, **options)

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", noted)
    at = Parquet(table, "body")
    assert at.value(next(at.rows(512))) == TEXTS[512]
    assert asked == [range(5, 7)]


def test_the_task_and_the_embedded_corpus(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"sentence": f"film {i}", "label": i % 2} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config("tiny", [f"task={{name: sst2, train: {file}}}"])
    texts = take(open_source("task", config.corpus, config.task, 0), 6)
    assert sorted(t.split("\n")[0] for t in texts) == [f"film {i}" for i in range(6)]
    assert texts != sorted(texts)
    assert all(t.endswith(("Answer: positive", "Answer: negative")) for t in texts)
    few = config.task.model_copy(update={"limit_train": 2})
    chosen = {e.prompt for e in task_examples(few, 7)}
    some = take(open_source("task", config.corpus, few, 0, 7), 2)
    assert {text.rpartition(" ")[0] for text in some} == chosen
    tiny = source_of("tiny")
    first = take(tiny, 20)
    tiny.restore({"epoch": 0, "index": 5, "at": 5})
    assert take(tiny, 15) == first[5:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "data file .*gone.jsonl does not exist; check the path"),
        ("none/*.jsonl", None, r"data file .*none/\*.jsonl does not exist; check the path"),
        ("corpus.txt", "plain", "corpus.txt: unknown format; use .jsonl"),
        ("corpus.csv.gz", "plain", r"corpus.csv.gz: unknown format; .*compressed JSON lines"),
        (
            "number.jsonl",
            '{"text": 5}\n',
            "row 0 of .*number.jsonl has 5 in column 'text', not text",
        ),
        ("null.jsonl", '{"text": "a"}\n{"text": null}\n', "row 1 of .* has None in column 'text'"),
        ("bad.jsonl", '{"text": ', r"bad.jsonl cannot be read as json \("),
        ("list.jsonl", "[1, 2]\n", "list.jsonl holds a line that is no object"),
        ("other.jsonl", '{"a": 1, "b": 2}\n', "no column 'text', only a, b; set corpus.column"),
        ("other.csv", "a,b\n1,2\n", "no column 'text', only a, b; set corpus.column"),
        ("bad.parquet", "PAR1, but no more", r"bad.parquet cannot be read as parquet \("),
        ("bad.jsonl.gz", "not compressed", r"bad.jsonl.gz cannot be read as json \("),
        ("empty.jsonl", "", "the pre-training corpus is empty; check corpus.sources"),
    ],
)
def test_corpora_that_are_refused(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        take(source_of(str(tmp_path / name)), 2)


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no column 'text', only body, n; set corpus.column"):
        take(source_of(write(tmp_path, "parquet", TEXTS)), 1)


def test_a_hub_corpus_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data set some/corpus \(train\) cannot be had"):
        take(source_of("some/corpus"), 1)


def test_a_hub_corpus_goes_on_by_its_own_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of several files, as the hub has them; `datasets` finds the file and the row."""
    import datasets

    load, files = datasets.load_dataset, []
    for part in range(3):
        files.append(str(tmp_path / f"{part}.jsonl"))
        Path(files[-1]).write_bytes(lines(TEXTS[part * 50 : part * 50 + 50]))
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, configuration, split, streaming: load(
            "json", data_files=files, split=split, streaming=streaming
        ),
    )
    source = source_of("some/corpus", "column=body")
    assert take(source, 120) == TEXTS[:120]
    again = source_of("some/corpus", "column=body")
    again.restore(json.loads(json.dumps(source.state())))
    assert take(again, 35) == TEXTS[120:150] + TEXTS[:5]


def test_sources_are_checked_before_anything_else(tmp_path: Path) -> None:
    settings = [f"corpus.sources=[tiny, '{tmp_path}/*.jsonl']", "corpus.column=body"]
    with pytest.raises(FileNotFoundError, match=r"\*.jsonl does not exist"):
        check_sources(load_config("tiny", settings))
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    check_sources(load_config("tiny", settings))


def test_folders_with_the_names_of_embedded_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`bitdistill train` works beside a folder `tiny`, whatever is in it."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "task"):
        (tmp_path / name).mkdir()
    config = load_config("tiny", ["corpus.sources=[tiny, task]"])
    check_sources(config)
    assert Inputs(config).of(["corpus"]) == {}


def test_compressed_files_are_no_task_data(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS)))
    with pytest.raises(ValueError, match=r"unknown format; use .jsonl"):
        file_rows(tmp_path / "train.jsonl.gz")


def test_an_empty_source() -> None:
    with pytest.raises(ValueError, match=r"the pre-training corpus is empty; check corpus.sources"):
        Source("list", Texts(lambda: [])).next()


def shuffled(count: int, block: int, seed: int = 0) -> Source:
    texts = [f"document {i}" for i in range(count)]
    return Source("texts", Texts(lambda: texts), shuffle=block, seed=seed)


@pytest.mark.parametrize("block", [1, 7, 20, 100])
def test_a_block_changes_places_anew_in_each_pass(block: int) -> None:
    source = shuffled(20, block)
    passes = [[source.next() for _ in range(20)] for _ in range(2)]
    plain = [f"document {i}" for i in range(20)]
    for read in passes:
        assert sorted(read) == sorted(plain)
        for start in range(0, 20, block):  # nothing leaves its block
            assert sorted(read[start : start + block]) == sorted(plain[start : start + block])
    if block > 1:
        assert plain != passes[0] != passes[1] != plain
        assert [shuffled(20, block, seed=1).next() for _ in range(20)] != passes[0]


@pytest.mark.parametrize("stop", [0, 1, 6, 7, 8, 20, 33])
def test_a_shuffled_source_resumes_exactly(stop: int) -> None:
    whole = shuffled(20, 7)
    read = [whole.next() for _ in range(45)]
    part = shuffled(20, 7)
    assert [part.next() for _ in range(stop)] == read[:stop]
    rest = shuffled(20, 7)
    rest.restore(json.loads(json.dumps(part.state())))
    assert [rest.next() for _ in range(45 - stop)] == read[stop:]


def test_an_empty_source_is_refused_when_shuffled() -> None:
    with pytest.raises(ValueError, match="corpus is empty"):
        shuffled(0, 5).next()
