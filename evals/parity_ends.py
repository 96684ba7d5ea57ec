"""Parity of a large model's two ends: what its embedding looks up, and the logits of its head.

Beside parity_layers.py, and on the same run of the artifact. Rows that are looked up have no order
of summation, so they must be those of the student to a float's precision. The head is given what
leaves the artifact's last layer, in fp32 and in fp64, some words at a time: a table of 150,000 rows
is the largest tensor of all. Both are also compared with the student's own tables, not rounded,
which is what storing them in fewer bits costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bitdistill import checkpoint
from bitdistill.backends.torch_storage import round_storage
from bitdistill.decoder import config_class, family_of
from bitdistill.student import cast, empty_student

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WORDS = 8192  # of the head at a time
AS_TRAINED: dict[str, str] = {}
Hidden = NDArray[np.float32]


def report(
    student: Path, tokens: list[int], hidden: list[Hidden], logits: Hidden, storage: dict[str, str]
) -> dict[str, Any]:
    """`failures`, figures of `embedding`, `head` and its floor, and the `storage_cost` of each.

    `hidden` are float32 (T, hidden) that enter the first layer and leave the last, `logits` (T, V).
    """
    from bitdistill.evals.parity import NEGLIGIBLE, difference, judge

    files = checkpoint.open_student(student)
    rows, trained = (looked_up(files, tokens, kind) for kind in (storage, AS_TRAINED))
    embedding = difference([hidden[0]], [rows])
    failures = []
    if not embedding["finite"] or embedding["largest"] > NEGLIGIBLE:
        error = embedding.get("largest", np.nan)
        failures.append(f"embedding: largest error {error:.2e}, allowed {NEGLIGIBLE:.2e}")
    floor, exact = (head(files, hidden[-1], storage, d) for d in (torch.float32, torch.float64))
    found, yardstick = difference([logits], [exact]), difference([floor], [exact])
    failures += judge("head", found, yardstick)
    unrounded = head(files, hidden[-1], AS_TRAINED, torch.float64)
    costs = {
        "embedding": difference([rows], [trained]),
        "head": difference([exact], [unrounded]),
    }
    return {
        "failures": failures,
        "embedding": embedding,
        "head": found,
        "head_floor": yardstick,
        "storage_cost": {"alone": costs},
    }


def looked_up(
    files: checkpoint.StudentFiles, tokens: list[int], storage: Mapping[str, str]
) -> NDArray[Any]:
    """What the embedding of these tokens gives the first layer, float64 (T, hidden)."""
    table = files.rows(EMBEDDING)
    model = _model(files, np.concatenate([table[t : t + 1] for t in tokens]), storage)
    cast(model, torch.float64)
    with torch.inference_mode():
        found: NDArray[Any] = model.model.embed_tokens(torch.arange(len(tokens))).numpy()
    return found


def head(
    files: checkpoint.StudentFiles, hidden: Hidden, storage: Mapping[str, str], dtype: torch.dtype
) -> NDArray[Any]:
    """Logits (T, V) of the last norm and the head, of float32 (T, hidden)."""
    table = files.rows(EMBEDDING if files.spec.tied else HEAD)
    given, parts = torch.from_numpy(hidden).to(dtype), []
    for start in range(0, len(table), WORDS):
        model = _model(files, table[start : start + WORDS], storage)
        cast(model, dtype)
        with torch.inference_mode():
            parts.append(model.lm_head(model.model.norm(given)).numpy())
    return np.concatenate(parts, axis=1)


def _model(files: checkpoint.StudentFiles, rows: Hidden, storage: Mapping[str, str]) -> Any:
    """A student without layers, of the words whose embedding and head are `rows`."""
    family = family_of(files.config["model_type"])
    config = config_class(family).from_pretrained(files.path)
    if getattr(config, "layer_types", None):
        config.layer_types = []
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 0, len(rows), None
    config.tie_word_embeddings = True
    model = empty_student(config).eval()
    model.lm_head.weight.data = torch.from_numpy(rows)
    model.model.norm.weight.data = files.tensor(NORM)
    round_storage(model, storage)
    return model
