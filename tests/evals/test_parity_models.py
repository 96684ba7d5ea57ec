"""The parity report on real artifacts, and on models that are a little wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import backends, manifest
from bitdistill.cli import main
from bitdistill.decoder import DecoderSpec
from bitdistill.evals import parity, parity_layers, parity_logits
from bitdistill.exporters.base import export

PROMPTS = ["the film is not good", "very dull and bright and we liked it"]


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_an_exported_artifact_passes(
    student_dir: Callable[..., Path], tmp_path: Path, target: str
) -> None:
    student = student_dir("qwen2", "paper")  # its fp32 run rounds otherwise than fp64 in places
    steps: list[int] = []

    def check(path: Path) -> dict[str, Any]:
        return parity.report(
            student, path, PROMPTS, progress=lambda stage, done, total: steps.append(done)
        )

    out = export(student, target, tmp_path / "out", check=check)
    report = json.loads((out / "bitdistill.json").read_text())["parity"]
    assert report["failures"] == []
    assert report["passed"] is True
    assert report["sequences"] == parity_logits.SEQUENCES + len(PROMPTS)
    assert report["artifact"]["positions"] == report["cached"]["positions"] > 200
    rounded = target == "onnx"  # its cache, to 16 bits
    assert steps == list(range(7 if rounded else 4))
    assert ("storage_cost" in report) == rounded


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_a_bar_shows_parity_on_a_terminal(
    student_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.openpty()
    arguments = ["export", student_dir("qwen2", "paper"), "--target", "onnx"]
    with ThreadPoolExecutor(1) as pool, os.fdopen(ours, "rb", buffering=0) as terminal:
        reading = pool.submit(read_all, terminal)
        with os.fdopen(theirs, "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            main([*map(str, arguments), "--out", str(tmp_path / "out")], standalone_mode=False)
        said = reading.result(timeout=60)
    names = ["parity"] * 3 + ["storage cost"] * 3 + ["parity"]
    places = [said.find(f"{done}/6 {name}".encode()) for done, name in enumerate(names)]
    assert places == sorted(places)
    assert 0 < said.find(b"verify model.layers") < places[0]
    assert places[-1] < said.find(b"parity with PyTorch")


def read_all(terminal: io.RawIOBase) -> bytes:
    said = b""
    with contextlib.suppress(OSError):  # Linux's end of a terminal that nobody else has open
        while part := terminal.read(1 << 16):
            said += part
    return said


@pytest.mark.parametrize(
    ("part", "factor"),
    [("layers.1.mlp.down_proj.norm.weight", 1.01), ("layers.0.self_attn.q_norm.weight", 0.98)],
)
def test_a_model_that_is_a_little_wrong_fails(
    student_dir: Callable[..., Path], part: str, factor: float
) -> None:
    student = student_dir("qwen3", "paper")
    exact = backends.load(student, dtype="float64")
    floor, wrong = backends.load(student), backends.load(student)
    dict(wrong.model.named_parameters())[f"model.{part}"].data *= factor
    sequences = parity_logits.make_sequences(exact, PROMPTS, seed=0)
    logits = {name: parity_logits.last_logits(r, sequences) for name, r in
              (("exact", exact), ("floor", floor), ("wrong", wrong))}  # fmt: skip
    fine = parity.compare(logits["floor"], logits["floor"], logits["floor"], logits["exact"])
    assert fine["passed"]
    report = parity.compare(logits["wrong"], logits["floor"], logits["floor"], logits["exact"])
    assert not report["passed"]
    assert report["failures"][0].startswith("whole sequences: median error")


def test_cached_logits_are_those_of_the_same_positions(student_dir: Callable[..., Path]) -> None:
    runtime = backends.load(student_dir("llama", "none"), dtype="float64")
    sequences = parity_logits.make_sequences(runtime, PROMPTS, seed=0)
    whole, cached = (
        parity_logits.last_logits(runtime, sequences),
        parity_logits.decoded(runtime, sequences),
    )
    assert [len(rows) for rows in whole] == [min(parity_logits.KEPT, len(s)) for s in sequences]
    agree = [np.abs(a - b).max() < 1e-4 for a, b in zip(whole, cached, strict=True)]
    assert np.mean(agree) > 0.8  # a flip of a rounding is legitimate even here


def test_logits_by_length_are_those_of_a_padded_batch(student_dir: Callable[..., Path]) -> None:
    """Unrounded, so that the order of sums alone is between them."""
    student = student_dir("llama", "none")
    runtime = backends.load(student, dtype="float64", activation_bits=None)
    sequences = parity_logits.make_sequences(runtime, PROMPTS, seed=0)
    assert len({len(sequence) for sequence in sequences}) < len(sequences)
    whole = parity_logits.last_logits(runtime, sequences)
    for mine, theirs in zip(parity_logits.by_length(runtime, sequences, None), whole, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    labels = [7, 3]
    (mine, *_) = parity_logits.by_length(runtime, sequences, labels)
    np.testing.assert_allclose(mine, whole[0][:, labels], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "alone"),
    [
        (
            {"embed_bits": 4, "kv_bits": 8},
            {"embedding": {"embedding": "int4"}, "cache": {"cache": "int8"}},
        ),
        (
            {"ops": "portable", "embed_bits": 8},
            {
                "embedding": {"embedding": "int8", "head_activations": "int8 blocks"},
                "activations": {"activations": "int8 blocks"},
            },
        ),
        ({"ops": "integer", "embed_bits": 16}, {}),
    ],
)
def test_the_cost_of_each_rounding_alone(
    student_dir: Callable[..., Path], tmp_path: Path, options: dict[str, Any], alone: Any
) -> None:
    student = student_dir("qwen3", "paper", 8)
    out = export(student, "onnx", tmp_path / "out", **options)
    report = parity.report(student, out)
    costs = report.get("storage_cost", {"alone": {}})["alone"]
    assert costs.keys() == alone.keys()
    sequences = parity_logits.make_sequences(backends.load(student), [], seed=0)
    trained = parity_logits.by_length(backends.load(student), sequences, None)
    for part, storage in alone.items():
        changed = backends.load(student, storage=storage)
        rounded = parity_logits.by_length(changed, sequences, None)
        assert costs[part] == parity.difference(rounded, trained)
        assert 0 < costs[part]["median"] < 1.5 * report["storage_cost"]["median"]


def test_the_cost_of_a_quantised_embedding_in_mlx(
    student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    student = student_dir("qwen3", "paper", 8)
    report = parity.report(student, export(student, "mlx", tmp_path / "out", embed_bits=4))
    cost = report["storage_cost"]
    assert cost["alone"].keys() == {"embedding"}
    assert cost["alone"]["embedding"]["median"] == pytest.approx(cost["median"], rel=0.2)


def test_an_artifact_of_other_weights_is_refused(
    student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    out = export(student_dir("qwen3", "paper"), "onnx", tmp_path / "out")
    with pytest.raises(manifest.FormatError, match=r"not exported from the weights in .*again"):
        parity.report(student_dir("llama", "none"), out)


@pytest.mark.parametrize(("family", "ops"), [("gemma3_text", "custom"), ("qwen3", "portable")])
def test_a_large_model_is_compared_layer_by_layer(
    student_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    family: str, ops: str,
) -> None:  # fmt: skip
    student = student_dir(family, "paper")
    out = export(student, "onnx", tmp_path / "out", ops=ops)
    before = sorted(path.name for path in out.iterdir())
    monkeypatch.setattr(parity, "LARGEST", 1000)
    report = parity.report(student, out)
    assert report["failures"] == []
    assert report["passed"] is True
    assert len(report["by_layer"]) == 2
    assert report["artifact"]["positions"] == 2 * 48
    assert sorted(path.name for path in out.iterdir()) == before


def test_a_layer_that_is_a_little_wrong_fails(
    student_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_dir("qwen3", "paper")
    out = export(student, "onnx", tmp_path / "out")
    monkeypatch.setattr(parity, "LARGEST", 1000)
    exact = parity_layers._Layer

    def wrong(files: Any, index: int, storage: dict[str, str]) -> Any:
        layer = exact(files, index, storage)
        if index == 1:
            layer.model.model.layers[0].self_attn.q_norm.weight.data *= 0.95
        return layer

    monkeypatch.setattr(parity_layers, "_Layer", wrong)
    report = parity.report(student, out)
    assert report["passed"] is False
    assert report["by_layer"][1] > 100 * report["by_layer"][0]


def test_a_large_model_is_skipped_where_layers_cannot_be_compared(
    student_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = student_dir("qwen3", "paper")
    out = export(student, "mlx", tmp_path / "out")
    monkeypatch.setattr(parity, "LARGEST", 1000)
    report = parity.report(student, out)
    assert report["passed"] is None
    assert "more than 1e+03 parameters: compared layer by layer for ONNX" in report["skipped"]


def test_parameters_are_those_of_pytorch(student_dir: Callable[..., Path]) -> None:
    from bitdistill import checkpoint

    student = student_dir("qwen3", "paper")
    spec: DecoderSpec = checkpoint.open_student(student).spec
    counted = sum(p.numel() for p in checkpoint.load(student).parameters() if p.ndim == 2)
    assert parity.parameters(spec) == counted
