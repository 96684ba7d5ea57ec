"""Does an artifact compute what its PyTorch student computes? The report made at export.

Trits and scales are compared exactly by the exporter. Whole models are another matter: an int8
activation that lies on a rounding boundary goes up under one order of summation and down under
another, and everything after it differs a little. fp32 PyTorch differs from fp64 PyTorch in the
same way. So the reference is the student in fp64, with the artifact's storage of embedding, norms
and biases and its activation bits, and the yardstick ("floor") is how far the student in fp32 is
from it.

The verdict. Per position, the error is the root mean square over the vocabulary of the difference
of logits, divided by the spread (standard deviation) of the reference's logits there.

1. The artifact's median error is at most TWICE the floor's 75th percentile, or NEGLIGIBLE. The
   quartile and not the median, because the share of positions with a flip varies by chance, and a
   flip raises the error of a position by orders of magnitude.
2. The artifact's share of positions with the reference's top token is at least the floor's, less
   three standard errors of the difference of two such shares.

Both hold for whole sequences at once and for tokens fed one by one through the cache. A wrong
rotation, norm or scale moves every position by a large part of the spread and fails both.

What storage itself costs is measured apart: `storage_cost` compares an artifact whose embedding is
quantised, whose cache of keys and values has fewer than 32 bits, or which rounds activations in
blocks, with the student as it was trained. `alone` in it compares PyTorch that rounds one of these
and nothing else with the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bitdistill import manifest
from bitdistill.decoder import LINEARS, DecoderSpec
from bitdistill.evals.directories import weights_fingerprint
from bitdistill.evals.parity_logits import (
    PROMPTS,
    Logits,
    by_length,
    decoded,
    last_logits,
    make_sequences,
)
from bitdistill.tasks import Task, load_examples

LARGEST = 1e9
TWICE = 2.0
NEGLIGIBLE = 1e-5
TINY = 1e-30
HALVES = ("float16", "bfloat16")
QUANTILES = {"median": 0.5, "quartile": 0.75, "percentile_95": 0.95}
Progress = Callable[[str, int, int], None]


def task_prompts(student_dir: str | Path) -> list[str]:
    """The first prompts of the student's own validation data, where that is at hand.

    Parity never needs the network: without them, random tokens alone are compared.
    """
    content = manifest.read_manifest(Path(student_dir))
    if not content.get("task"):
        return []
    task, data = Task.from_json(content["task"]), content.get("validation")
    if task.name != "tiny" if data is None else not Path(data).is_file():
        return []
    examples = load_examples(task, data, limit=PROMPTS, columns=content.get("columns"))
    return [example.prompt for example in examples]


def verdict(parity: dict[str, Any]) -> str:
    """A report in a few words."""
    if parity.get("skipped"):
        return f"not measured ({parity['skipped']})"
    words = "within the noise floor" if parity["passed"] else "NOT within the noise floor"
    cost = parity.get("storage_cost", {}).get("top_token_agreement")
    if cost is None:
        return words
    return f"{words}; with what it rounds further, {cost:.1%} of top tokens are the student's"


def report(
    student_dir: str | Path,
    artifact_dir: str | Path,
    prompts: Sequence[str] = (),
    *,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compare an artifact with its student: figures as plain JSON, and `passed`.

    Fed are random tokens drawn with `seed`, and the ends of the first PROMPTS of `prompts`.
    A model of more than 1e9 parameters is compared layer by layer (parity_layers.py); where that
    cannot be done, or the installed runtime computes something else than the artifact says,
    `passed` is None, with a reason under `skipped`. Raises FormatError where the artifact was made
    from other weights.
    """
    from bitdistill.backends import load

    student, artifact = Path(student_dir), Path(artifact_dir)
    content = manifest.read_manifest(artifact, "artifact")
    if content["student_fingerprint"] != weights_fingerprint(manifest.read_manifest(student)):
        raise manifest.FormatError(
            f"{artifact} was not exported from the weights in {student}; export it again"
        )
    count = parameters(DecoderSpec.from_json(content["decoder"]))
    say = progress or (lambda stage, done, total: None)
    if count > LARGEST:
        return _large(student, artifact, content, seed, threads, say)
    labels = content.get("label_tokens")  # a classifier is compared where it has logits
    alone = roundings(content["storage"])
    total = 3 + (len(alone) + 1 if alone else 0)
    say("parity", 0, total)
    runtime = load(artifact, threads=threads)
    if runtime.caveat:
        return {"passed": None, "skipped": runtime.caveat}
    sequences = make_sequences(runtime, prompts, seed)
    found = last_logits(runtime, sequences, labels)
    cached = decoded(runtime, sequences, labels)
    tables = runtime.tables()
    options = _as_stored(content, tables)
    del runtime

    def in_pytorch(**how: Any) -> Logits:
        """Of the student, which is gone from memory afterwards."""
        return by_length(load(student, threads=threads, **how), sequences, labels)

    references = []
    for done, dtype in enumerate(("float32", "float64"), start=1):
        say("parity", done, total)
        references.append(in_pytorch(dtype=dtype, **options))
    figures = compare(found, cached, *references) | {"sequences": len(sequences), "seed": seed}
    if alone:
        say("storage cost", 3, total)
        trained = in_pytorch()
        cost = figures["storage_cost"] = difference(found, trained) | {"alone": {}}
        for done, (part, storage) in enumerate(alone.items(), start=4):
            say(f"storage cost of {part} alone", done, total)
            own = {"tables": tables} if part == "embedding" and tables else {"storage": storage}
            cost["alone"][part] = difference(in_pytorch(**own), trained)
    say("parity", total, total)
    return figures


