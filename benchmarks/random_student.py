"""A student directory of a real model's shape with random weights, for benchmarks.

    python benchmarks/random_student.py --shape qwen3-4b --layers 4 --out runs/random-4b

Weights are bfloat16, written shard by shard, so that a large model needs the memory of one shard.
The student has a label task, TASK, so that it can be exported as a classifier.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from shapes import SHAPES
from torch import Tensor

from bitdistill import manifest
from bitdistill.decoder import config_class
from bitdistill.student import model_class
from bitdistill.tasks import Task
from bitdistill.tokenizing import train_tokenizer

SHARD_BYTES = 1 << 30
TASK = Task("letters", "label", "{text}", ("text",), "label", labels=("a", "b"))


def make(shape: str, out: Path, layers: int | None = None, seed: int = 0) -> Path:
    """Write the directory and return it; one that is there already is kept."""
    if (out / manifest.MANIFEST).is_file():
        return out
    values = dict(SHAPES[shape])
    family = values.pop("model_type")
    values["num_hidden_layers"] = layers or values["num_hidden_layers"]
    config = config_class(family)(**values)
    config.bitdistill = {
        "norm_style": "paper",
        "added_norm_eps": config.rms_norm_eps,
        "activation_bits": 8,
    }
    with manifest.new_directory(out) as partial:
        config.save_pretrained(partial)
        train_tokenizer(["random weights know no words"] * 4, vocabulary=300).save_pretrained(
            partial
        )
        for index, shard in enumerate(shards(family, config, seed)):
            save_file(shard, partial / f"model-{index:05}.safetensors", {"format": "pt"})
        (partial / "README.md").write_text(f"Random weights of the shape {shape}.\n", "utf-8")
        manifest.write_manifest(partial, "student", content(family))
    return out


def content(family: str) -> dict[str, Any]:
    """The manifest of a student that was never trained."""
    named = {"stage": "student", "method": "random", "base_model": "random", "family": family}
    kept = {"norm_style": "paper", "activation_bits": 8, "recipe": "random", "metrics": {}}
    return {**named, **kept, "licence": "apache-2.0", "parent": None, "task": TASK.to_json()}


def shards(family: str, config: Any, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random tensors under the names of a student's, about SHARD_BYTES at a time."""
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in model_class(family)(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        shard[name] = _random(name, shape, generator)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    return tensor.normal_(0.0, 1.0 / math.sqrt(shape[-1]), generator=generator)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-0.6b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print(make(arguments.shape, arguments.out, arguments.layers))


if __name__ == "__main__":
    main()
