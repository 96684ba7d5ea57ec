"""Exports of large models: data files beyond 2 GiB, and the memory of an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import backends, exporters
from bitdistill.exporters import to_onnx
from bitdistill.exporters.onnx_tensors import TensorFile

Students = Callable[..., Path]
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
