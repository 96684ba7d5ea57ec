"""`bitdistill eval` on an ONNX artifact beside a loop over PyTorch, sentence by sentence.

    python benchmarks/eval_throughput.py runs/smollm2/onnx runs/smollm2/teacher \\
        --data validation.jsonl --threads 2 --parts 3 --part 0 --out throughput.jsonl

The command is timed from its start to its end, with an empty store. The loop, in fp32, asks the
model for the logits after each prompt, one prompt at a time; its prompts are encoded and its model
loaded before the clock starts. `--part` takes every `--parts`-th sentence for the loop, so that
calls alternate the two. Prints one JSON line: seconds of each, and of the command those spent in
the backend's own operations (`compute`) and in loading model and tokenizer (`load`). `overhead` is
the share of the rest, `overhead_with_load` that of everything but `compute`. `bare` are seconds of
the same batches, asked of the loaded artifact by a process that does nothing else, and
`overhead_over_bare` compares the whole command with that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from lines import put


def evaluate(artifact: Path, data: Path, threads: int) -> dict[str, Any]:
    """Seconds of one `bitdistill eval`, and what its own clocks say."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        command = [sys.executable, "-m", "bitdistill", "eval", str(artifact), "--no-speed"]
        command += ["--data", str(data), "--threads", str(threads), "--format", "markdown"]
        command += ["--store", str(Path(folder) / "store"), "--out", str(out)]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        wall = time.perf_counter() - start
        result = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    seconds = result["settings"]["seconds"]
    compute, load = seconds["compute"], seconds["load"]
    return {
        "eval_seconds": round(wall, 3), "compute": round(compute, 3), "load": round(load, 3),
        "accuracy": result["value"], "examples": result["n"],
        "overhead": round(1 - (compute + load) / wall, 4),
        "overhead_with_load": round(1 - compute / wall, 4),
    }  # fmt: skip


def bare(artifact: Path, data: Path, threads: int, size: int = 16) -> dict[str, Any]:
    """Seconds of the artifact's logits after every prompt, in the batches of `bitdistill eval`."""
    from bitdistill import backends
    from bitdistill.backends.base import pad
    from bitdistill.tasks import Task, load_examples

    model = backends.load(artifact, threads=threads)
    examples = load_examples(Task.from_json(model.manifest["task"]), data, data.stem)
    prompts = model.tokenizer.encode_all([example.prompt for example in examples])
    prompts.sort(key=len, reverse=True)
    start = time.perf_counter()
    for first in range(0, len(prompts), size):
        batch = prompts[first : first + size]
        lengths = np.array([len(prompt) for prompt in batch])
        model.logits_at(pad(batch), lengths, np.array(list(enumerate(lengths - 1))))
    return {"bare": round(time.perf_counter() - start, 3)}


def loop(directory: Path, data: Path, threads: int, part: int, parts: int) -> dict[str, Any]:
    """Seconds of the loop over its share of the sentences."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bitdistill import manifest
    from bitdistill.tasks import Task, load_examples

    torch.set_num_threads(threads)
    task = Task.from_json(manifest.read_manifest(directory)["task"])
    examples = load_examples(task, data, data.stem)[part::parts]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    labels = [tokenizer.encode(label, add_special_tokens=False)[0] for label in task.labels]
    prompts = [tokenizer(e.prompt, return_tensors="pt").input_ids for e in examples]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        model(prompts[0], logits_to_keep=1)  # the first call allocates
        start = time.perf_counter()
        said = [int(model(p, logits_to_keep=1).logits[0, -1, labels].argmax()) for p in prompts]
        wall = time.perf_counter() - start
    right = sum(a == e.label for a, e in zip(said, examples, strict=True))
    return {"loop_seconds": round(wall, 3), "loop_examples": len(examples), "loop_right": right}


def main() -> None:
    import bitdistill  # noqa: F401  (students load through AutoModelForCausalLM)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("directory", type=Path, help="of the PyTorch model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    line = {"directory": given.directory.name, "threads": given.threads}
    line |= evaluate(given.artifact, given.data, given.threads)
    line |= bare(given.artifact, given.data, given.threads)
    line["overhead_over_bare"] = round(1 - line["bare"] / line["eval_seconds"], 4)
    line |= loop(given.directory, given.data, given.threads, given.part, given.parts)
    line["speedup"] = round(
        line["loop_seconds"] / line["loop_examples"] * line["examples"] / line["eval_seconds"], 3
    )
    put(line, given.out)


if __name__ == "__main__":
    main()
