"""How close an MLX artifact must come to its PyTorch student, and artifacts that are damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from bitdistill import checkpoint, manifest
from bitdistill.backends.torch_storage import round_storage

CLOSE = 1e-5  # of the logits' spread: fp32 in another order of summation, no rounding flip


def sequences(count: int = 24, length: int = 5, vocabulary: int = 260) -> np.ndarray:
    """Random token ids (count, length)."""
    return np.random.default_rng(0).integers(0, vocabulary, (count, length))


def torch_logits(pair: tuple[Path, Path], tokens: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Logits of the student in PyTorch, rounded through the types of the artifact's file."""
    student, artifact = pair
    model = checkpoint.load(student)
    round_storage(model, manifest.read_manifest(artifact)["storage"])
    with torch.no_grad():
        return model.to(dtype)(torch.from_numpy(tokens)).logits.double().numpy()


def sequence_errors(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Largest error of each sequence (B, T, V), relative to the spread of the reference."""
    return np.abs(logits - reference).max(axis=(1, 2)) / np.ptp(reference)


def check_noise_floor(pair: tuple[Path, Path], tokens: np.ndarray, logits: np.ndarray) -> None:
    """int8 logits equal fp32 PyTorch's, but for rounding flips as common as fp32 has against fp64.

    A flip, legitimate in any order of summation, changes one sequence and not the others; a wrong
    formula changes all. So sequences are counted, and predictions compared.
    """
    reference = torch_logits(pair, tokens, torch.float32)
    noise = sequence_errors(torch_logits(pair, tokens, torch.float64), reference) > CLOSE
    flipped = sequence_errors(logits, reference) > CLOSE
    assert flipped.sum() <= noise.sum() + len(tokens) // 6
    agreement = (logits.argmax(-1) == reference.argmax(-1))[~flipped].mean()
    assert agreement == 1.0


def with_altered(path: Path, out: Path, tensor: str) -> Path:
    """A copy of an artifact, the last byte of one tensor changed."""
    shutil.copytree(path, out)
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    size = int.from_bytes(data[:8], "little")
    _, end = json.loads(data[8 : 8 + size])[tensor]["data_offsets"]
    data[8 + size + end - 1] |= 0xC3  # a code 3, or another high byte of a scale or a bias
    file.write_bytes(data)
    return out
