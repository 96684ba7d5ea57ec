"""What only a CUDA device can show; run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitdistill.config import load_config
from bitdistill.quantize import BitLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_integer_product_is_exact_on_cuda() -> None:
    """Same integers and trits, so fp32 on the GPU differs from the CPU by the scaling alone."""
    torch.manual_seed(0)
    layer, x = BitLinear(1024, 512), torch.randn(64, 1024)
    expected = layer(x)
    layer.freeze()  # the mean of |W| may round to another bf16 on another device
    actual = layer.cuda()(x.cuda()).cpu()
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0.0)


def test_compiled_bfloat16_training_learns(tmp_path: Path) -> None:
    from bitdistill.recipe import train

    short = [f"{stage}.steps=60" for stage in ("base", "teacher", "bitnet_sft", "distill")]
    train(load_config("tiny", [*short, "machine.pad_multiple=32"]), tmp_path, quiet=True)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for stage in ("base", "teacher", "student"):
        losses = [record["ce"] for record in records if record["stage"] == stage]
        assert losses[-1] < losses[0], stage


def test_replayed_steps_equal_launched_ones(tmp_path: Path) -> None:
    """The same run with and without CUDA graphs: the same losses, to the order of atomic sums."""
    from bitdistill.recipe import train

    losses = {}
    for graphs in ("true", "false"):
        short = [f"{stage}.steps=40" for stage in ("base", "teacher", "bitnet_sft", "distill")]
        options = [*short, "machine.pad_multiple=32", f"machine.graphs={graphs}"]
        train(load_config("tiny", options), tmp_path / graphs, quiet=True)
        lines = (tmp_path / graphs / "log.jsonl").read_text().splitlines()
        losses[graphs] = [
            (record["stage"], key, value)
            for record in map(json.loads, lines)
            for key, value in record.items()
            if key in ("ce", "logits", "relations")
        ]
    assert len(losses["true"]) == len(losses["false"]) > 12
    for (stage, key, replayed), (*same, launched) in zip(
        losses["true"], losses["false"], strict=True
    ):
        assert [stage, key] == same
        assert replayed == pytest.approx(launched, rel=0.05), (stage, key)
