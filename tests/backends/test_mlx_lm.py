"""MLX artifacts in mlx-lm: three ways to load, caches, batches, fine-tuning, conversion."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_parity import (
    CLOSE,
    check_noise_floor,
    sequence_errors,
    sequences,
    torch_logits,
    with_altered,
)

from bitdistill import exporters, manifest, mlx_commands
from bitdistill.backends import mlx_architecture

Artifact = Callable[..., tuple[Path, Path]]
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
SCALED = {
    "llama3": ROPE
    | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": ROPE | {"rope_type": "yarn", "factor": 4.0},
}
OURS = {"model_file": None}  # with bitdistill imported, its architecture and not the directory's


def load(path: Path) -> tuple[Any, Any]:
    """`mlx_lm.load`, which finds our architectures because bitdistill is imported."""
    return mlx_lm.load(str(path))


def logits_of(path: Path, tokens: np.ndarray) -> np.ndarray:
    return np.array(load(path)[0](mx.array(tokens)).astype(mx.float32))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_student_is_a_stock_model(mlx_artifact: Artifact, family: str) -> None:
    pair = mlx_artifact(family, "none", None, options={"dtype": "float32"})
    model, _ = load(pair[1])
    assert type(model).__module__ == f"mlx_lm.models.{family}"
    tokens = sequences(3, 24)  # longer than gemma's window of 8
    reference = torch_logits(pair, tokens, torch.float32)
    assert sequence_errors(np.array(model(mx.array(tokens))), reference).max() < 10 * CLOSE


@pytest.mark.parametrize("rope", SCALED)
def test_a_stock_model_rotates_as_its_student(mlx_artifact: Artifact, rope: str) -> None:
    scaled = {"rope_parameters": SCALED[rope]}
    pair = mlx_artifact("llama", "none", None, options={"dtype": "float32"}, **scaled)
    model, _ = load(pair[1])
    assert type(model).__module__ == "mlx_lm.models.llama"
    tokens = sequences(2, 40)
    reference = torch_logits(pair, tokens, torch.float32)
    assert sequence_errors(np.array(model(mx.array(tokens))), reference).max() < 10 * CLOSE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_with_norms_loads_because_bitdistill_is_imported(
    mlx_artifact: Artifact, family: str
) -> None:
    pair = mlx_artifact(family, "paper", None)
    assert type(load(pair[1])[0]) is mlx_architecture.Model
    tokens = sequences(3, 24)
    reference = torch_logits(pair, tokens, torch.float32)
    assert sequence_errors(logits_of(pair[1], tokens), reference).max() < CLOSE


@pytest.mark.parametrize("bits", [16, 8, 6, 4])
def test_int8_activations_and_narrow_embeddings(mlx_artifact: Artifact, bits: int) -> None:
    """The same logits as our own runtime, whose parity with PyTorch is tested elsewhere."""
    pair = mlx_artifact("qwen3", "paper", 8, options={"embed_bits": bits})
    tokens = sequences()
    logits = logits_of(pair[1], tokens)
    if bits == 16:
        check_noise_floor(pair, tokens, logits)
    model = load(pair[1])[0]
    assert ("scales" in model.model.embed_tokens) == (bits < 16)


PLAIN = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitdistill":
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocker())
import mlx.core as mx, mlx_lm, numpy as np

model, tokenizer = mlx_lm.load(sys.argv[1], trust_remote_code=True)
np.save(sys.argv[2], np.array(model(mx.array(np.load(sys.argv[3])))))
assert mlx_lm.generate(model, tokenizer, prompt="the film is", max_tokens=3)
"""


def test_the_model_file_serves_an_mlx_lm_without_bitdistill(
    mlx_artifact: Artifact, tmp_path: Path
) -> None:
    _, path = mlx_artifact("gemma3_text", "paper", 8, options={"model_file": True})
    tokens, found = tmp_path / "tokens.npy", tmp_path / "logits.npy"
    np.save(tokens, sequences(2, 12))
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(path), str(found), str(tokens)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with pytest.raises(ValueError, match=r"custom module \('bitdistill_model.py'\)"):
        load(path)
    model, _ = mlx_lm.load(str(path), model_config=OURS)
    assert np.array_equal(np.load(found), np.array(model(mx.array(sequences(2, 12)))))


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("part", ["weight", "scales", "biases"])
def test_weights_that_are_not_ternary_are_refused(
    mlx_artifact: Artifact, tmp_path: Path, part: str, trusted: bool
) -> None:
    """A code 3, a group of another scale, a bias that is not -D; by the model file as by us."""
    _, whole = mlx_artifact("qwen3", "paper", 8, options={"model_file": True})
    path = with_altered(whole, tmp_path / "altered", f"model.layers.1.mlp.up_proj.{part}")
    how: dict[str, Any] = {"trust_remote_code": True} if trusted else {"model_config": OURS}
    assert mlx_lm.load(str(whole), **how)
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj: .*not one ternary .* export"):
        mlx_lm.load(str(path), **how)


