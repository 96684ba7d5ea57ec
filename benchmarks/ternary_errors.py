"""What one scale a matrix costs: layer output errors of ternary roundings, and their bits.

    python benchmarks/ternary_errors.py MODEL_DIR TEXT.jsonl --column sentence > errors.jsonl

For linears of a model, on the inputs that they have in full precision, |W x - Q(W) x|^2 / |W x|^2
of rounding to nearest with absmean and with the best scale, of GPTQ and AWQ (which keep one scale),
and of one scale for every 32 to 128 weights of a row. Scales and roundings are chosen on the first
texts, errors are those of the others. Artifacts have one scale a matrix; the last rows say what
another format would gain before training, and at how many bits. Prints one JSON line for each
rounding and kind of linear, and `all`: the mean over kinds.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bitdistill.awq import product_error, search
from bitdistill.calibration import LayerWalk
from bitdistill.gptq import FACTORS, gptq, output_error
from bitdistill.initialise import GROUPS, MAX_TOKENS
from bitdistill.quantize import WEIGHT_EPS, bit_linears, ternarize
from bitdistill.schema_data import Model
from bitdistill.student import make_student
from bitdistill.teacher import load_model

BLOCKS = (32, 64, 128)
SCALE_BITS = 16


def block_rounding(weight_NK: Tensor, size: int, factor: float) -> Tensor:
    """D t with a scale for every `size` weights of a row: `factor` times the mean |w| of them."""
    parts = []
    for part in weight_NK.split(size, 1):
        scale = (factor * part.abs().mean(1, keepdim=True)).bfloat16().float()
        parts.append(scale * (part / (scale + WEIGHT_EPS)).round().clamp(-1, 1))
    return torch.cat(parts, 1)


def matrix_rounding(weight_NK: Tensor, factor: float) -> Tensor:
    """D t with one scale, `factor` times absmean."""
    scale = (ternarize(weight_NK)[1] * factor).bfloat16().float()
    return scale * (weight_NK / (scale + WEIGHT_EPS)).round().clamp(-1, 1)


def roundings(weight: Tensor, hessian: Tensor) -> Iterator[tuple[str, float, Tensor]]:
    """(name, bits a weight, Q(W)) of every rounding but AWQ, chosen by the inputs of `hessian`."""

    def best(rounding: Callable[[float], Tensor]) -> Tensor:
        tried = [rounding(factor) for factor in FACTORS]
        return min(tried, key=lambda q: output_error(weight - q, hessian))

    one_scale = 2 + SCALE_BITS / weight.numel()
    yield "absmean", one_scale, matrix_rounding(weight, 1.0)
    yield "best scale", one_scale, best(lambda f: matrix_rounding(weight, f))
    rounded = gptq(weight, hessian)
    yield "gptq", one_scale, rounded.scale * rounded.trits
    for size in BLOCKS:
        bits = 2 + SCALE_BITS / size
        yield f"absmean, blocks of {size}", bits, block_rounding(weight, size, 1.0)
        chosen = best(lambda f, size=size: block_rounding(weight, size, f))  # type: ignore[misc]
        yield f"best scale, blocks of {size}", bits, chosen


def inputs(walk: LayerWalk, name: str) -> Tensor:
    """All that a linear multiplies (M, K)."""
    rows: list[Tensor] = []
    walk.visit(name, rows.append)
    return torch.cat(rows)


def measure(
    chosen_on: LayerWalk, judged_on: LayerWalk, layers: list[int]
) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Rounding -> kind of linear -> (bits, errors of the layers looked at)."""
    found: dict[str, dict[str, tuple[float, list[float]]]] = {}

    def keep(label: str, kind: str, bits: float, error: float) -> None:
        found.setdefault(label, {}).setdefault(kind, (bits, []))[1].append(error)

    for index, _ in zip(chosen_on, judged_on, strict=True):
        for group in GROUPS if index in layers else ():
            x, other = (inputs(walk, group[0]) for walk in (chosen_on, judged_on))
            hessian, judge = x.T @ x, other.T @ other
            linears = [chosen_on.linear(name) for name in group]
            scales, *_ = search(x[:MAX_TOKENS], linears)
            for name, linear in zip(group, linears, strict=True):
                kind, weight = name.rsplit(".", 1)[-1], linear.weight.detach()
                total = output_error(weight, judge)
                for label, bits, quantised in roundings(weight, hessian):
                    keep(label, kind, bits, output_error(weight - quantised, judge) / total)
                for label, s in (("absmean, int8", None), ("awq, int8", scales)):
                    error = product_error(other, linear, other @ weight.T, s) / total
                    keep(label, kind, 2 + SCALE_BITS / weight.numel(), error)
        if index == max(layers):
            break
    return found


def batches_of(rows: list[list[int]], size: int = 32) -> list[dict[str, Tensor]]:
    """Rows of similar length together, padded on the right, where no real token looks."""
    ordered = [torch.tensor(row) for row in sorted(rows, key=len)]
    batches = []
    for start in range(0, len(rows), size):
        part = ordered[start : start + size]
        mask = [torch.ones_like(row) for row in part]
        named = {"input_ids": part, "attention_mask": mask}
        batches.append({k: pad_sequence(v, batch_first=True) for k, v in named.items()})
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--name", help="the model's name in the results")
    parser.add_argument("text", type=Path, help="JSON lines")
    parser.add_argument("--column", default="text")
    parser.add_argument("--examples", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 14, 24])
    args = parser.parse_args()
    model, tokenizer = load_model(Model(source=args.model))
    with args.text.open(encoding="utf-8") as stream:
        lines = itertools.islice(stream, args.examples + args.held_out)
        texts = [json.loads(line)[args.column] for line in lines]
    rows = [tokenizer(text).input_ids[: args.max_length] for text in texts]
    student = make_student(model, "none")
    for linear in bit_linears(student):
        linear.anneal.fill_(0.0)
    parts = rows[: args.examples], rows[args.examples :]
    tokens = [sum(map(len, part)) for part in parts]
    head = {"model": args.name, "tokens": tokens[0], "held_out": tokens[1], "layers": args.layers}
    with torch.no_grad():
        walks = [LayerWalk(student, batches_of(part)) for part in parts]
        found = measure(*walks, args.layers)
    for label, kinds in found.items():
        means = {kind: sum(errors) / len(errors) for kind, (_, errors) in kinds.items()}
        bits = max(bits for bits, _ in kinds.values())
        means["all"] = sum(means.values()) / len(means)
        for kind, error in means.items():
            line = {"rounding": label, "bits": round(bits, 4), "kind": kind}
            print(json.dumps(head | line | {"relative_error": round(error, 4)}), flush=True)


if __name__ == "__main__":
    main()
