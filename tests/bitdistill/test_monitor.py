"""What a run shows of itself: trits that moved, and arithmetic counted by hand."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import settings

from bitdistill.distributed import own_parts
from bitdistill.hardware import Hardware
from bitdistill.monitor import Monitor, forward_operations
from bitdistill.objective import make_objective
from bitdistill.quantize import bit_linears
from bitdistill.schema import Machine
from bitdistill.student import make_student
from bitdistill.training import Fit

CPU = Hardware.resolve(Machine(device="cpu"))


def test_flips_and_zeros_are_counted(make_teacher: Callable[..., Any]) -> None:
    student = make_student(make_teacher("llama"))
    layers = bit_linears(student)
    with torch.no_grad():
        for layer in layers:
            layer.weight.fill_(1.0)
            layer.weight[0] = 0.01
    monitor = Monitor(make_objective(student, None, settings()), CPU, own_parts(student))
    weights = sum(layer.weight.numel() for layer in layers)
    zeros = sum(layer.in_features for layer in layers)
    first = monitor.trits()
    assert first == {"zero_fraction": pytest.approx(zeros / weights)}  # nothing to compare with
    with torch.no_grad():
        layers[0].weight[1, :3] = -1.0
    second = monitor.trits()
    assert second["flip_rate"] == pytest.approx(3 / weights)
    changed = layers[0].weight.numel()
    assert monitor.linears["flip_rate"]["q_proj"] == [pytest.approx(3 / changed, abs=1e-6), 0.0]
    assert monitor.linears["zero_fraction"]["down_proj"] == [
        pytest.approx(1 / layer.out_features, abs=1e-6) for layer in layers[6::7]
    ]
    assert monitor.trits()["flip_rate"] == 0


def test_histograms_are_in_units_of_the_scale(make_teacher: Callable[..., Any]) -> None:
    student = make_student(make_teacher("llama"))
    down = [layer for layer in bit_linears(student) if layer.in_features == 96]
    with torch.no_grad():
        for layer in down:  # mean |w| stays 1
            layer.weight.fill_(1.0)
            layer.weight[0, 0], layer.weight[0, 1], layer.weight[0, 2] = 40.0, -0.51, -0.49
    objective = make_objective(student, None, settings())
    found = Monitor(objective, CPU, own_parts(student)).histogram()
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"} | {
        "down_proj"
    }
    counts = found["down_proj"]
    assert sum(counts) == sum(layer.weight.numel() for layer in down)
    assert counts[-1] == len(down)  # beyond the reach
    below, above = counts[49], counts[50]  # of -0.5, an edge
    assert (below, above) == (len(down), len(down))


def test_operations_by_hand(make_teacher: Callable[..., Any]) -> None:
    model = make_teacher("llama")
    config = model.config
    d, m, v, depth = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_hidden_layers,
    )
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = depth * (2 * d * q + 2 * d * kv + 3 * d * m) + v * d
    scores_and_values = depth * 2 * q * (64 / 2)  # token pairs, half of them hidden
    assert forward_operations(model, 64) == 2 * (matrices + scores_and_values)


def test_records_hold_what_moved(start: Callable[..., Fit], tmp_path: Path) -> None:
    fit = start(settings(steps=60, learning_rate=3e-2))
    assert not (tmp_path / "tensorboard").exists()  # imported with the first record
    fit.run()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "zero_fraction" in r] == [50, 60]
    assert 0 < records[-1]["flip_rate"] < 1
    assert all({"gradient_norm", "learning_rate", "data_wait"} <= set(r) for r in records)
    assert all(a["tokens"] < b["tokens"] for a, b in itertools.pairwise(records))
    lines = [json.loads(x) for x in (tmp_path / "weights.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if "histogram" in r] == [0, 60]
    assert [r["step"] for r in lines if "zero_fraction" in r] == [50, 60]
    assert {len(v) for v in lines[-2]["flip_rate"].values()} == {2}  # a number for each layer
    board = list((tmp_path / "tensorboard").glob("events*"))
    assert bool(board) == (importlib.util.find_spec("tensorboard") is not None)