def test_fused_adapters_are_refused(mlx_artifact: Artifact, tmp_path: Path) -> None:
    """What `mlx_lm.fuse` saves: sums of trits and adapters on a grid of four levels."""
    path = mlx_artifact("qwen3", "none", 8)[1]
    model, _ = load(path)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    adapters = [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]
    for _, adapter in adapters:
        adapter.lora_b = mx.ones_like(adapter.lora_b)
    model.update_modules(tree_unflatten([(name, m.fuse()) for name, m in adapters]))
    fused = shutil.copytree(path, tmp_path / "fused")
    mx.save_safetensors(
        str(fused / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    with pytest.raises(
        ValueError, match=r"layers\.1\.mlp\.down_proj: .*not one ternary matrix.*mlx_lm\.fuse"
    ):
        load(fused)


COMPILED = """
import json, sys
import mlx.core as mx

truly, mx.metal.is_available = mx.metal.is_available, lambda: True
from bitdistill.backends import mlx_architecture, mlx_linear
mx.metal.is_available = truly  # compiled as on Metal, run where this is
import mlx_lm, numpy as np

assert type(mlx_linear._quantize).__name__ != "function", "not compiled"
model, tokenizer = mlx_lm.load(sys.argv[1])
logits = [np.array(model(mx.array(np.load(name)))) for name in sys.argv[3:]]
x = mx.array([[0.3, -1.2, 2.5]])
slope = mx.grad(lambda x: mlx_linear.quantize_activations(x)[0].sum())(x)
said = mlx_lm.generate(model, tokenizer, prompt="the film is", max_tokens=3)
np.savez(sys.argv[2], *logits, slope=np.array(slope), said=np.array(said))
"""


SLOW = pytest.mark.slow  # seconds each; each family and width is in a quick one


@pytest.mark.parametrize(
    ("family", "bits"),
    [
        ("llama", 8),
        ("gemma3_text", None),
        pytest.param("llama", None, marks=SLOW),
        pytest.param("gemma3_text", 8, marks=SLOW),
    ],
)
def test_what_metal_compiles(
    mlx_artifact: Artifact, tmp_path: Path, family: str, bits: int | None
) -> None:
    """On Metal some functions are compiled once for every shape; elsewhere they are not."""
    path = mlx_artifact(family, "paper", bits)[1]
    model, tokenizer = load(path)
    names = [tmp_path / f"{length}.npy" for length in (12, 1)]
    for name in names:
        np.save(name, sequences(2, int(name.stem)))
    found = tmp_path / "found.npz"
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, str(path), str(found), *map(str, names)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = np.load(found)
    for index, name in enumerate(names):
        plain = np.array(model(mx.array(np.load(name))))
        assert sequence_errors(results[f"arr_{index}"], plain).max() < CLOSE
    assert np.allclose(results["slope"], 127.0 / (2.5 + 1e-5))
    assert str(results["said"]) == mlx_lm.generate(
        model, tokenizer, prompt="the film is", max_tokens=3
    )


def test_without_bitdistill_the_architecture_is_refused(mlx_artifact: Artifact) -> None:
    """A loader that would drop the norms of SubLN must fail, and say what it does not know."""
    program = PLAIN.replace(", trust_remote_code=True", "")
    path = mlx_artifact("qwen3", "paper", 8)[1]
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=120
    )
    assert "Model type bitdistill_qwen3 not supported" in done.stderr


def test_a_stock_model_in_half_precision_is_warned_about(mlx_artifact: Artifact) -> None:
    from mlx_lm import utils

    half = mlx_artifact("llama", "none", None)[1]
    read = mlx_commands.without_model_file(utils.load_config)
    with pytest.warns(UserWarning, match="computes in float16.*--dtype float32 first"):
        read(half)
    assert "model_file" not in read(mlx_artifact("qwen3", "paper", 8)[1])


def test_a_directory_that_is_not_made_for_mlx_is_explained(
    mlx_artifact: Artifact, tmp_path: Path
) -> None:
    """But a teacher is a model like any other."""
    from mlx_lm import utils

    student = mlx_artifact("llama", "none", None)[0]
    read = mlx_commands.without_model_file(utils.load_config)
    with pytest.raises(ValueError, match=r"training directory; .*export .* --target mlx --out"):
        read(student)
    onnx = exporters.export(student, "onnx", tmp_path / "onnx")
    with pytest.raises(ValueError, match="is made for onnx, not mlx; export the student"):
        read(onnx)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text('{"model_type": "llama"}')
    manifest.write_manifest(teacher, "teacher", {})
    assert read(teacher) == {"model_type": "llama"}


@pytest.mark.parametrize("flag", ["--trust-remote-code", "--trust", "--tru", "--trust-remote=1"])
def test_no_spelling_of_the_flag_runs_code(flag: str) -> None:
    """argparse takes any beginning that is unambiguous."""
    with pytest.raises(ValueError, match="runs no code from a model's directory"):
        mlx_commands.run("generate", ["--model", "DIR", flag])
    assert not any(map(mlx_commands._trusts, ["--train", "--temp", "--top-p", "--", "-t", "trust"]))
