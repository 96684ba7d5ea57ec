"""Speed and memory of ONNX artifacts of a real model's shape, with random weights.

    python benchmarks/onnx_decoder.py --shape qwen3-0.6b --work runs/bench --threads 2 \\
      --embed-bits 8 4 --kv-bits 16 8 --out docs/results/onnx-decoder.jsonl

Makes a student (random_student.py) and an artifact for every combination of options, or takes those
in --work already, and appends JSON lines. With --classifiers there is one of every width of weights
and cache as well, whose memory alone is measured. Stock --ops need --kv-bits 32.

decode   milliseconds a token at a position: rounds over all artifacts in turn, the median of a
         round's tokens, then the median of rounds; `ratio` to the first position, by round too;
         `roofline` the share of the time that reading body and head once takes, at the bandwidth
         that the same run measured
prefill  tokens a second of one prompt, fed in the runtime's own chunks, as a user's is
memory   of a fresh process that runs 128 token ids and decodes 4, less a process that has imported
         onnxruntime and run a small session; without the cache (`cache_mb`) and the tokenizer. MB
         are 1e6 bytes. `file_mb`: model and weights, not the embedding of a classifier
score    with --score N ...: as `memory`, of a process that scores N prompts of 128 tokens with the
         task's two answers, as `bitdistill eval` does, 16 at a time; `seconds` of the last of three
growth   with --generate N: resident memory of one process by the likeliest tokens it has generated,
         1,000 after each prompt of 128; the cache is resident from the start, and counted
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lines import put

PROMPT, DECODED, STEPS = 128, 4, 8
MULTIPLIER = 48271  # of the tokens' generator: numpy.random would be counted as the model's memory
SEQUENCE, GROWTH = 1000, (1000, 5000)
POSITIONS, PREFILL = (128, 512, 900), (128, 512)
OPS = {"custom": "", "portable": "-portable", "integer": "-integer"}  # in an artifact's name
PAUSE = 0.1  # seconds in which the threads of the artifact before stop waiting for more work


def tokens(count: int, vocabulary: int) -> list[int]:
    """Arbitrary token ids."""
    return [index * MULTIPLIER % vocabulary for index in range(1, count + 1)]


def memory(artifact: Path, threads: int, small: Path, prompts: int) -> dict[str, float]:
    """What a process of its own needs, in MB, to generate or to score prompts; called in it."""
    import numpy as np
    import onnxruntime

    from bitdistill.evals.environment import peak_memory

    session = onnxruntime.InferenceSession(str(small))
    session.run(None, {"a": np.zeros(4, np.float32)})
    bare = peak_memory()
    from bitdistill import backends
    from bitdistill.backends import kv_cache

    runtime: Any = backends.load(artifact, threads=threads, verify=False)
    loaded = peak_memory()
    figures, held = {}, 0
    if prompts:
        figures = {"seconds": [score(runtime, prompts) for _ in range(3)][-1]}
    else:
        fed = tokens(PROMPT + DECODED, runtime.vocabulary)
        cache = runtime.new_cache(len(fed))
        runtime.prefill(fed[:PROMPT], cache)
        for token in fed[PROMPT:]:
            runtime.step([token], cache)
        held = kv_cache.position_bytes(runtime.spec, runtime.kv_bits) * len(fed)
    mb = 2**20 / 1e6  # peak_memory is in MiB
    return figures | {
        "load_mb": round((loaded - bare) * mb, 1),
        "net_mb": round((peak_memory() - bare) * mb - held / 1e6, 1),
        "cache_mb": round(held / 1e6, 2),
    }


def score(runtime: Any, prompts: int) -> float:
    """Seconds of two answers of a token for each prompt."""
    fed = tokens(PROMPT * prompts, runtime.vocabulary)
    answers = runtime.labels or [0, 1]
    parts = [fed[start : start + PROMPT] for start in range(0, len(fed), PROMPT)]
    start = time.perf_counter()
    runtime.score([(part, [answer]) for part in parts for answer in answers])
    return round(time.perf_counter() - start, 3)


def fresh_memory(artifact: Path, threads: int, work: Path, prompts: int = 0) -> dict[str, float]:
    """`memory` in a fresh process."""
    import onnx
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "ab"]
    graph = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "g", values[:1], values[1:])
    opset = [helper.make_opsetid("", 21)]
    small = work / "small.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), small)
    options = ["--threads", str(threads), "--work", str(work), "--score", str(prompts)]
    return in_process("--memory-of", str(artifact), *options)


def in_process(*options: str) -> dict[str, Any]:
    """What this script prints with `options`, in a fresh process."""
    command = [sys.executable, __file__, *options]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = json.loads(answer.stdout)
    return figures


def resident() -> float:
    """Resident memory of this process, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmRSS:")[1].split()[0]) * 1024 / 1e6