def roundings(storage: dict[str, str]) -> dict[str, dict[str, str]]:
    """What costs accuracy by itself, and the storage of a student that rounds nothing else.

    Empty where an artifact rounds no further than an embedding at 16 bits.
    """
    parts = {"embedding": ("embedding", "head_activations"), "cache": ("cache",)}
    parts |= {"activations": ("activations",)}
    found = {
        part: {name: storage[name] for name in names if name in storage}
        for part, names in parts.items()
        if storage.get(part, "float32") != "float32"
    }
    only_16_bits = found.keys() == {"embedding"} and storage["embedding"] in HALVES
    return {} if only_16_bits else found


def _as_stored(content: dict[str, Any], tables: dict[str, Any]) -> dict[str, Any]:
    """Options of the PyTorch runtime that make a student compute what an artifact stores."""
    storage = dict(content["storage"])
    if tables:
        del storage["embedding"]
    bits = content["decoder"]["activation_bits"]
    return {"storage": storage, "tables": tables, "activation_bits": bits}


def _large(
    student: Path,
    artifact: Path,
    content: dict[str, Any],
    seed: int,
    threads: int | None,
    say: Progress,
) -> dict[str, Any]:
    """Layer by layer where that can be done: ONNX, text generation."""
    if content["target"] != "onnx" or content["label_tokens"] is not None:
        reason = f"more than {LARGEST:.0e} parameters: compared layer by layer for ONNX alone"
        return {"passed": None, "skipped": reason}
    from bitdistill.evals import parity_layers

    words = content["decoder"]["vocabulary"]
    count = min(parity_layers.TOKENS, content["context"])
    tokens = np.random.default_rng(seed).integers(0, words, count).tolist()
    return parity_layers.report(student, artifact, tokens, threads, say)


def parameters(spec: DecoderSpec) -> int:
    """Weights of the linears, the embedding and an untied head; norms and biases left out."""
    linears = sum(math.prod(spec.shape(name)) for name in LINEARS) * len(spec.layers)
    return linears + spec.vocabulary * spec.hidden * (1 if spec.tied else 2)


def compare(found: Logits, cached: Logits, fp32: Logits, fp64: Logits) -> dict[str, Any]:
    """The figures and the verdict, from logits of the artifact, the floor and the reference.

    Each argument holds one (P, V) array per sequence, of the same positions.
    """
    floor, whole, steps = (difference(logits, fp64) for logits in (fp32, found, cached))
    failures = judge("whole sequences", whole, floor)
    failures += judge("cached decoding", steps, floor)
    return {
        "passed": not failures,
        "failures": failures,
        "floor": floor,
        "artifact": whole,
        "cached": steps,
        "artifact_against_fp32": difference(found, fp32),
    }


def difference(logits: Logits, reference: Logits) -> dict[str, Any]:
    """Errors relative to the spread of the reference, and the share of equal top tokens."""
    errors, largest, same, positions = [], 0.0, 0, sum(map(len, logits))
    for found_PV, expected_PV in zip(logits, reference, strict=True):
        if not (np.isfinite(found_PV).all() and np.isfinite(expected_PV).all()):
            return {"positions": positions, "finite": False}
        same += int((found_PV.argmax(-1) == expected_PV.argmax(-1)).sum())
        for found, expected in zip(found_PV, expected_PV.astype(np.float64), strict=True):
            difference = np.abs(found - expected) / max(float(expected.std()), TINY)
            errors.append(math.sqrt(float(np.square(difference).mean())))
            largest = max(largest, float(difference.max()))
    shares = {"positions": positions, "finite": True, "top_token_agreement": same / positions}
    quantiles = zip(QUANTILES, np.quantile(errors, list(QUANTILES.values())), strict=True)
    return shares | {name: float(value) for name, value in quantiles} | {"largest": largest}


def judge(what: str, found: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    """Sentences for each rule that is broken."""
    if not floor["finite"] or not found["finite"]:
        return [f"{what}: the logits are not finite"]
    failures = []
    allowed = max(TWICE * floor["quartile"], NEGLIGIBLE)
    if found["median"] > allowed:
        failures.append(f"{what}: median error {found['median']:.2e}, allowed {allowed:.2e}")
    least = floor["top_token_agreement"] - _margin(floor, found)
    if found["top_token_agreement"] < least:
        failures.append(
            f"{what}: top token agrees at {found['top_token_agreement']:.3f} of positions, "
            f"at least {least:.3f} expected"
        )
    return failures


def _margin(floor: dict[str, Any], found: dict[str, Any]) -> float:
    """Three standard errors of the difference of two shares (Laplace's estimate: never zero)."""
    n = floor["positions"]
    p = (floor["top_token_agreement"] * n + 1) / (n + 2)
    return 3.0 * math.sqrt(p * (1 - p) * (1 / n + 1 / found["positions"]))
