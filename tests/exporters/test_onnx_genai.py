"""The files for onnxruntime-genai: their content, and the tokens that GenAI itself generates."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import bitdistill
from bitdistill import backends, exporters, manifest
from bitdistill.exporters import onnx_genai

Students = Callable[..., Path]


def config_of(artifact: Path) -> dict[str, Any]:
    return json.loads((artifact / "genai_config.json").read_text())


def test_the_configuration_describes_the_artifact(artifact: Path) -> None:
    config, spec = config_of(artifact), manifest.read_manifest(artifact)["decoder"]
    decoder, model = config["model"]["decoder"], config["model"]
    assert (model["type"], model["vocab_size"]) == ("qwen3", spec["vocabulary"])
    assert (model["context_length"], config["search"]["max_length"]) == (128, 128)
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (1, [2], 0)
    assert decoder["num_hidden_layers"] == len(spec["layers"])
    assert decoder["num_attention_heads"] == spec["heads"]
    assert decoder["num_key_value_heads"] == spec["kv_heads"]
    assert decoder["head_size"] == spec["head_dim"]
    library = bitdistill.onnx_library_path().name
    assert decoder["session_options"]["custom_ops_library"] == library
    assert not (artifact / library).exists()
    graph = onnx.load(artifact / decoder["filename"], load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    past = {f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")}
    assert inputs == {"input_ids", "attention_mask"} | past
    assert {name % 0 for name in decoder["inputs"].values() if "%" in name} < inputs


def test_both_graphs_share_their_weights(artifact: Path) -> None:
    onnx.checker.check_model(str(artifact / "model_genai.onnx"), full_check=True)
    places = []
    for name in ("model.onnx", "model_genai.onnx"):
        graph = onnx.load(artifact / name, load_external_data=False).graph
        stored = [t for t in graph.initializer if t.external_data]
        places.append({t.name: tuple(e.value for e in t.external_data) for t in stored})
    assert places[0] == places[1]
    assert (artifact / "model_genai.onnx").stat().st_size < 80_000


def genai_session(artifact: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(bitdistill.onnx_library_path()))
    return onnxruntime.InferenceSession(str(artifact / "model_genai.onnx"), options)


def test_its_graph_gives_the_logits_of_the_last_tokens(
    student_dir: Students, tmp_path: Path
) -> None:
    """A right-padded batch, then one token more for each: what our runtime gives one by one."""
    artifact = exporters.export(
        student_dir("qwen2", "paper", None), "onnx", tmp_path / "out", kv_bits=32
    )
    runtime, session = backends.load(artifact), genai_session(artifact)
    tokens = [[5, 6, 7, 8, 9], [10, 11, 12]]
    mask = np.array([[1] * 5, [1] * 3 + [0] * 2], np.int64)
    nothing = np.zeros((2, 2, 0, 16), np.float32)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past")]
    feed = {"input_ids": np.array([tokens[0], [*tokens[1], 0, 0]]), "attention_mask": mask}
    logits, *present = session.run(None, feed | dict.fromkeys(names, nothing))
    expected = np.stack([rows[-1] for rows in runtime.logits(tokens)])
    assert logits.shape == (2, 1, runtime.vocabulary)
    np.testing.assert_allclose(logits[:, 0], expected, atol=1e-4 * expected.std())
    feed = {
        "input_ids": np.array([[13], [14]]),
        "attention_mask": np.concatenate([mask, np.ones((2, 1), np.int64)], 1),
    }
    logits = session.run(["logits"], feed | dict(zip(names, present, strict=True)))[0]
    longer = [[*tokens[0], 13], [*tokens[1], 14]]
    expected = np.stack([rows[-1] for rows in runtime.logits(longer)])
    np.testing.assert_allclose(logits[:, 0], expected, atol=1e-4 * expected.std())


def test_with_library_copies_it(student_dir: Students, tmp_path: Path) -> None:
    out = exporters.export(student_dir("llama"), "onnx", tmp_path / "out", with_library=True)
    library = bitdistill.onnx_library_path()
    assert (out / library.name).read_bytes() == library.read_bytes()
    assert library.name in manifest.read_manifest(out)["files"]
    with pytest.raises(ValueError, match="mlx has no option with_library"):
        exporters.export(student_dir("llama"), "mlx", tmp_path / "mlx", with_library=True)


def test_special_tokens_that_a_model_lacks(student_dir: Students, tmp_path: Path) -> None:
    from bitdistill import checkpoint

    spec = checkpoint.open_student(student_dir("llama")).spec
    onnx_genai.write_config(spec, 4096, {}, [7, 8], tmp_path, "integer", 32)
    model = config_of(tmp_path)["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (7, [7, 8], 7)
    assert "custom_ops_library" not in model["decoder"]["session_options"]
    assert config_of(tmp_path)["search"]["max_length"] == 2048


GENERATE = """
import json
import sys

import onnxruntime_genai as genai

model = genai.Model(sys.argv[1])
params = genai.GeneratorParams(model)
params.set_search_options(max_length=60)
generator = genai.Generator(model, params)
generator.append_tokens(json.loads(sys.argv[2]))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps(generator.get_sequence(0).tolist()))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="needs onnxruntime-genai")
@pytest.mark.parametrize(
    ("family", "ops", "kv_bits"),
    [
        ("qwen3", "custom", 16),
        ("gemma3_text", "custom", 16),
        ("qwen3", "custom", 8),
        ("llama", "custom", 32),
        ("llama", "portable", None),
        ("qwen2", "integer", None),
    ],
)
def test_genai_generates_our_tokens(
    student_dir: Students, tmp_path: Path, family: str, ops: str, kv_bits: int | None
) -> None:
    own = {"ops": ops, "kv_bits": kv_bits, "with_library": ops == "custom"}
    out = exporters.export(student_dir(family), "onnx", tmp_path / "out", **own)
    prompt = [5, 6, 7, 40, 41]
    result = subprocess.run(
        [sys.executable, "-c", GENERATE, str(out), json.dumps(prompt)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    ours = list(backends.load(out).generate(prompt, max_new_tokens=55))
    generated = found[len(prompt) :]
    if generated[-1] == 2:  # GenAI returns the token that ends a generation, ours does not
        generated.pop()
    assert found[: len(prompt)] == prompt
    assert generated == ours
    assert len(ours) > 5


TOKENIZE = """
import json
import sys

import onnxruntime_genai as genai

tokenizer = genai.Tokenizer(genai.Model(sys.argv[1]))
encoded = [tokenizer.encode(text).tolist() for text in json.loads(sys.argv[2])]
print(json.dumps([encoded, [tokenizer.decode(ids) for ids in encoded]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="needs onnxruntime-genai")
def test_genai_tokenizes_as_we_do(student_dir: Students, tmp_path: Path) -> None:
    out = exporters.export(student_dir("qwen3"), "onnx", tmp_path / "out", with_library=True)
    texts = [
        "the film is not good",
        " very  dull,\nbut bright!",
        "naïve Überfilm 漢字 🎬",
        "2 + 2 = 4",
    ]
    result = subprocess.run(
        [sys.executable, "-c", TOKENIZE, str(out), json.dumps(texts)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    encoded, decoded = json.loads(result.stdout.splitlines()[-1])
    ours = backends.load(out).tokenizer
    assert encoded == [ours.encode(text) for text in texts]
    assert decoded == [ours.decode(ids) for ids in encoded] == texts
