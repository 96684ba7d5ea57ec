"""Rows of local files and of hub data sets; whatever goes wrong becomes one sentence.

The libraries underneath raise errors of their own, of pyarrow, of pandas and of HTTP clients; a
user needs to know which file or data set it was, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
LOCAL_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
    # a review that says "null" or "NA" is text, not a missing value
    options = {"keep_default_na": False} if form == "csv" else {}
    return _file_rows(file, form, streaming, options)


def _file_rows(file: Path, form: str, streaming: bool, options: dict[str, Any]) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        yield from load_dataset(
            form, data_files=str(file), split="train", streaming=streaming, **options
        )
    except (ValueError, TypeError, DatasetsError) as error:
        if "corresponds to no data" in str(error):
            return
        raise ValueError(
            f"{file} cannot be read as {form} ({_reason(error)}); correct the file"
        ) from error


def hub_rows(
    name: str, configuration: str | None, split: str, *, streaming: bool = False
) -> Iterator[Row]:
    """Rows of a data set on the hub; ValueError where it, its split or the network is missing."""
    from datasets import load_dataset

    try:
        yield from load_dataset(name, configuration, split=split, streaming=streaming)
    except Exception as error:  # from any of several HTTP and data packages
        raise ValueError(
            f"data set {name} ({split}) cannot be had ({_reason(error)}); check the name and the "
            "network, or give a local file"
        ) from error


def _reason(error: BaseException) -> str:
    """The first line of what happened first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
