"""Rows of local files and of hub data sets; whatever goes wrong becomes one sentence.

The libraries underneath raise errors of their own, of pyarrow, of pandas and of HTTP clients; a
user needs to know which file or data set it was, and what to do.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
OWN_SOURCES = ("task", "tiny")  # of a corpus, whatever files have these names
COMPRESSED = (".gz", ".zst")  # of JSON lines, in a corpus

SAMPLES = 256  # blocks of a large file that are hashed
LONGEST_CELL = (1 << 31) - 1  # characters; Python's own limit is below an article's


def form_of(file: Path) -> str:
    """json, csv or parquet, by the file's name; ValueError for another."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        form = LOCAL_FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        form = form if form == "json" else None
    else:
        form = LOCAL_FORMATS.get(suffixes[-1]) if suffixes else None
    if form is None:
        raise ValueError(
            f"{file}: unknown format; use {', '.join(LOCAL_FORMATS)}, or compressed JSON lines "
            f"({', '.join('.jsonl' + ending for ending in COMPRESSED)}) in a corpus"
        )
    return form


def is_local(source: str) -> bool:
    """Whether a corpus source is a file, a folder or a pattern: no hub data set, none of ours."""
    path = Path(source)
    endings = (*LOCAL_FORMATS, *COMPRESSED)
    return source not in OWN_SOURCES and (
        path.suffix.lower() in endings or "*" in source or path.exists()
    )


def local_files(source: str) -> list[Path]:
    """The files of a local source, sorted: itself, a folder's, or those that match a pattern.

    Raises FileNotFoundError where there is none.
    """
    path = Path(source)
    if "*" in source:
        root = Path(path.anchor)
        files = sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file())
    elif path.is_dir():
        endings = (*LOCAL_FORMATS, *COMPRESSED)
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in endings)
    else:
        files = [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"data file {source} does not exist; check the path")
    return files


def content_hash(file: Path, most: int | None = None) -> str:
    """A hash of a file's content, in hexadecimal; times are left out, as a run may be copied.

    Of a file of more than `most` bytes it covers the size and as many bytes in evenly spaced
    blocks, the first and the last included: an edit in between that keeps the size goes unnoticed.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if most is None or size <= most:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest, block = hashlib.sha256(str(size).encode()), most // SAMPLES
        for index in range(SAMPLES):
            stream.seek((size - block) * index // (SAMPLES - 1))
            digest.update(stream.read(block))
    return digest.hexdigest()


class Stream:
    """A data set of the `datasets` package, opened when it is read; its errors are translated."""

    def __init__(self, guard: AbstractContextManager[None], *source: Any, **options: Any) -> None:
        self.guard, self.source, self.options = guard, source, options
        self._dataset: Any = None

    def rows(self, position: Any = None) -> Iterator[Row]:
        """The rows, from a saved position where the data set is streamed. To be called once."""
        from datasets import load_dataset

        with self.guard:
            self._dataset = load_dataset(*self.source, **self.options)
            if position is not None:
                self._dataset.load_state_dict(position)
            yield from self._dataset

    def state(self) -> Any:
        """The position after the row last given, as JSON; None before the first."""
        return None if self._dataset is None else self._dataset.state_dict()


def file_stream(file: Path, form: str, *, streaming: bool = True) -> Stream:
    """A local file through `datasets`."""
    guard = _reading_file(file, form)
    return Stream(guard, form, data_files=str(file), split="train", streaming=streaming)


def hub_stream(
    name: str, configuration: str | None, split: str, *, streaming: bool = True
) -> Stream:
    """A data set on the hub."""
    guard = _reading_hub(name, split)
    return Stream(guard, name, configuration, split=split, streaming=streaming)


@contextmanager
def _reading_file(file: Path, form: str) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (ValueError, TypeError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            return
        raise ValueError(
            f"{file} cannot be read as {form} ({_reason(error)}); correct the file"
        ) from error


@contextmanager
def _reading_hub(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # from any of several HTTP and data packages
        raise ValueError(
            f"data set {name} ({split}) cannot be had ({_reason(error)}); check the name and the "
            "network, or give a local file"
        ) from error


def file_rows(source: str | Path, *, streaming: bool = False) -> Iterator[Row]:
    """Rows of a JSON lines, JSON, CSV or parquet file; none for a file that holds a header only.

    Raises FileNotFoundError, or ValueError for a format or content that cannot be read.
    """
    file = Path(source)
    if not file.is_file():
        raise FileNotFoundError(f"data file {file} does not exist; check the path")
    form = LOCAL_FORMATS.get(file.suffix.lower())
    if form is None:
        raise ValueError(f"{file}: unknown format; use {', '.join(LOCAL_FORMATS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty; give a file with at least one example")
    if file.suffix.lower() == ".jsonl":
        return _json_lines(file)
    if form == "csv":
        return _csv_rows(file)
    return file_stream(file, form, streaming=streaming).rows()


def _json_lines(file: Path) -> Iterator[Row]:
    """Rows one by one; importing the data package alone would take longer than most files."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise ValueError(
                    f"{file} cannot be read as json (line {number}: {error}); correct the file"
                ) from error
            yield row


def _csv_rows(file: Path) -> Iterator[Row]:
    """Rows one by one, each cell the text that stands there: "007", "null" and "1.50" are words.

    A line with more or fewer cells than the header is an error, not a shifted or cut row.
    """
    csv.field_size_limit(LONGEST_CELL)
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = csv.reader(stream, strict=True)
            header = next(filter(None, lines), [])
            twice = next((name for name in header if name and header.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"two columns are called {twice!r}")
            for cells in filter(None, lines):
                if len(cells) != len(header):
                    raise ValueError(
                        f"line {lines.line_num}: {len(cells)} cells, the header has {len(header)}; "
                        "a text with commas stands in quotes"
                    )
                yield dict(zip(header, cells, strict=True))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{file} cannot be read as csv ({error}); correct the file") from error


def hub_rows(
    name: str, configuration: str | None, split: str, *, streaming: bool = False
) -> Iterator[Row]:
    """Rows of a data set on the hub; ValueError where it, its split or the network is missing."""
    return hub_stream(name, configuration, split, streaming=streaming).rows()


def _reason(error: BaseException) -> str:
    """The first line of what happened first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
