"""A teacher in int8: how far it is from itself, and that it teaches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import log_of
from torch import nn

from bitdistill.int8 import Int8Linear, weights_to_int8
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.student import layers_of


def test_a_row_is_rounded_by_its_own_scale() -> None:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[127.0, -63.4, 0.0], [0.5, 0.24, -0.125]]))
        linear.bias.copy_(torch.tensor([1.0, 2.0]))
    mine = Int8Linear(linear)
    assert mine.weight.dtype == torch.int8
    assert mine.weight.tolist() == [[127, -63, 0], [127, 61, -32]]
    scale = torch.tensor(0.5 / 127).bfloat16().float()
    expected = torch.tensor([127.0 - 63 + 1, float(scale) * (127 + 61 - 32) + 2])
    torch.testing.assert_close(mine(torch.ones(3)), expected)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_a_teacher_stays_itself(make_teacher: Callable[..., Any], family: str) -> None:
    teacher = make_teacher(family)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(input_ids=ids).logits
        weights_to_int8(teacher)
        actual = teacher.to(torch.float32)(input_ids=ids).logits
    assert not any(isinstance(m, nn.Linear) for m in layers_of(teacher).modules())
    # 14 roundings of 0.6 % each (max / rms of a row of 64 is 2.7), independent: 2.3 %
    assert float((actual - expected).norm() / expected.norm()) < 0.04


def test_a_recipe_with_an_int8_teacher(recipe: Callable[..., Config], tmp_path: Path) -> None:
    for bits in ("16", "8"):
        train(recipe(f"machine.teacher_bits={bits}"), tmp_path / bits, quiet=True)
    whole, rounded = (log_of(tmp_path / bits)[-1] for bits in ("16", "8"))
    assert rounded["logits"] == pytest.approx(whole["logits"], rel=0.1)
    assert rounded["logits"] != whole["logits"]
    assert rounded["ce"] == pytest.approx(whole["ce"], rel=0.01)
