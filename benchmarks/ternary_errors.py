"""What one scale a matrix costs: layer output errors of ternary roundings, and their bits.

    python benchmarks/ternary_errors.py MODEL_DIR TEXT.jsonl --column sentence > errors.jsonl

For linears of a model, on the inputs that they have in full precision, |W x - Q(W) x|^2 / |W x|^2
of rounding to nearest with absmean and with the best scale, of GPTQ and AWQ (which keep one scale),
and of one scale for every 32 to 256 weights of a row. Artifacts have one scale a matrix; the last
rows say what another format would gain before training, and at how many bits. Prints one JSON line
for each rounding and kind of linear, and `all`: the mean over kinds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from bitdistill.awq import search
from bitdistill.calibration import LayerWalk
from bitdistill.gptq import FACTORS, gptq, output_error
from bitdistill.initialise import GROUPS, Hessian
from bitdistill.quantize import WEIGHT_EPS, bit_linears, ternarize
from bitdistill.schema import Model
from bitdistill.student import make_student
from bitdistill.teacher import load_model

BLOCKS = (32, 64, 128, 256)
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


def roundings(weight: Tensor, hessian: Tensor) -> Iterator[tuple[str, float, float]]:
    """(name, bits a weight, relative error) of every rounding but AWQ."""
    total = output_error(weight, hessian)

    def least(rounding: Callable[[float], Tensor]) -> float:
        return min(output_error(weight - rounding(f), hessian) for f in FACTORS) / total

    one_scale = 2 + SCALE_BITS / weight.numel()
    absmean = output_error(weight - matrix_rounding(weight, 1.0), hessian) / total
    yield "absmean", one_scale, absmean
    yield "best scale", one_scale, least(lambda f: matrix_rounding(weight, f))
    yield "gptq", one_scale, gptq(weight, hessian).error / total
    for size in BLOCKS:
        bits = 2 + SCALE_BITS / size
        plain = output_error(weight - block_rounding(weight, size, 1.0), hessian) / total
        yield f"absmean, blocks of {size}", bits, plain
        best = least(lambda f, size=size: block_rounding(weight, size, f))  # type: ignore[misc]
        yield f"best scale, blocks of {size}", bits, best


def measure(walk: LayerWalk, every: int) -> dict[str, dict[str, tuple[float, list[float]]]]:
    """Rounding -> kind of linear -> (bits, errors of the layers looked at)."""
    found: dict[str, dict[str, tuple[float, list[float]]]] = {}
    for index in walk:
        if index % every:
            continue
        for group in GROUPS:
            hessian, rows = Hessian(), []
            walk.visit(group[0], lambda x, h=hessian, r=rows: (h.add(x), r.append(x)))  # type: ignore[misc]
            linears = [walk.linear(name) for name in group]
            _, awq, _ = search(torch.cat(rows), linears)
            for name, linear in zip(group, linears, strict=True):
                assert hessian.sum is not None
                kind = name.rsplit(".", 1)[-1]
                lines = [*roundings(linear.weight.detach(), hessian.sum)]
                lines.append(("awq, activations in int8", lines[0][1], awq))
                for label, bits, error in lines:
                    entry = found.setdefault(label, {}).setdefault(kind, (bits, []))
                    entry[1].append(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path, help="JSON lines")
    parser.add_argument("--column", default="text")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--every", type=int, default=5, help="look at every n-th layer")
    args = parser.parse_args()
    model, tokenizer = load_model(Model(source=args.model))
    with args.text.open(encoding="utf-8") as stream:
        texts = [json.loads(line)[args.column] for line, _ in zip(stream, range(args.examples))]  # noqa: B905
    rows = [tokenizer(text).input_ids[: args.max_length] for text in texts]
    student = make_student(model, "none")
    for linear in bit_linears(student):
        linear.anneal.fill_(0.0)
    batches = [
        {"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row))}
        for row in rows
    ]
    tokens = sum(map(len, rows))
    head = {"model": Path(args.model).name, "tokens": tokens, "every": args.every}
    with torch.no_grad():
        found = measure(LayerWalk(student, batches), args.every)
    for label, kinds in found.items():
        means = {kind: sum(errors) / len(errors) for kind, (_, errors) in kinds.items()}
        bits = max(bits for bits, _ in kinds.values())
        means["all"] = sum(means.values()) / len(means)
        for kind, error in means.items():
            line = {"rounding": label, "bits": round(bits, 4), "kind": kind}
            print(json.dumps(head | line | {"relative_error": round(error, 4)}), flush=True)


if __name__ == "__main__":
    main()
