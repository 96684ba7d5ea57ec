"""What the tests of training, recipes and the command line share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bitdistill.corpus import Steps
from bitdistill.data import ALONE, Batch, Batches, PackedBatches, Shard, TaskBatches
from bitdistill.documents import Source
from bitdistill.encoding import Encoded
from bitdistill.quantize import BitLinear
from bitdistill.readers import Texts
from bitdistill.schema import Distillation
from bitdistill.sequences import Encoder, Packer, State
from bitdistill.training import Fit

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()
DOCUMENTS = [
    [f"the film {i} is {' '.join(WORDS[: i % 9])}" for i in range(40)],
    ["a plot", "we liked it", ""],
]
TEXTS = [
    f"the film {i} is not {w} but very {v}"
    for i, w in enumerate("good bad dull".split())
    for v in ("bright", "good")
]


def settings(**values: Any) -> Distillation:
    """A distillation with every term, annealing and weight decay that ends halfway."""
    return Distillation.model_validate(
        {
            "steps": 8,
            "batch_size": 2,
            "learning_rate": 3e-3,
            "warmup": 0.25,
            "weight_decay": 0.1,
            "decay_until": 0.5,
            "anneal": 0.75,
            "logits": {"weight": 1.0, "temperature": 2.0},
            "relations": {"target_ratio": 0.5, "split_heads": 4},
        }
        | values
    )


def task_batches(size: int = 2, accumulate: int = 1) -> TaskBatches:
    generator = torch.Generator().manual_seed(0)
    rows = [
        Encoded(torch.randint(3, 200, (6 + i % 5,), generator=generator).tolist(), 1 + i % 3)
        for i in range(16)
    ]
    return TaskBatches(rows, 0, size, accumulate)


def packed_batches(
    documents: Sequence[list[str]],
    tokenizer: Any,
    length: int,
    batch_size: int,
    accumulate: int = 1,
    *,
    shard: Shard = ALONE,
    document_mask: bool = False,
) -> PackedBatches:
    """Packed batches of documents in memory, each list a source."""
    encoder = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    size = batch_size * accumulate

    def open_at(state: State | None) -> Packer:
        sources = [Source("list", Texts(lambda t=texts: t)) for texts in documents]
        packer = Packer(sources, encoder, shard.part(size), shard.world * size, length)
        if state is not None:
            packer.restore(state)
        return packer

    return PackedBatches(Steps(open_at), batch_size, accumulate, document_mask)


def advance(fit: Fit, steps: int) -> list[dict[str, float]]:
    """Steps as `run` takes them, with each one's terms."""
    terms = []
    for _ in range(steps):
        fit.optimize(fit.batches.window(fit.step))
        fit.step += 1
        terms.append(fit.read_terms(1))
    return terms


def weights(fit: Fit) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in fit.model.named_parameters()}


def anneal_of(fit: Fit) -> set[float]:
    return {float(m.anneal) for m in fit.model.modules() if isinstance(m, BitLinear)}


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def stages_of(out: Path) -> set[str]:
    return {p.parent.name for p in out.glob("*/bitdistill.json")}


class Done(NamedTuple):
    code: int
    out: str
    err: str


def copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rows_of(batches: Batches, steps: range) -> list[list[list[int]]]:
    """The sequences of each step, micro-batches one after the other."""
    return [
        [row for batch in batches.window(step) for row in batch["input_ids"].tolist()]
        for step in steps
    ]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, two, strict=True)
    )
