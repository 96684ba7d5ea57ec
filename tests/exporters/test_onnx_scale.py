"""Exports of large models: data files beyond 2 GiB, and the memory of an export."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import backends, exporters
from bitdistill.exporters import to_onnx
from bitdistill.exporters.onnx_tensors import TensorFile

Students = Callable[..., Path]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
BEYOND = 5 << 29  # 2.5 GiB: neither int32 nor one protobuf message holds it


class Distant(TensorFile):
    """A data file whose tensors lie behind a hole, which takes no room on the disk."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stream.seek(BEYOND)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"ops": "integer", "embed_bits": 4}])
def test_a_data_file_beyond_two_gigabytes(
    student_dir: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    student = student_dir("qwen3", "paper", 8)
    near = backends.load(exporters.export(student, "onnx", tmp_path / "near", **options))
    monkeypatch.setattr(to_onnx, "TensorFile", Distant)
    out = exporters.export(student, "onnx", tmp_path / "far", **options)
    assert (out / "model.onnx.data").stat().st_size > BEYOND
    far = backends.load(out, verify=False)  # which reads all of the hole
    tokens = [[5, 6, 7, 8], [9]]
    for found, expected in zip(far.logits(tokens), near.logits(tokens), strict=True):
        np.testing.assert_array_equal(found, expected)
    texts = [list(model.generate([5, 6], max_new_tokens=5)) for model in (near, far)]
    assert texts[0] == texts[1]


MAKE = """
import sys

sys.path.insert(0, sys.argv[1])
from pathlib import Path

import random_student

sizes = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 150_000}
rest = {"model_type": "qwen3", "max_position_embeddings": 128, "tie_word_embeddings": True}
random_student.SHAPES["words"] = sizes | rest
random_student.make("words", Path(sys.argv[2]))
"""
ALLOWED_MB = 64.0  # libraries that are loaded on the way, and a chunk of rows


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory in KiB")
def test_an_export_holds_its_largest_tensor_once(tmp_path: Path) -> None:
    """Of a student that is its embedding: 307 MB in fp32."""
    subprocess.run([sys.executable, "-c", MAKE, BENCHMARKS, tmp_path / "words"], check=True)
    script = [sys.executable, BENCHMARKS / "onnx_export.py", "--here", "--shape", "words"]
    for bits in ("32", "8"):
        options = ["--work", tmp_path, "--embed-bits", bits]
        done = subprocess.run([*script, *options], check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        assert found["largest_mb"] == 307.2
        assert found["peak_mb"] - found["bare_mb"] < 1.2 * found["largest_mb"] + ALLOWED_MB
