"""What is fed to ONNX artifacts, and how their logits are compared with PyTorch's.

Errors are per position: the largest difference of a logit, over the standard deviation of all
logits. Without int8 activations nothing is rounded discontinuously and 1e-4 must hold everywhere.
With them, an activation on a rounding boundary may flip between two orders of summation, as it does
between fp32 and fp64 PyTorch: then most positions must still be within 1e-4, and the share that is
not must be explained by the share that fp64 shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitdistill import backends, manifest

TIGHT = 1e-4


def sequences(count: int = 4) -> list[list[int]]:
    """Random tokens; 40 of them reach far beyond the window of 8."""
    random = np.random.default_rng(3)
    return [random.integers(3, 280, n).tolist() for n in (40, 17, 1, 29)[:count]]


def flat(runtime: backends.Runtime, tokens: list[list[int]]) -> NDArray[np.float32]:
    return np.concatenate(runtime.logits(tokens))


def error(logits: NDArray[Any], reference: NDArray[Any]) -> NDArray[Any]:
    """Per position, as said above."""
    return np.abs(logits - reference).max(-1) / reference.std()


def reference(student: Path, artifact: Path, dtype: str = "float32") -> backends.Runtime:
    """PyTorch with the weights as the artifact stores them."""
    storage = manifest.read_manifest(artifact)["storage"]
    return backends.load(student, dtype=dtype, storage=storage)


def violations(logits: NDArray[Any], fp32: NDArray[Any], fp64: NDArray[Any]) -> list[str]:
    """What breaks the contract for models with int8 activations; empty if nothing does."""
    off, floor = error(logits, fp32) > TIGHT, error(fp64, fp32) > TIGHT
    broken = []
    if np.median(error(logits, fp32)) > TIGHT:
        broken.append("most positions differ")
    if off.mean() > 2 * floor.mean() + 0.1:
        broken.append(f"{off.mean():.0%} of positions differ, {floor.mean():.0%} explained")
    agree = (logits.argmax(-1) == fp32.argmax(-1)).mean()
    if agree < (fp64.argmax(-1) == fp32.argmax(-1)).mean() - 0.02:
        broken.append(f"predictions agree on {agree:.1%}")
    return broken
