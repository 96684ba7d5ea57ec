"""mlx-lm's own programs on our artifacts, through `bitdistill mlx`, each in its own process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_parity import sequences

Artifact = Callable[..., tuple[Path, Path]]
TEXT = "the film is not good but we liked it"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "bitdistill", "mlx", name, *map(str, arguments)]


def run(name: str, *arguments: object) -> str:
    """`bitdistill mlx NAME ...`; its stdout."""
    done = subprocess.run(command(name, *arguments), capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_generate_runs_no_code_from_the_directory(mlx_artifact: Artifact, tmp_path: Path) -> None:
    _, path = mlx_artifact("qwen3", "paper", 8, options={"model_file": True})
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "bitdistill_model.py").write_text("raise SystemExit('code was run')\n")
    assert run("generate", "--model", copy, "--prompt", "the film", "--max-tokens", 3).strip()
    refused = subprocess.run(
        command("generate", "--model", copy, "--trust-remote-code"), capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "bitdistill runs no code from a model's directory" in refused.stderr


@pytest.mark.slow
def test_convert_changes_the_type_of_all_but_the_codes(
    mlx_artifact: Artifact, tmp_path: Path
) -> None:
    """bfloat16 holds D and the codes exactly, so only embedding and norms are rounded."""
    _, path = mlx_artifact("qwen3", "paper", 8)
    run("convert", "--model", path, "--mlx-path", tmp_path / "out", "--dtype", "bfloat16")
    before, after = (mx.load(str(p / "model.safetensors")) for p in (path, tmp_path / "out"))
    assert set(before) == set(after)
    for name, array in after.items():
        assert array.dtype == (mx.uint32 if before[name].dtype == mx.uint32 else mx.bfloat16)
        if name.endswith((".scales", ".biases", "proj.weight")):
            assert mx.array_equal(array.astype(before[name].dtype), before[name]), name
    tokens = mx.array(sequences())
    first, second = (mlx_lm.load(str(p))[0](tokens) for p in (path, tmp_path / "out"))
    assert mx.mean(first.argmax(-1) == second.argmax(-1)).item() > 0.8


def losses(path: Path, adapter: Path | None) -> float:
    """Mean cross-entropy of TEXT."""
    model, tokenizer = mlx_lm.load(str(path), adapter_path=adapter and str(adapter))
    tokens = np.array(tokenizer.encode(TEXT))
    logits = np.array(model(mx.array(tokens[None])))[0, :-1].astype(np.float64)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-logits[np.arange(len(tokens) - 1), tokens[1:]].mean())


@pytest.mark.slow
def test_lora_trains_and_its_adapter_loads(mlx_artifact: Artifact, tmp_path: Path) -> None:
    """Gradients reach the first layer through the rounding of all later activations."""
    _, path = mlx_artifact("qwen3", "paper", 8)
    for name in ("train", "valid"):
        rows = [json.dumps({"text": TEXT})] * 8
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    adapter = tmp_path / "adapter"
    run("lora", "--model", path, "--train", "--data", tmp_path, "--adapter-path", adapter,
        "--iters", 12, "--num-layers", 2, "--batch-size", 2, "--val-batches", 1,
        "--learning-rate", 1e-2)  # fmt: skip
    tuned = mx.load(str(adapter / "adapters.safetensors"))
    assert mx.abs(tuned["model.layers.0.self_attn.q_proj.lora_b"]).max().item() > 0
    assert losses(path, adapter) < 0.8 * losses(path, None)


@contextmanager
def server(path: Path) -> Iterator[str]:
    """`bitdistill mlx server` on a free port of the loopback; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ("--model", path, "--port", port, "--chat-template", TEMPLATE)
    process = subprocess.Popen(command("server", *arguments), stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None, "the server ended"
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_server_answers_a_chat_completion(mlx_artifact: Artifact) -> None:
    _, path = mlx_artifact("qwen3", "paper", 8)
    messages = [{"role": "user", "content": "the film is"}]
    body = json.dumps({"messages": messages, "max_tokens": 5, "temperature": 0}).encode()
    with server(path) as address:
        request = urllib.request.Request(
            f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
    model, tokenizer = mlx_lm.load(str(path))
    expected = mlx_lm.generate(model, tokenizer, prompt="the film is", max_tokens=5)
    assert answer["usage"]["completion_tokens"] == 5
    assert answer["choices"][0]["message"]["content"].strip() == expected.strip()


def test_export_takes_mlx_options(student_dir: Callable[..., Path], tmp_path: Path) -> None:
    from click.testing import CliRunner

    from bitdistill.cli import main

    student, out = student_dir("llama", "none", 8), tmp_path / "out"
    options = ["--activation-bits", "none", "--dtype", "bfloat16", "--embed-bits", "8"]
    command = ["export", str(student), "--target", "mlx", "--out", str(out), "--no-parity"]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 0, done.output
    assert "bits per weight: body 2.600, embedding 8.500" in done.stderr
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    scales = mx.load(str(out / "model.safetensors"))["model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == mx.bfloat16
