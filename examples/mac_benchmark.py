"""Speed, memory and parity of an MLX artifact on a Mac, as a table to paste into an issue.

NOT RUN BY THE MAINTAINERS on Apple hardware: none was at hand. Whatever it prints there is news,
and welcome. On Linux it runs too, slowly, which is how it is tested.

    pip install .          # in a clone of the repository
    python examples/mac_benchmark.py runs/mine/mlx --base Qwen/Qwen3-0.6B

`--base` is the model that the student was made from, a directory or a name on the hub. mlx-lm
converts it to bfloat16 and to 4 bits in a temporary directory, and all three are timed alike, each
in a fresh process: random tokens in (prefill), then tokens one by one (decode), by mlx-lm's own
generation loop. Memory is MLX's own peak. Parity compares the artifact as MLX runs it here with
the same file multiplied by bitdistill's exact integer kernels on the CPU in fp32, on passages of
text.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WARMUP = 16
LENGTH = 64  # tokens of a sequence that parity is measured on
PASSAGES = (
    "The harbour freezes late in the year. Until then the ferries leave twice a day, and the post "
    "arrives with the first of them, unless the wind is from the north.",
    "Question: A train leaves at nine and travels for two hours and forty minutes. When does it "
    "arrive?\nAnswer: At twenty to twelve.",
    "The film takes its time, and every minute is well spent: the acting is quiet, the pictures "
    "are bright, and the ending is neither happy nor sad.\nVerdict: positive",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n",
)


def measure(path: str, prompt_tokens: int, decode_tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second and peak memory (MiB) of one model, in this process."""
    import mlx.core as mx
    import mlx_lm
    from mlx_lm.generate import generate_step

    import bitdistill  # noqa: F401  (registers the student's architecture)

    # the architecture is installed, so a `model_file` of the directory is not run
    model, tokenizer = mlx_lm.load(path, model_config={"model_file": None})
    random = np.random.default_rng(0)
    prompt = mx.array(random.integers(0, tokenizer.vocab_size, prompt_tokens))
    prefill, decode = [], []
    for repeat in range(repeats + 1):
        tokens = WARMUP if repeat == 0 else decode_tokens
        start = time.perf_counter()
        steps = generate_step(prompt, model, max_tokens=tokens + 1)
        next(steps)
        first = time.perf_counter()
        for _ in steps:
            pass
        end = time.perf_counter()
        if repeat > 0:  # the first one compiles kernels
            prefill.append(prompt_tokens / (first - start))
            decode.append(tokens / (end - first))
    return {
        "prefill": statistics.median(prefill),
        "decode": statistics.median(decode),
        "memory": mx.get_peak_memory() / 2**20,
    }


def parity(path: str) -> dict[str, float]:
    """Top-token agreement, and median error relative to the logits' spread, against exact fp32."""
    from bitdistill import backends

    ours = backends.load(path, products="mlx")
    exact = backends.load(path, products="cpu", dtype="float32")
    length = min(LENGTH, exact.context)
    tokens = [exact.tokenizer.encode(text)[:length] for text in PASSAGES]
    found, expected = (np.concatenate(model.logits(tokens)) for model in (ours, exact))
    errors = np.sqrt(np.square(found - expected).mean(-1)) / expected.std(-1)
    same = found.argmax(-1) == expected.argmax(-1)
    return {"agreement": 100 * float(same.mean()), "error": float(np.median(errors))}


def convert(base: str, folder: Path) -> dict[str, str]:
    """The base model in bfloat16 and in 4 bits; directories by name."""
    made = {}
    for name, options in (("bf16", ["--dtype", "bfloat16"]), ("4-bit", ["-q", "--q-bits", "4"])):
        made[name] = str(folder / name)
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", base]
        subprocess.run(
            [*command, "--mlx-path", made[name], *options], check=True, stdout=sys.stderr
        )
    return made


def in_fresh_process(arguments: argparse.Namespace, path: str) -> dict[str, Any]:
    """`measure` in a process of its own, so that its peak memory is its own."""
    numbers = [f"--{name}={getattr(arguments, name)}" for name in ("prompt", "decode", "repeats")]
    command = [sys.executable, __file__, path, "--only", *numbers]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:  # its own words went to the standard error
        sys.exit(f"{path} could not be measured; the error is above")
    return json.loads(done.stdout)


def size_of(path: str) -> float:
    """MiB of a directory's weights."""
    return sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) / 2**20


def render(rows: dict[str, dict[str, float]], check: dict[str, float], machine: str) -> str:
    """A Markdown table and what it was measured on."""
    lines = [
        "| Model | Prefill (tok/s) | Decode (tok/s) | Peak memory (MiB) | Weights (MiB) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        figures = [f"{row[key]:,.1f}" for key in ("prefill", "decode", "memory", "size")]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    lines += [
        "",
        f"Parity with exact fp32: top token agrees at {check['agreement']:.1f} % of positions, "
        f"median error {check['error']:.1e} of the logits' spread.",
        "",
        machine,
    ]
    return "\n".join(lines)


def machine() -> str:
    """Chip, system and versions."""
    import mlx.core as mx

    device = mx.device_info().get("device_name", platform.machine())
    packages = ", ".join(f"{name} {version(name)}" for name in ("mlx", "mlx-lm", "bitdistill"))
    return f"{device}, {platform.platform()}, Python {platform.python_version()}, {packages}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", help="an MLX artifact (bitdistill export --target mlx)")
    parser.add_argument("--base", help="its base model, for the bf16 and 4-bit rows")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=128, help="tokens generated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", action="store_true", help="print one model's figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    options = parse(arguments)
    if options.only:
        numbers = (options.prompt, options.decode, options.repeats)
        print(json.dumps(measure(options.artifact, *numbers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = {"bitdistill": options.artifact}
        if options.base is not None:
            paths |= convert(options.base, Path(folder))
        rows = {
            name: in_fresh_process(options, path) | {"size": size_of(path)}
            for name, path in paths.items()
        }
    print(render(rows, parity(options.artifact), machine()))


if __name__ == "__main__":
    main()
