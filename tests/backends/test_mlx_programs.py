"""mlx-lm's own programs on our artifacts, through `bitdistill mlx`, each in its own process."""

from __future__ import annotations

import json
import shutil
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
import torch
from mlx_lm.models import cache as caches
from mlx_parity import CLOSE, sequence_errors, sequences, torch_logits

Artifact = Callable[..., tuple[Path, Path]]
PROMPT = "the film is"
TEXT = "the film is not good but we liked it"
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def talker(mlx_artifact: Artifact) -> Path:
    """An artifact that says many tokens; with tied embeddings random models repeat one."""
    options = {"model_file": True}
    return mlx_artifact("qwen3", "paper", 8, options=options, tie_word_embeddings=False)[1]


def expected(path: Path, prompt: str, tokens: int = 8, **how: Any) -> str:
    """What mlx-lm answers in this process."""
    model, tokenizer = mlx_lm.load(str(path), model_config={"model_file": None})
    return mlx_lm.generate(model, tokenizer, prompt=prompt, max_tokens=tokens, **how).strip()


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "bitdistill", "mlx", name, *map(str, arguments)]


def finish(program: list[str], typed: str = "") -> str:
    """What a program that is typed to wrote to stdout."""
    done = subprocess.run(program, input=typed, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run(name: str, *arguments: object) -> str:
    """`bitdistill mlx NAME ...`; its stdout."""
    return finish(command(name, *arguments))


def test_generate_runs_no_code_from_the_directory(mlx_artifact: Artifact, tmp_path: Path) -> None:
    _, path = mlx_artifact("qwen3", "paper", 8, options={"model_file": True})
    copy = shutil.copytree(path, tmp_path / "copy")
    (copy / "bitdistill_model.py").write_text("raise SystemExit('code was run')\n")
    assert run("generate", "--model", copy, "--prompt", "the film", "--max-tokens", 3).strip()
    refused = subprocess.run(
        command("generate", "--model", copy, "--trust-remote-code"), capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "bitdistill runs no code from a model's directory" in refused.stderr


@pytest.mark.slow
def test_plain_mlx_lm_generates_with_the_model_file(talker: Path) -> None:
    plain = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(talker)]
    said = finish([*plain, "--trust-remote-code", "--prompt", PROMPT, "--max-tokens", "8"])
    assert said.split("==========")[1].strip() == expected(talker, PROMPT)


@pytest.mark.slow
def test_chat_answers_two_turns(talker: Path, tmp_path: Path) -> None:
    """What was said before stays in the cache."""
    path = shutil.copytree(talker, tmp_path / "copy")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    turns = (PROMPT, "not good")
    typed = "".join(f"{turn}\n" for turn in (*turns, "q"))
    said = finish(command("chat", "--model", path, "--max-tokens", 8), typed)
    model, _ = mlx_lm.load(str(path), model_config={"model_file": None})
    cache = caches.make_prompt_cache(model)
    answers = [expected(path, turn, prompt_cache=cache) for turn in turns]
    assert answers[1] != expected(path, turns[1])
    start = 0
    for answer in answers:
        start = said.index(answer, start) + len(answer)
    assert said.count("8 tokens") == 2


@pytest.mark.slow
def test_a_stock_artifact_converted_to_float32_is_its_student(
    mlx_artifact: Artifact, tmp_path: Path
) -> None:
    """What a machine without Metal needs before it runs a stock artifact."""
    pair = mlx_artifact("qwen3", "none", None)
    run("convert", "--model", pair[1], "--mlx-path", tmp_path / "out", "--dtype", "float32")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    assert type(model).__module__ == "mlx_lm.models.qwen3"
    tokens = sequences(3, 24)
    reference = torch_logits(pair, tokens, torch.float32)
    assert sequence_errors(np.array(model(mx.array(tokens))), reference).max() < 10 * CLOSE


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


def post(address: str, **body: Any) -> str:
    """The answer to a request, as text."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.mark.slow
def test_server_answers_whole_and_streamed(talker: Path) -> None:
    how = {"max_tokens": 8, "temperature": 0}
    with server(talker) as address:
        messages = [{"role": "user", "content": PROMPT}]
        answer = json.loads(post(f"{address}/v1/chat/completions", messages=messages, **how))
        streamed = post(f"{address}/v1/completions", prompt=PROMPT, stream=True, **how)
    assert answer["usage"]["completion_tokens"] == 8
    assert answer["choices"][0]["message"]["content"].strip() == expected(talker, PROMPT)
    assert answer["choices"][0]["finish_reason"] == "length"
    lines = [line.removeprefix("data: ") for line in streamed.splitlines() if line[:5] == "data:"]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert len(pieces) > 2
    assert "".join(pieces).strip() == expected(talker, PROMPT)


@pytest.mark.slow
def test_server_stops_at_the_end_token(talker: Path, tmp_path: Path) -> None:
    """An artifact whose end token is one that it says after some others."""
    path = shutil.copytree(talker, tmp_path / "copy")
    model, tokenizer = mlx_lm.load(str(path), model_config={"model_file": None})
    said = [r.token for r in mlx_lm.stream_generate(model, tokenizer, PROMPT, max_tokens=8)]
    length = next(i for i, token in enumerate(said) if i > 2 and token not in said[:i])
    for name in ("config.json", "generation_config.json"):
        content = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(content | {"eos_token_id": said[length]}))
    with server(path) as address:
        how = {"max_tokens": 8, "temperature": 0}
        answer = json.loads(post(f"{address}/v1/completions", prompt=PROMPT, **how))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == length + 1  # the end itself counts
    text = answer["choices"][0]["text"].strip()  # half a character at its end is left out
    assert text == expected(talker, PROMPT, length).rstrip("\N{REPLACEMENT CHARACTER}")


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
