"""benchmarks/ternary_errors.py on a tiny model: held-out texts judge, and bits are those stored."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitdistill.calibration import LayerWalk
from bitdistill.quantize import bit_linears, ternarize
from bitdistill.student import make_student

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "ternary_errors.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


def test_errors_are_those_of_held_out_texts(
    script: ModuleType,
    make_teacher: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    teacher = make_teacher("llama")
    teacher.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [f"the plot was {'never ' * (i % 5)}dull" for i in range(12)]
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    options = "--column sentence --name tiny --examples 8 --held-out 4 --layers 1".split()
    monkeypatch.setattr(sys, "argv", ["x", str(tmp_path / "model"), str(file), *options])
    script.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(line["rounding"], line["kind"]): line for line in lines}
    kinds = {kind for _, kind in found}
    assert kinds == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "all"
    }  # fmt: skip
    ids = [tokenizer(text).input_ids for text in texts]
    for line in lines:
        assert line["tokens"] == sum(map(len, ids[:8]))
        assert line["held_out"] == sum(map(len, ids[8:]))
        assert line["layers"] == [1]
    assert found["absmean, blocks of 64", "q_proj"]["bits"] == 2.25
    # by hand: q_proj of the second layer, on the last four texts alone
    layer = teacher.model.layers[1]
    x: list[torch.Tensor] = []
    handle = layer.self_attn.q_proj.register_forward_pre_hook(lambda _, a: x.append(a[0][0]))
    with torch.no_grad():
        for row in ids[8:]:
            teacher(input_ids=torch.tensor([row]))
    handle.remove()
    inputs, weight = torch.cat(x), layer.self_attn.q_proj.weight.detach()
    trits, scale = ternarize(weight)
    lost = (inputs @ (weight - scale * trits).T).square().sum()
    error = float(lost / (inputs @ weight.T).square().sum())
    assert found["absmean", "q_proj"]["relative_error"] == pytest.approx(error, abs=1e-4)


def test_padding_changes_nothing(script: ModuleType, make_teacher: Callable[..., Any]) -> None:
    student = make_student(make_teacher("llama"), "none")
    for linear in bit_linears(student):
        linear.anneal.fill_(0.0)
    rows = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    together, alone = (LayerWalk(student, script.batches_of(rows, size)) for size in (3, 1))
    for _ in zip(together, alone, strict=True):
        found = [script.inputs(walk, "mlp.down_proj") for walk in (together, alone)]
        assert len(found[0]) == 10
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