def growth(artifact: Path, threads: int, count: int) -> dict[str, Any]:
    """Resident memory by the number of tokens generated; called in a process of its own."""
    from bitdistill import backends
    from bitdistill.backends.onnx_runtime import OnnxCache

    runtime: Any = backends.load(artifact, threads=threads, verify=False)
    memory = runtime.empty(1, PROMPT + SEQUENCE)
    memory[:] = 0  # an array of zeros is resident where it was written
    cache = OnnxCache(runtime, PROMPT + SEQUENCE, memory=memory)
    at = {DECODED, count, *(n for n in GROWTH if n < count)}
    found, start = {}, time.perf_counter()
    for made in range(count):
        if made % SEQUENCE == 0:
            cache.lengths[:] = 0
            logits = runtime.prefill(tokens(PROMPT, runtime.vocabulary), cache)
        logits = runtime.step([int(logits.argmax())], cache)
        if made + 1 in at:
            found[str(made + 1)] = round(resident(), 1)
    seconds = round(time.perf_counter() - start, 1)
    return {"resident_mb": found, "cache_mb": round(memory.nbytes / 1e6, 1), "seconds": seconds}


def make_artifacts(arguments: argparse.Namespace, classifiers: bool) -> dict[str, Path]:
    """An artifact, or a classifier, for every combination of options, by its name."""
    from random_student import TASK, make

    from bitdistill import exporters

    student, found = arguments.work / arguments.shape, {}
    tables: dict[str, dict[str, Any]] = {
        f"embed{b}": {"embed_bits": b} for b in arguments.embed_bits
    }
    if classifiers:
        tables = {"classifier": {"task": TASK.name}}
    grid = itertools.product(tables, arguments.ops, arguments.kv_bits, arguments.weight_bits)
    for table, ops, kv, weight in grid:
        name = f"{arguments.shape}-{table}-kv{kv}-weight{weight:g}{OPS[ops]}"
        found[name] = arguments.work / name
        if not found[name].exists():
            make(arguments.shape, student)
            options = tables[table] | {"kv_bits": kv, "weight_bits": weight, "ops": ops}
            exporters.export(student, "onnx", found[name], **options)
    return found


class Timed:
    """A loaded artifact with a full cache."""

    def __init__(self, artifact: Path, threads: int) -> None:
        from bitdistill import backends

        self.runtime: Any = backends.load(artifact, threads=threads, verify=False)
        self.fed = tokens(max(POSITIONS) + STEPS, self.runtime.vocabulary)
        self.cache = self.runtime.new_cache(len(self.fed))
        self.runtime.prefill(self.fed[: max(POSITIONS)], self.cache)
        self.rounds: dict[tuple[str, int], list[float]] = defaultdict(list)

    def round(self, seconds: float) -> None:
        """Time each figure once; prompts while `seconds` of them have not been spent."""
        time.sleep(PAUSE)
        for position in POSITIONS:
            self.cache.lengths[:] = position
            steps = []
            for token in self.fed[position : position + STEPS]:
                start = time.perf_counter()
                self.runtime.step([token], self.cache)
                steps.append(time.perf_counter() - start)
            self.rounds["decode", position].append(statistics.median(steps))
        for count in PREFILL:
            spent = self.rounds["prefill", count]
            if sum(spent) < seconds:
                cache = self.runtime.new_cache(count)
                start = time.perf_counter()
                self.runtime.prefill(self.fed[:count], cache)
                spent.append(time.perf_counter() - start)


