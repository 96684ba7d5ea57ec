"""What was measured, kept as it is measured, so that nothing is measured twice or mixed up.

A store is a folder. `KEY.jsonl` holds the predictions of one directory on one split: a line that
says what they are of, a line per example, and a last line once they are complete. KEY is a hash of
everything they depend on: the directory's files, the task, the examples, the settings, the
versions. `KEY.examples.json` holds examples, `KEY.speed.json` timings. A run that was killed leaves
whole lines, and perhaps half of one, which is cut off when the run goes on.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bitdistill import manifest

Record = dict[str, Any]


class Store:
    """The files of a folder, by content: an `identity` is JSON that says what a file is of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if any(p.exists() and not p.is_dir() for p in (folder, *folder.parents)):
            raise FileExistsError(f"{folder} cannot be a folder there; choose another --store")

    def predictions(self, identity: dict[str, Any]) -> Path:
        """Where predictions of `identity` belong."""
        return self.folder / f"{manifest.fingerprint(identity)}.jsonl"

    def keep_examples(self, fingerprint: str, examples: Sequence[Record]) -> None:
        """Keep what was asked, for reports that show it."""
        path = self.folder / f"{fingerprint}.examples.json"
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            manifest.write_json(path, list(examples))

    def once(self, identity: dict[str, Any], measure: Callable[[], Any]) -> Any:
        """What `measure()` gave the first time it was asked for under this identity."""
        path = self.folder / f"{manifest.fingerprint(identity)}.speed.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))["measured"]
        measured = measure()
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest.write_json(path, {"of": identity, "measured": measured})
        return measured


class PredictionLog:
    """One file of predictions, open for adding to; a second process waits until it is free.

    `known` holds the record of every example that is done, by its place; `outcome` the last line of
    a complete file. A file of something else under this name is refused with FormatError.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path, self.identity = path, identity
        self.known: dict[int, Record] = {}
        self.outcome: Record | None = None

    def __enter__(self) -> PredictionLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._stream: IO[bytes] = self.path.open("a+b")
        fcntl.flock(self._stream, fcntl.LOCK_EX)
        lines = self._whole_lines()
        if not lines:
            self._write([{"of": self.identity}])
            return self
        if lines[0] != {"of": self.identity}:
            raise manifest.FormatError(f"{self.path} holds something else; remove it")
        self.known, self.outcome = _sort(lines[1:])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stream.close()

    def _whole_lines(self) -> list[Record]:
        """The lines that were written to their end; what follows them is cut off."""
        self._stream.seek(0)
        content = self._stream.read()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            self._stream.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def _write(self, lines: Sequence[Record]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._stream.write(text.encode())
        self._stream.flush()

    def append(self, records: Sequence[Record]) -> None:
        """Keep records of examples, each with its place under "i"."""
        self._write(records)
        self.known |= {record["i"]: record for record in records}

    def finish(self, outcome: Record) -> None:
        """Seal the file."""
        self._write([{"outcome": outcome}])
        self.outcome = outcome


def read_complete(path: Path, count: int) -> Record | None:
    """The outcome of a complete file of `count` examples, with its `records`; else None."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    known, outcome = _sort([json.loads(line) for line in lines[1:]])
    if outcome is None or set(known) != set(range(count)):
        return None
    return outcome | {"records": [known[i] for i in range(count)]}


def _sort(lines: Sequence[Record]) -> tuple[dict[int, Record], Record | None]:
    known = {line["i"]: line for line in lines if "i" in line}
    outcomes = [line["outcome"] for line in lines if "outcome" in line]
    return known, outcomes[-1] if outcomes else None


def read_disagreements(
    folder: Path, examples: str, files: Sequence[str]
) -> list[tuple[Record, list[Record]]] | None:
    """(example, record of each file) where the predictions in `files` are not all the same.

    None where the store in `folder` does not hold the examples and all of the files.
    """
    asked = folder / f"{examples}.examples.json"
    if not asked.is_file():
        return None
    questions: list[Record] = json.loads(asked.read_text(encoding="utf-8"))
    outcomes = [read_complete(folder / file, len(questions)) for file in files]
    columns = [outcome["records"] for outcome in outcomes if outcome is not None]
    if len(columns) < len(files):
        return None
    rows = zip(questions, map(list, zip(*columns, strict=True)), strict=True)
    return [
        (question, records)
        for question, records in rows
        if len({record.get("label", record.get("text")) for record in records}) > 1
    ]
