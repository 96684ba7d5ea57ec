"""Trits and scales read back from an ONNX artifact: those of the student, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from bitdistill import backends, checkpoint, exporters, manifest, packing
from bitdistill.backends import onnx_session
from bitdistill.decoder import LINEARS
from bitdistill.exporters import to_onnx
from bitdistill.exporters.base import ExportError

Students = Callable[..., Path]


def load(artifact: Path) -> onnx.ModelProto:
    return onnx.load(artifact / "model.onnx", load_external_data=False)


def read(artifact: Path, student: Path) -> list[tuple[str, np.ndarray, float]]:
    return list(to_onnx.read_linears(artifact, checkpoint.open_student(student).spec))


def write_scale(artifact: Path, layer: int, index: int, value: float) -> None:
    """Overwrite one stored scale of a layer: four of qkv_proj, one, two of gate_up_proj, one."""
    model, name = load(artifact), f"model.layers.{layer}.scale"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    scales = numpy_helper.to_array(tensor).copy()
    scales[index] = value
    tensor.CopyFrom(numpy_helper.from_array(scales, name))
    (artifact / "model.onnx").write_bytes(model.SerializeToString())


def set_attribute(artifact: Path, name: str, value: int | None) -> None:
    """Change, or with None remove, an integer attribute of every node that holds matrices."""
    model = load(artifact)
    for node in model.graph.node:
        if node.op_type in ("TernaryLinear", "DecoderLayer"):
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend(kept)
            if value is not None:
                node.attribute.append(helper.make_attribute(name, value))
    (artifact / "model.onnx").write_bytes(model.SerializeToString())


@pytest.fixture(params=["qwen3", "gemma3_text"])
def either(
    request: pytest.FixtureRequest, student_dir: Students, tmp_path: Path
) -> tuple[Path, Path]:
    """Student and artifact, whose layers are one node each, or a node for each matrix."""
    path = student_dir(request.param, "paper", 8)
    return path, exporters.export(path, "onnx", tmp_path / "either")


@pytest.fixture
def matrices(student_dir: Students, tmp_path: Path) -> tuple[Path, Path]:
    """Student and artifact, with a TernaryLinear for each matrix."""
    path = student_dir("gemma3_text", "paper", 8)
    return path, exporters.export(path, "onnx", tmp_path / "matrices")


@pytest.mark.parametrize("style", ["paper", "allnorm", "none"])
def test_trits_and_scales_are_the_students(
    student_dir: Students, style: str, tmp_path: Path
) -> None:
    # 100 is divisible neither by the 32 rows nor by the 16 columns of a block
    student = checkpoint.open_student(student_dir("llama", style, intermediate_size=100))
    out = exporters.export(student.path, "onnx", tmp_path / "out")
    seen = set()
    for name, trits, scale in to_onnx.read_linears(out, student.spec):
        weight = student.tensor(f"{name}.weight").numpy()
        mean = torch.tensor(np.abs(weight).mean(dtype=np.float64)).bfloat16().item()
        assert scale == pytest.approx(mean, rel=2**-7)  # an independent scale, to one bf16 step
        np.testing.assert_array_equal(trits, np.rint(weight / np.float32(scale + 1e-6)).clip(-1, 1))
        seen.add(name)
    assert seen == {f"model.layers.{i}.{linear}" for i in range(2) for linear in LINEARS}


# q, k and v have 64, 32 and 32 rows in llama; 128, 64 and 64 in qwen3 and gemma3.
STACKED = [
    ("llama", {}, {"qkv": (32, 4), "gate_up": (96, 2)}),
    ("llama", {"intermediate_size": 100}, {"qkv": (32, 4), "gate_up": (100, 2)}),
    ("qwen3", {}, {"qkv": (64, 4), "gate_up": (96, 2)}),
    ("gemma3_text", {}, {"qkv": (64, 4), "gate_up": (96, 2)}),
]


@pytest.mark.parametrize(("family", "config", "stacked"), STACKED)
def test_a_matrix_stores_one_scale_and_a_stack_few(
    student_dir: Students,
    family: str,
    config: dict[str, int],
    stacked: dict[str, tuple[int, int]],
    tmp_path: Path,
) -> None:
    path = student_dir(family, "paper", 8, **config)
    graph = load(exporters.export(path, "onnx", tmp_path / "out")).graph
    sizes = {t.name: list(t.dims) for t in graph.initializer}
    scales = {name: size for name, size in sizes.items() if name.endswith(".scale")}
    nodes = [node for node in graph.node if node.op_type == "TernaryLinear"]
    if not nodes:
        assert scales == {f"model.layers.{layer}.scale": [8] for layer in range(2)}
        return
    assert len(scales) == len(nodes) == 8
    for name, size in scales.items():
        part = name.split(".")[-2].removesuffix("_proj")
        assert size == [stacked.get(part, (0, 1))[1]], name
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        part = node.name.split(".")[-1].removesuffix("_proj")
        rows, _ = stacked.get(part, (attributes["N"], 1))
        assert attributes["scale_rows"] == rows, node.name


def test_stacked_scales_are_each_matrixs_own(student: Path, artifact: Path) -> None:
    opened = checkpoint.open_student(student)
    scales = {name: scale for name, _, scale in read(artifact, student)}
    assert scales == {name: opened.ternary(name)[1] for name in scales}
    q, k, v = (scales[f"model.layers.0.self_attn.{part}_proj"] for part in "qkv")
    assert len({q, k, v}) > 1  # or a mix-up could not be seen


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_scales_that_disagree_within_a_matrix_are_refused(
    copy: Path, student: Path, value: float
) -> None:
    write_scale(copy, 1, 1, value)  # the second half of q
    with pytest.raises(manifest.FormatError, match=r"layers.1.self_attn.q_proj have the scales \["):
        read(copy, student)


def test_a_scale_that_is_not_finite_is_refused(copy: Path, student: Path) -> None:
    write_scale(copy, 0, 7, float("nan"))
    with pytest.raises(manifest.FormatError, match=r"down_proj have the scales \[nan\], not one"):
        read(copy, student)
    with pytest.raises(manifest.FormatError, match=r"scale\[7\] = -?nan is not finite"):
        onnx_session.open_session(copy / "model.onnx", None)


@pytest.mark.parametrize("rows", [0, -64, 3, 1 << 40])
def test_scales_that_do_not_cover_the_rows_are_refused(
    matrices: tuple[Path, Path], rows: int
) -> None:
    student, artifact = matrices
    set_attribute(artifact, "scale_rows", rows)
    with pytest.raises(manifest.FormatError, match=f"4 scales of {rows} rows each for its 256"):
        read(artifact, student)
    with pytest.raises(manifest.FormatError, match=f"scale_rows = {rows} must be at least 1"):
        onnx_session.open_session(artifact / "model.onnx", None)


@pytest.mark.parametrize("count", [0, 3, 257])
def test_scales_that_are_not_those_of_a_layers_matrices_are_refused(
    copy: Path, student: Path, count: int
) -> None:
    model = load(copy)
    name = "model.layers.0.scale"
    index = next(i for i, t in enumerate(model.graph.initializer) if t.name == name)
    scales = numpy_helper.from_array(np.ones(count, np.float32), name)
    model.graph.initializer[index].CopyFrom(scales)
    (copy / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(manifest.FormatError, match=f"layers.0 has {count} scales, not 8; export"):
        read(copy, student)
    with pytest.raises(manifest.FormatError, match=rf"shape \(8\), got \({count}\); export"):
        onnx_session.open_session(copy / "model.onnx", None)


def test_matrices_without_an_attribute_are_refused(matrices: tuple[Path, Path]) -> None:
    student, artifact = matrices
    whole = (artifact / "model.onnx").read_bytes()
    for name in ("scale_rows", "N", "K"):
        set_attribute(artifact, name, None)
        with pytest.raises(manifest.FormatError, match="by an older version; export it again"):
            read(artifact, student)
        with pytest.raises(manifest.FormatError, match=f"attribute {name} is missing"):
            onnx_session.open_session(artifact / "model.onnx", None)
        (artifact / "model.onnx").write_bytes(whole)


def test_an_artifact_without_its_layout_is_refused(either: tuple[Path, Path]) -> None:
    student, artifact = either
    set_attribute(artifact, "layout", None)
    with pytest.raises(manifest.FormatError, match="written by an older version; export it again"):
        read(artifact, student)
    with pytest.raises(manifest.FormatError, match="attribute layout is missing"):
        onnx_session.open_session(artifact / "model.onnx", None)


@pytest.mark.parametrize(
    ("layout", "message"),
    [(2, "holds no five trits"), (3, "kernel layout 3 is not known; export the model again")],
)
def test_a_layout_that_the_bytes_are_not_in_is_refused(
    either: tuple[Path, Path], layout: int, message: str
) -> None:
    student, artifact = either
    set_attribute(artifact, "layout", layout)
    with pytest.raises(ValueError, match=message):
        read(artifact, student)
    with pytest.raises(manifest.FormatError, match=r"without five trits|layout 3 is not known"):
        onnx_session.open_session(artifact / "model.onnx", None)


def test_a_matrix_that_no_node_has_is_missed(either: tuple[Path, Path]) -> None:
    student, artifact = either
    model = load(artifact)
    for node in model.graph.node:
        node.input[:] = [name.replace("1.mlp.down_proj.weight", "other") for name in node.input]
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("1.mlp.down_proj.weight", "other")
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(manifest.FormatError, match=r"no matrix model.layers.1.mlp.down_proj; exp"):
        read(artifact, student)


def test_a_scale_that_is_fed_is_refused(either: tuple[Path, Path]) -> None:
    student, artifact = either
    model = load(artifact)
    names = ("model.layers.0.mlp.down_proj.scale", "model.layers.0.scale")
    fed = next(tensor for tensor in model.graph.initializer if tensor.name in names)
    model.graph.input.append(helper.make_tensor_value_info(fed.name, fed.data_type, fed.dims))
    model.graph.initializer.remove(fed)
    (artifact / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(manifest.FormatError, match="proj are not stored; export it again"):
        read(artifact, student)


def test_what_was_written_is_compared_with_the_student(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packing.pack_kernel
    monkeypatch.setattr(packing, "pack_kernel", lambda trits: pack(-trits))
    with pytest.raises(ExportError, match=r"read back from .*data is not what was written"):
        exporters.export(student, "onnx", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_1_6_bits_a_weight_hold_the_same_trits_and_give_the_same_logits(
    student_dir: Students, tmp_path: Path
) -> None:
    student = student_dir("qwen3", "paper", 8, intermediate_size=100)
    small = exporters.export(student, "onnx", tmp_path / "small", weight_bits=1.6)
    large = exporters.export(student, "onnx", tmp_path / "large")
    for (name, trits, scale), (other, expected, exact) in zip(
        read(small, student), read(large, student), strict=True
    ):
        assert (name, scale) == (other, exact)
        np.testing.assert_array_equal(trits, expected)
    content = manifest.read_manifest(small)
    assert content["kernel_layout"] == packing.BASE3_LAYOUT_VERSION
    bits, usual = (manifest.read_manifest(out)["parts"]["body_bits_per_weight"]
                   for out in (small, large))  # fmt: skip
    assert 1.6 < bits < 2 < usual  # rows and columns are padded at this size
    tokens = [list(range(3, 40)), [5]]
    for found, expected in zip(
        backends.load(small).logits(tokens), backends.load(large).logits(tokens), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_1_6_bits_need_int8_activations(student_dir: Students, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="are not quantised; export with --weight-bits 2"):
        exporters.export(student_dir("llama", "paper", None), "onnx", tmp_path / "out",
                         weight_bits=1.6)  # fmt: skip
    with pytest.raises(ValueError, match=r"weight_bits must be one of 2, 1.6 for onnx, got 1.58; "
                       r"did you mean 1.6\?"):  # fmt: skip
        exporters.export(student_dir("llama"), "onnx", tmp_path / "out", weight_bits=1.58)
    with pytest.raises(ValueError, match=r"weight_bits must be one of 2 for mlx, got 1\.6"):
        exporters.export(student_dir("llama"), "mlx", tmp_path / "out", weight_bits=1.6)
    assert list(tmp_path.iterdir()) == []
