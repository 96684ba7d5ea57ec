"""Artifacts of stock operators: what is in them and what they compute, without our library."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bitdistill import backends, checkpoint, exporters, manifest, packing
from bitdistill.backends import onnx_probe
from bitdistill.evals import parity
from bitdistill.exporters import to_onnx

Students = Callable[..., Path]
STOCK = ("portable", "integer")
TIGHT = 1e-4


def graph_of(artifact: Path) -> onnx.GraphProto:
    return onnx.load(artifact / "model.onnx", load_external_data=False).graph


def sequences() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(3, 280, n).tolist() for n in (40, 17, 1)]


def errors(artifact: Path, student: Path, **options: Any) -> np.ndarray:
    """Largest difference of a logit at each position, over the spread of all."""
    found = np.concatenate(backends.load(artifact).logits(sequences()))
    expected = np.concatenate(backends.load(student, **options).logits(sequences()))
    return np.abs(found - expected).max(-1) / expected.std()


@pytest.mark.parametrize("ops", STOCK)
@pytest.mark.parametrize("style", ["paper", "allnorm"])
def test_only_stock_operators(student_dir: Students, tmp_path: Path, ops: str, style: str) -> None:
    out = exporters.export(student_dir("qwen3", style), "onnx", tmp_path / "out", ops=ops)
    onnx.checker.check_model(str(out / "model.onnx"), full_check=True)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    domains = {entry.domain for entry in model.opset_import}
    assert domains == {"", "com.microsoft", "bitdistill.functions"}
    assert [function.name for function in model.functions] == ["RMSNorm"]
    product = {"portable": "MatMulNBits", "integer": "MatMulInteger"}[ops]
    count = sum(node.op_type == product for node in model.graph.node)
    assert count == 2 * (4 if style == "paper" else 7)
    assert manifest.read_manifest(out)["ops"] == ops


@pytest.mark.parametrize("ops", STOCK)
@pytest.mark.parametrize("config", [{}, {"intermediate_size": 100}])
def test_trits_and_scales_are_the_students(
    student_dir: Students, tmp_path: Path, ops: str, config: dict[str, int]
) -> None:
    student = checkpoint.open_student(student_dir("llama", "paper", 8, **config))
    out = exporters.export(student.path, "onnx", tmp_path / "out", ops=ops)
    read = list(to_onnx.read_linears(out, student.spec, ops))
    assert len(read) == 14
    for name, trits, scale in read:
        expected, expected_scale = student.ternary(name)
        np.testing.assert_array_equal(trits, expected)
        assert scale == expected_scale


def test_bits_a_weight(student_dir: Students, tmp_path: Path) -> None:
    student = student_dir("qwen3", "paper", 8, intermediate_size=128)
    bits = {}
    for ops in ("custom", *STOCK):
        out = exporters.export(student, "onnx", tmp_path / ops, ops=ops)
        bits[ops] = manifest.read_manifest(out)["parts"]["body_bits_per_weight"]
        assert f"| body bits per weight | {bits[ops]:.3f} |" in (out / "README.md").read_text()
    # blocks of 128 where 128 divides the columns, of 64 for the hidden size
    assert 2.25 < bits["portable"] < 2.5
    assert 2 < bits["custom"] < 2.01
    assert 8 < bits["integer"] < 8.5


def test_stock_blocks() -> None:
    assert [packing.stock_block(k) for k in (1024, 576, 96, 100)] == [128, 64, 32, 32]
    trits = np.random.default_rng(0).integers(-1, 2, (5, 100)).astype(np.int8)
    packed = packing.pack_stock(trits)
    assert packed.shape == (5, 4, 8)
    np.testing.assert_array_equal(packing.unpack_stock(packed, 5, 100), trits)
    packed[2, 1, 3] = 0
    with pytest.raises(ValueError, match="not a ternary matrix"):
        packing.unpack_stock(packed, 5, 100)


EXACT = [
    ("qwen2", "paper", {}),
    ("gemma3_text", "allnorm", {}),
    ("llama", "none", {"attention_bias": True, "mlp_bias": True, "intermediate_size": 100}),
]


@pytest.mark.parametrize(("family", "style", "config"), EXACT)
def test_portable_without_activation_rounding_equals_pytorch(
    student_dir: Students, tmp_path: Path, family: str, style: str, config: dict[str, Any]
) -> None:
    student = student_dir(family, style, None, **config)
    out = exporters.export(student, "onnx", tmp_path / "out", ops="portable")
    storage = {"embedding": "float16", "norms": "float32"}
    assert errors(out, student, storage=storage).max() < TIGHT


CASES = [
    ("portable", 16, "qwen3", "paper"),
    ("portable", 8, "gemma3_text", "paper"),
    ("portable", 4, "llama", "allnorm"),
    ("integer", 16, "gemma3_text", "allnorm"),
    ("integer", 4, "qwen2", "paper"),
    ("integer", 16, "llama", "paper"),
]


@pytest.mark.parametrize(("ops", "bits", "family", "style"), CASES)
def test_parity_and_what_it_costs(
    student_dir: Students, tmp_path: Path, ops: str, bits: int, family: str, style: str
) -> None:
    student = student_dir(family, style, 8, tie_word_embeddings=family != "qwen2")
    out = exporters.export(
        student, "onnx", tmp_path / "out", ops=ops, embed_bits=bits,
        check=lambda path: parity.report(student, path),
    )  # fmt: skip
    content = manifest.read_manifest(out)
    report = content["parity"]
    assert report["failures"] == []
    assert ("storage_cost" in report) == (ops == "portable" or bits < 16)
    # as rounded there, PyTorch gives the same to float tolerance in most places
    assert np.median(errors(out, student, storage=content["storage"])) < TIGHT


def test_block_rounding_is_what_the_reference_rounds(student_dir: Students, tmp_path: Path) -> None:
    student = student_dir("qwen3", "paper", 8)
    out = exporters.export(student, "onnx", tmp_path / "out", ops="portable")
    storage = manifest.read_manifest(out)["storage"]
    assert storage["activations"] == "int8 blocks"
    as_trained = storage | {"activations": "int8"}
    assert np.median(errors(out, student, storage=as_trained)) > 50 * TIGHT


def test_the_probe_is_a_valid_model() -> None:
    model = onnx.load_from_string(onnx_probe.model())
    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString() == onnx_probe.model()


def test_the_probe_tells_floats_from_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product with floats is found by asking for it: level 1 rounds nothing."""
    assert onnx_probe.rounds_activations()
    model = onnx.load_from_string(onnx_probe.model())
    for attribute in model.graph.node[0].attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 1
    monkeypatch.setattr(onnx_probe, "model", model.SerializeToString)
    assert not onnx_probe.rounds_activations.__wrapped__()


