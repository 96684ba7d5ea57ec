"""Raw rows of corpus sources in a fixed order, from any position that was saved.

Local parquet and JSON lines files are read here, because they can be entered in the middle: a
parquet file at a row group, JSON lines at a byte. Compressed JSON lines have to be decompressed up
to the position, but nothing before it is parsed. CSV files are parsed from their beginning. Hub
data sets go through `datasets`, whose streams have a state of their own.

Neither torch nor transformers is imported: worker processes start with this (corpus_worker.py).
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from bitdistill.sources import (
    COMPRESSED,
    Stream,
)

PARQUET_BATCH = 256  # rows decoded at once


class Reader(Protocol):
    """Raw rows of a source."""

    @property
    def position(self) -> Any:
        """The position after the row last given, as JSON."""

    def rows(self, position: Any) -> Iterator[Any]:
        """Raw rows from a saved position; None is the beginning."""

    def value(self, row: Any) -> Any:
        """What the text column of the row last given holds."""


def column_of(source: str, row: dict[str, Any], column: str) -> Any:
    """The value of a column; ValueError where there is none."""
    if column not in row:
        raise ValueError(
            f"{source} has no column {column!r}, only {', '.join(row)}; set corpus.column"
        )
    return row[column]


class Texts:
    """Texts that are in memory or made anew each time; a position is their number."""

    def __init__(self, make: Callable[[], Iterable[str]]) -> None:
        self.make, self.position = make, 0

    def rows(self, position: int | None) -> Iterator[str]:
        self.position = position or 0
        for text in islice(self.make(), self.position, None):
            self.position += 1
            yield text

    def value(self, row: str) -> str:
        return row


class JsonLines:
    """A JSON lines file, plain or compressed; a position is a byte of the plain text."""

    def __init__(self, file: Path, column: str) -> None:
        self.file, self.column, self.position = file, column, 0

    def rows(self, position: int | None) -> Iterator[bytes]:
        import pyarrow

        self.position = position or 0
        try:
            with pyarrow.input_stream(self.file, compression="detect") as raw:
                stream = io.BufferedReader(raw, 1 << 20)
                self._enter(raw, stream)
                for line in stream:
                    self.position += len(line)
                    if not line.isspace():
                        yield line
        except OSError as error:
            raise _unreadable(self.file, "json", error) from error

    def _enter(self, raw: Any, stream: io.BufferedReader) -> None:
        """Go to the position: at once in a plain file, by decompressing in another."""
        if self.file.suffix.lower() not in COMPRESSED:
            raw.seek(self.position)
            return
        left = self.position
        while left > 0 and (read := len(stream.read(min(left, 1 << 20)))):
            left -= read

    def value(self, row: bytes) -> Any:
        try:
            content = json.loads(row)
        except ValueError as error:
            raise _unreadable(self.file, "json", error) from error
        if not isinstance(content, dict):
            raise ValueError(f"{self.file} holds a line that is no object; correct the file")
        return column_of(str(self.file), content, self.column)


class Parquet:
    """A parquet file; a position is a row, and only the groups from its own on are read."""

    def __init__(self, file: Path, column: str) -> None:
        self.file, self.column, self.position = file, column, 0

    def rows(self, position: int | None) -> Iterator[Any]:
        import pyarrow
        from pyarrow import parquet

        self.position = position or 0
        try:
            with parquet.ParquetFile(self.file, memory_map=True, pre_buffer=False) as file:
                column_of(str(self.file), dict.fromkeys(file.schema_arrow.names), self.column)
                group, skipped = self._group(file.metadata)
                batches = file.iter_batches(
                    PARQUET_BATCH,
                    range(group, file.metadata.num_row_groups),
                    [self.column],
                    use_threads=False,
                )
                for row in islice(_cells(batches), skipped, None):
                    self.position += 1
                    yield row
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(self.file, "parquet", error) from error

    def _group(self, metadata: Any) -> tuple[int, int]:
        """The row group that holds the position, and the rows before it in that group."""
        left = self.position
        for group in range(metadata.num_row_groups):
            size = metadata.row_group(group).num_rows
            if left < size:
                return group, left
            left -= size
        return metadata.num_row_groups, 0

    def value(self, row: Any) -> Any:
        return row.as_py()


def _cells(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from batch.column(0)


class Streamed:
    """A stream of the `datasets` package, which keeps its own position."""

    def __init__(self, name: str, column: str, open_stream: Callable[[], Stream]) -> None:
        self.name, self.column, self.open_stream = name, column, open_stream
        self._stream: Stream | None = None

    @property
    def position(self) -> Any:
        return None if self._stream is None else self._stream.state()

    def rows(self, position: Any) -> Iterator[dict[str, Any]]:
        self._stream = self.open_stream()
        return self._stream.rows(position)

    def value(self, row: dict[str, Any]) -> Any:
        return column_of(self.name, row, self.column)


class Files:
    """Several files, one after the other; a position is a file's number and its own position."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers, self._at = readers, 0

    @property
    def position(self) -> Any:
        return [self._at, self.readers[self._at].position]

    def rows(self, position: Any) -> Iterator[Any]:
        start, inside = position or (0, None)
        for index in range(start, len(self.readers)):
            self._at = index
            yield from self.readers[index].rows(inside if index == start else None)

    def value(self, row: Any) -> Any:
        return self.readers[self._at].value(row)


def _unreadable(file: Path, form: str, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be read as {form} ({error}); correct the file")
