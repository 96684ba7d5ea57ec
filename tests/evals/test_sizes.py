"""Bytes by part, read from headers: those of the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistill.evals.sizes import tensor_parts
from bitdistill.manifest import FormatError


def test_parts_are_those_of_the_tensors(make_teacher: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    model = make_teacher("qwen3", tie_word_embeddings=False)
    model.model.layers[0].mlp.to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    expected = {"embedding": 0, "head": 0, "norms": 0, "body": 0}
    for name, tensor in model.state_dict().items():
        part = "norms" if "norm" in name else "body"
        part = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head"}.get(name, part)
        expected[part] += tensor.numel() * tensor.element_size()
    found = tensor_parts(tmp_path)
    assert found is not None
    assert found.pop("total") == sum(expected.values())
    assert found == expected


def test_no_file_and_a_damaged_one(tmp_path: Path) -> None:
    assert tensor_parts(tmp_path) is None
    for content in (b"", b"short", b"\x05\0\0\0\0\0\0\0[1,2", b"\xff" * 40):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(FormatError, match="is damaged: it has no header; copy it again"):
            tensor_parts(tmp_path)