@pytest.mark.parametrize("ops", ["portable", "integer"])
def test_an_onnxruntime_that_does_not_round_is_told_of(
    student_dir: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ops: str
) -> None:
    """As 1.24 to 1.28 do on AVX2: in `portable` alone, and where the student rounds at all."""
    student = student_dir("llama", "paper", 8)
    out = exporters.export(student, "onnx", tmp_path / "out", ops=ops)
    told = "1.24 to 1.28 and onnxruntime-web do not round them"
    assert (told in (out / "README.md").read_text()) == (ops == "portable")
    with warnings.catch_warnings(action="error"):
        backends.load(out)
    monkeypatch.setattr(onnx_probe, "rounds_activations", lambda: False)
    if ops == "integer":
        with warnings.catch_warnings(action="error"):
            backends.load(out)
        return
    with pytest.warns(UserWarning, match=r"does not round activations.*run: pip install -U"):
        backends.load(out)
    for largest in (parity.LARGEST, 1000):
        monkeypatch.setattr(parity, "LARGEST", largest)  # and by layers
        report = parity.report(student, out)
        assert report["passed"] is None
        assert "not measured (onnxruntime" in parity.verdict(report)
    plain = student_dir("llama", "paper", None)
    with warnings.catch_warnings(action="error"):
        backends.load(exporters.export(plain, "onnx", tmp_path / "plain", ops=ops))


RUN = """
import sys
from bitdistill.backends import load, onnx_runtime

def refuse():
    raise AssertionError("the library was asked for")

onnx_runtime.library_path = refuse
model = load(sys.argv[1], threads=1)
prompt = model.tokenizer.encode("the film is good")
print(list(model.generate(prompt, max_new_tokens=6, stop=())))
"""


@pytest.mark.parametrize("ops", STOCK)
def test_generates_without_our_library(student_dir: Students, tmp_path: Path, ops: str) -> None:
    student = student_dir("llama", "paper", 8)
    out = exporters.export(student, "onnx", tmp_path / "out", ops=ops)
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(out)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    reference = backends.load(student, storage=manifest.read_manifest(out)["storage"])
    prompt = reference.tokenizer.encode("the film is good")
    assert result.stdout.strip() == str(list(reference.generate(prompt, max_new_tokens=6, stop=())))


def test_a_tied_quantised_table_is_in_the_file_once(student_dir: Students, tmp_path: Path) -> None:
    student = student_dir("llama", "paper", 8)
    out = exporters.export(student, "onnx", tmp_path / "out", ops="portable", embed_bits=8)
    places = {
        tensor.name: tuple(entry.value for entry in tensor.external_data)
        for tensor in graph_of(out).initializer
    }
    name = "model.embed_tokens.weight"
    assert places[name] == places[f"{name}.blocks"]
    rows = checkpoint.open_student(student).spec.vocabulary
    assert manifest.read_manifest(out)["parts"]["embedding"] == rows * 64 + rows * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": "portabel"}, "unknown ops 'portabel'; did you mean 'portable'?"),
        ({"ops": "portable", "weight_bits": 1.6}, "stock operators have no 1.6-bit weights"),
        ({"ops": "portable", "with_library": True}, "needs no library; leave it out"),
        ({"ops": "integer", "embed_bits": 8}, "choose --embed-bits 16 or 4"),
    ],
)
def test_what_stock_operators_cannot_do(
    student_dir: Students, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        exporters.export(student_dir("llama"), "onnx", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(student_dir: Students, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mlx has no option ops; leave it out"):
        exporters.export(student_dir("llama"), "mlx", tmp_path / "out", ops="portable")
    with pytest.raises(ValueError, match="activations are not rounded; use --ops custom"):
        exporters.export(
            student_dir("llama", "paper", None), "onnx", tmp_path / "out", ops="integer"
        )
