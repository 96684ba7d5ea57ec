"""A classifier: a head of a task's label tokens alone, and an embedding that stays on disk.

Of the whole vocabulary a label task asks for two or three logits, and of the embedding for the rows
of its prompt. So the table is a file of its own that the runtime reads rows from
(backends/embedding_file.py), the graph is fed those rows, and the head is a matrix (labels, hidden)
of the values that the table would have had.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.embedding_file import DTYPES, NAME
from bitdistill.backends.tokenizer import Tokenizer
from bitdistill.checkpoint import StudentFiles
from bitdistill.decoder import DecoderSpec
from bitdistill.exporters.onnx_tables import STORAGE, as_float, compare
from bitdistill.exporters.onnx_tensors import TensorFile
from bitdistill.tables import Rows
from bitdistill.tasks import Task, get_task

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def find_task(student: StudentFiles, name: str) -> Task:
    """The student's own task where the name is its, else a built-in one."""
    content = student.manifest.get("task")
    if content is not None and content["name"] == name:
        return Task.from_json(content)
    return get_task(name)


def label_tokens(student: StudentFiles, task: Task) -> list[int]:
    """The token of every answer of a label task, in the order of its labels.

    Raises ValueError for a task without labels, and for answers that are not one token each, all
    different.
    """
    tokenizer = Tokenizer(student.path)
    answers = [tokenizer.encode(label, special=False) for label in task.labels]
    tokens = [answer[0] for answer in answers if len(answer) == 1]
    if not tokens or len(set(tokens)) < len(answers):
        raise ValueError(
            f"task {task.name!r} has the answers {list(task.labels)}, in tokens {answers}: a head "
            "of label tokens needs answers of one token each, all different; export without --task"
        )
    return tokens


def write_tables(
    read: Callable[[str], Rows],
    spec: DecoderSpec,
    labels: Sequence[int],
    bits: int,
    data: TensorFile,
    out: Path,
) -> NDArray[np.float32]:
    """Write the embedding's file; returns the rounded rows of the label tokens (labels, hidden)."""
    table = as_float(EMBEDDING, read(EMBEDDING), bits)
    table = table.astype(DTYPES[STORAGE[bits]], copy=False)
    with (out / NAME).open("wb") as stream:
        stream.write(np.ascontiguousarray(table).data)
    data.parts["embedding"] += table.nbytes
    head = table if spec.tied else as_float(HEAD, read(HEAD), bits)
    return head[list(labels)].astype(np.float32)


def errors(student: StudentFiles, out: Path) -> dict[str, dict[str, float]]:
    """What rounding costs the embedding, measured on the written file."""
    table = student.rows(EMBEDDING)
    size = (out / NAME).stat().st_size // math.prod(table.shape)
    dtype = next(dtype for dtype in DTYPES.values() if dtype.itemsize == size)
    stored: NDArray[Any] = np.memmap(out / NAME, dtype, "r", shape=table.shape)
    return {"embedding": compare(stored, table)}
