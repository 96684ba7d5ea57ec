"""Parity of a model too large for a reference of its own: one layer at a time.

The ONNX artifact runs once, with the output of every layer asked for. Then each layer of the
student, alone in memory, is given what the artifact gave its own, in fp32 and in fp64, and the
three outputs are compared. The yardstick is that of parity.py: fp64 is the reference, fp32 the
floor. A layer reads at most two orders of rounding, so no error can hide behind those before it.
Embedding and head are compared by parity_ends.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray

from bitdistill import checkpoint, manifest
from bitdistill.backends import kv_cache, onnx_probe, onnx_runtime, onnx_session
from bitdistill.backends.torch_storage import round_storage
from bitdistill.decoder import DecoderSpec, config_class, family_of
from bitdistill.evals import parity_ends
from bitdistill.quantize import BitLinear
from bitdistill.student import cast, empty_student

TOKENS = 48
Progress = Callable[[str, int, int], None]
Hidden = NDArray[np.float32]


def layer_outputs(
    artifact: Path, tokens: list[int], threads: int | None
) -> tuple[list[Hidden], Hidden]:
    """What enters the first layer of an ONNX artifact and leaves each, float32 (T, hidden), and the
    logits (T, V).
    """
    content = manifest.read_manifest(artifact, "artifact")
    spec = DecoderSpec.from_json(content["decoder"])
    proto = onnx.load(artifact / onnx_runtime.MODEL, load_external_data=False)
    layer = ["layers", "0"]  # one node, or the first of several
    first = next(n.input[0] for n in proto.graph.node if n.name.split(".")[:2] == layer)
    names = [first, *(f"layers.{i}.mlp_residual" for i in range(len(spec.layers)))]
    kind = onnx.TensorProto.FLOAT
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, kind, None) for n in names)
    probe = artifact / "parity.onnx.partial"  # beside the weights that it refers to
    probe.write_bytes(proto.SerializeToString())
    try:
        session = onnx_session.open_session(probe, threads, content["ops"] == onnx_runtime.CUSTOM)
        return _run(session, names, tokens, spec, content["kv_bits"])
    finally:
        probe.unlink()


def _run(
    session: ort.InferenceSession,
    names: list[str],
    tokens: list[int],
    spec: DecoderSpec,
    kv_bits: int,
) -> tuple[list[Hidden], Hidden]:
    nothing = np.zeros(kv_cache.shape(spec, kv_bits, 1, 0), kv_cache.DTYPES[kv_bits])
    inputs = {value.name: nothing for value in session.get_inputs() if "past" in value.name}
    inputs["input_ids"] = np.array([tokens], np.int64)
    inputs["seqlens_k"] = np.array([len(tokens) - 1], np.int32)
    inputs["total_sequence_length"] = np.array(len(tokens), np.int32)
    inputs["logit_rows"] = np.arange(len(tokens))
    *hidden, logits = session.run([*names, "logits"], inputs)
    return [output[0] for output in hidden], logits


def reference_outputs(
    student: Path, inputs: list[Hidden], storage: dict[str, str]
) -> Iterator[tuple[Hidden, NDArray[Any]]]:
    """Each layer of the student on what the artifact's was given: its output in fp32 and fp64."""
    files = checkpoint.open_student(student)
    stored = {part: form for part, form in storage.items() if part != "embedding"}
    for index, given in enumerate(inputs):
        layer = _Layer(files, index, stored)
        yield layer.output(given, torch.float32), layer.output(given, torch.float64)


class _Layer:
    """A student of layer `index` alone, rounded as an artifact stores it; no norm follows it."""

    def __init__(self, files: checkpoint.StudentFiles, index: int, storage: dict[str, str]) -> None:
        family = family_of(files.config["model_type"])
        config = config_class(family).from_pretrained(files.path)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[index]]
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 1, None
        self.model = empty_student(config).eval()
        self.model.model.norm = torch.nn.Identity()
        for name, parameter in self.model.model.layers[0].named_parameters():
            parameter.data = files.tensor(f"model.layers.{index}.{name}")
        round_storage(self.model, storage)
        for module in self.model.modules():
            if isinstance(module, BitLinear):
                with torch.no_grad():
                    module.freeze()

    @torch.inference_mode()
    def output(self, given: Hidden, dtype: torch.dtype) -> NDArray[Any]:
        """(T, hidden) -> (T, hidden) in a wider type than the last one."""
        cast(self.model, dtype)  # trits are the same in both, and so are rounded values
        hidden = torch.from_numpy(given)[None].to(dtype)
        found: NDArray[Any] = self.model.model(inputs_embeds=hidden, use_cache=False)[0][0].numpy()
        return found


def report(
    student: Path, artifact: Path, tokens: list[int], threads: int | None, progress: Progress
) -> dict[str, Any]:
    """`passed`, `failures`, errors of every layer, relative to the spread of what it adds, and what
    parity_ends.py says.

    Positions of all layers are judged together, as parity.py judges those of a model. Besides, no
    layer's median may exceed twice the floor's 95th percentile: one early flip moves the positions
    after it, but by no more than flips do.
    """
    from bitdistill.evals.parity import NEGLIGIBLE, TWICE, difference, judge

    content = manifest.read_manifest(artifact, "artifact")
    if caveat := onnx_probe.caveat(content):
        return {"passed": None, "skipped": caveat}
    tokens = tokens[:TOKENS]
    hidden, logits = layer_outputs(artifact, tokens, threads)
    found, floor, exact = [], [], []
    references = reference_outputs(student, hidden[:-1], content["storage"])
    for index, (fp32, fp64) in enumerate(references):
        progress("parity of layers", index, len(hidden))
        given = hidden[index]
        found.append(hidden[index + 1] - given)
        floor.append(fp32 - given)
        exact.append(fp64 - given)
    progress("parity of embedding and head", len(hidden) - 1, len(hidden))
    ends = parity_ends.report(student, tokens, hidden, logits, content["storage"])
    progress("parity", len(hidden), len(hidden))
    figures, yardstick = difference(found, exact), difference(floor, exact)
    failures = ends["failures"] + judge("layers", figures, yardstick)
    medians = [difference([a], [b])["median"] for a, b in zip(found, exact, strict=True)]
    allowed = max(TWICE * yardstick["percentile_95"], NEGLIGIBLE)
    failures += [
        f"layer {index}: median error {median:.2e}, allowed {allowed:.2e}"
        for index, median in enumerate(medians)
        if median > allowed
    ]
    return ends | {
        "passed": not failures,
        "failures": failures,
        "by_layer": medians,
        "floor": yardstick,
        "artifact": figures,
    }
