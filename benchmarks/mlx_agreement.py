"""How far an MLX artifact is from its student: logits without int8 activations, labels by type.

    python benchmarks/random_student.py --shape smollm2-135m --out runs/random/smollm2-135m
    python benchmarks/mlx_agreement.py logits runs/random/smollm2-135m
    python benchmarks/mlx_agreement.py labels runs/tiny/student

`logits` exports with activations as they are, and compares every logit of random tokens with fp32
PyTorch's, as a part of the spread (largest less smallest) of PyTorch's; `--floor` compares PyTorch
in fp32 with fp64 as well. Embedding, norms and biases of the student are rounded as the artifact
stores them. `labels` exports as trained and predicts the student's own validation examples with
activations of each type, products by our kernels: their accuracy, and how many predictions are
those of fp32. Both say what MLX does on this machine, a CPU, not on Metal. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from bitdistill import backends, exporters, manifest
from bitdistill.evals.predict import predict
from bitdistill.tasks import Task, load_examples

SEQUENCES, LENGTH = 4, 32
DTYPES = ("float32", "float16", "bfloat16")


def logits(student: Path, folder: Path, floor: bool = False) -> Iterator[dict[str, Any]]:
    """Errors of logits, as parts of their spread, by who computes them."""
    artifact = exporters.export(student, "mlx", folder / "mlx", activation_bits=None)
    runtime: Any = backends.load(artifact, products="mlx")
    tokens = np.random.default_rng(0).integers(0, runtime.vocabulary, (SEQUENCES, LENGTH)).tolist()
    storage = manifest.read_manifest(artifact)["storage"]
    how: dict[str, Any] = {"storage": storage, "activation_bits": None}
    reference = backends.load(student, dtype="float32", **how).logits(tokens)
    makers = {
        "mlx": lambda: runtime,
        "cpu": lambda: backends.load(artifact, products="cpu"),
    }
    if floor:
        makers["torch-fp64"] = lambda: backends.load(student, dtype="float64", **how)
    for name, make in makers.items():
        found = make().logits(tokens)
        yield {"benchmark": "mlx-logits", "products": name} | compare(found, reference)


def compare(found: list[Any], reference: list[Any]) -> dict[str, Any]:
    """Largest error in spreads of the reference, and top tokens that are the same in %."""
    ours, theirs = (np.concatenate(part).astype(np.float64) for part in (found, reference))
    same = ours.argmax(-1) == theirs.argmax(-1)
    return {
        "error": float(f"{np.abs(ours - theirs).max() / np.ptp(theirs):.2g}"),
        "top_tokens": round(100 * float(same.mean()), 2),
        "positions": len(same),
    }


def labels(student: Path, folder: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Accuracy on the student's validation examples, and agreement with fp32, by type."""
    artifact = exporters.export(student, "mlx", folder / "mlx")
    content = manifest.read_manifest(student)
    task = Task.from_json(content["task"])
    source = content.get("validation")
    examples = load_examples(task, source, limit=limit, columns=content.get("columns"))
    right = np.array([example.label for example in examples])
    expected = None
    for dtype in DTYPES:
        runtime = backends.load(artifact, dtype=dtype, products="cpu")
        records = predict(runtime, task, examples).records
        found = np.array([record["label"] for record in records])
        expected = found if expected is None else expected
        yield {
            "benchmark": "mlx-labels",
            "task": task.name,
            "dtype": dtype,
            "accuracy": round(100 * float((found == right).mean()), 2),
            "agreement": round(100 * float((found == expected).mean()), 2),
            "n": len(right),
        }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["logits", "labels"])
    parser.add_argument("student", type=Path)
    parser.add_argument("--floor", action="store_true", help="logits: PyTorch in fp64 too")
    parser.add_argument("--limit", type=int, help="labels: that many examples  [all]")
    options = parser.parse_args()
    name = "/".join(options.student.resolve().parts[-2:])
    common = {"student": name, "mlx": version("mlx")}
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "logits":
            records = logits(options.student, Path(folder), options.floor)
        else:
            records = labels(options.student, Path(folder), options.limit)
        for record in records:
            print(json.dumps(record | common), flush=True)


if __name__ == "__main__":
    main()