def speed(artifacts: dict[str, Path], threads: int, seconds: float) -> Iterable[dict[str, Any]]:
    """Lines of decode and prefill, rounds in turn for `seconds` each artifact."""
    from bitdistill import manifest
    from bitdistill.backends.kernels.bench.ceilings import read_rate

    rates = [read_rate(threads)]
    timed = {name: Timed(path, threads) for name, path in artifacts.items()}
    end = time.perf_counter() + seconds * len(timed)
    while time.perf_counter() < end:
        for one in timed.values():
            one.round(seconds / 4)
    rates.append(read_rate(threads))
    for name, one in timed.items():
        parts = manifest.read_manifest(artifacts[name], "artifact")["parts"]
        head = parts["head"] or parts["embedding"]
        for (what, count), times in one.rounds.items():
            line: dict[str, Any] = {"artifact": name, "benchmark": what, "threads": threads}
            if what == "prefill":
                figures = {"tokens": count, "tokens_per_second": count / statistics.median(times)}
                yield line | figures | {"fastest": count / min(times), "rounds": len(times)}
                continue
            first = one.rounds["decode", POSITIONS[0]]
            yield line | {
                "position": count,
                "ms": 1e3 * statistics.median(times),
                "fastest_ms": 1e3 * min(times),
                "ratio": statistics.median(b / a for a, b in zip(first, times, strict=True)),
                "roofline": (parts["body"] + head) / max(rates) / statistics.median(times),
                "read_gb_per_second": max(rates) / 1e9,
                "rounds": len(times),
            }


def lines(arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """All lines, with the machine they were measured on."""
    from bitdistill.backends.kernels.binding import Kernels
    from bitdistill.evals.environment import machine, versions

    artifacts = make_artifacts(arguments, classifiers=False)
    classifiers = make_artifacts(arguments, classifiers=True) if arguments.classifiers else {}
    where = {"isa": Kernels().isa, "machine": machine(), "versions": versions()}
    for name, path in (artifacts | classifiers).items():
        size = sum(f.stat().st_size for f in (path / "model.onnx", path / "model.onnx.data"))
        figures = fresh_memory(path, arguments.threads, arguments.work)
        line = {"artifact": name, "benchmark": "memory", "threads": arguments.threads}
        yield line | figures | {"file_mb": round(size / 1e6, 1)} | where
        for count in arguments.score:
            figures = fresh_memory(path, arguments.threads, arguments.work, count)
            yield line | {"benchmark": "score", "prompts": count} | figures | where
        if arguments.generate and name in artifacts:
            options = ["--generate", str(arguments.generate), "--threads", str(arguments.threads)]
            figures = in_process("--growth-of", str(path), *options, "--work", str(arguments.work))
            yield line | {"benchmark": "growth"} | figures | where
    for line in speed(artifacts, arguments.threads, arguments.seconds):
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}
        yield rounded | where


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--work", type=Path, required=True, help="where students and artifacts are")
    parser.add_argument("--embed-bits", type=int, nargs="+", default=[8])
    parser.add_argument("--classifiers", action="store_true", help="measure their memory as well")
    parser.add_argument("--ops", choices=OPS, nargs="+", default=["custom"])
    parser.add_argument("--kv-bits", type=int, nargs="+", default=[16])
    parser.add_argument("--weight-bits", type=float, nargs="+", default=[2.0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each artifact's rounds")
    parser.add_argument("--out", type=Path, help="file to append to; stdout has the lines as well")
    parser.add_argument("--generate", type=int, default=0, help="tokens, for growth")
    parser.add_argument("--score", type=int, nargs="+", default=[], help="numbers of prompts")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--growth-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if arguments.memory_of:
        small, [prompts] = arguments.work / "small.onnx", arguments.score
        figures = memory(arguments.memory_of, arguments.threads, small, prompts)
        print(json.dumps(figures))
        return
    if arguments.growth_of:
        print(json.dumps(growth(arguments.growth_of, arguments.threads, arguments.generate)))
        return
    for line in lines(arguments):
        put(line, arguments.out)


if __name__ == "__main__":
    main()
