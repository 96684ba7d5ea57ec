"""An MLX artifact on a machine without Metal, in turn with a dense fp32 model under OpenBLAS.

    python benchmarks/random_student.py --shape smollm2-135m --out runs/random-135m
    bitdistill export runs/random-135m --target mlx --out runs/random-135m-mlx --no-parity
    python benchmarks/mlx_linux.py runs/random-135m-mlx --shape smollm2-135m

The dense model is mlx-lm's own of that shape, random fp32 weights, without the norms and roundings
that a student adds. MLX's wheel for Linux brings a slow reference BLAS, so its process preloads
OpenBLAS (Debian: libopenblas0). Each has a process of its own; rounds alternate. Prints JSON lines:
median tokens/s; `ratio`, ours over dense, the median of the rounds' ratios, and `quartiles` of
these; and `ratio_of_best`, of the fastest rounds, which others on the machine disturb least.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
from shapes import SHAPES

PREFILL, DECODE, BATCH, LENGTH = 128, 16, 16, 64
TOKENS = {"prefill": PREFILL, "decode": DECODE, "batch": BATCH * LENGTH}
REST = 0.3  # seconds: threads of a BLAS keep spinning for a while after their work
Work = Callable[[], Any]


def artifact_works(path: Path) -> dict[str, Work]:
    """What is timed, through our runtime."""
    from bitdistill import backends

    model: Any = backends.load(path)
    one, many = tokens_of(model.vocabulary)
    rows = np.array([(b, LENGTH - 1) for b in range(BATCH)])
    lengths = np.full(BATCH, LENGTH)

    def decode() -> None:
        cache = model.new_cache(8 + DECODE)
        model.step(one[:8], cache)
        for token in one[:DECODE]:
            model.step([token], cache)

    return {
        "prefill": lambda: model.step(one, model.new_cache(PREFILL)),
        "decode": decode,
        "batch": lambda: model.logits_at(many, lengths, rows),
    }


def dense_works(shape: str) -> dict[str, Work]:
    """The same through mlx-lm and a dense fp32 model."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import _get_classes

    config = dict(SHAPES[shape]) | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    mx.eval(model.parameters())
    one, many = tokens_of(config["vocab_size"])

    def last(hidden: Any) -> Any:
        head = model.model.embed_tokens.as_linear
        return mx.eval(head(hidden[:, -1]))

    def step(tokens: list[int], cache: Any) -> None:
        last(model.model(mx.array([tokens]), cache=cache))

    def decode() -> None:
        cache = make_prompt_cache(model)
        step(one[:8], cache)
        for token in one[:DECODE]:
            step([token], cache)

    return {
        "prefill": lambda: step(one, make_prompt_cache(model)),
        "decode": decode,
        "batch": lambda: last(model.model(mx.array(many.astype(np.int32)))),
    }


def tokens_of(vocabulary: int) -> tuple[list[int], np.ndarray]:
    """A prompt, and a batch of them."""
    random = np.random.default_rng(0)
    many = random.integers(0, vocabulary, (BATCH, LENGTH))
    return random.integers(0, vocabulary, PREFILL).tolist(), many


def serve(works: dict[str, Work]) -> None:
    """Do what each line of the standard input names; answer with the seconds."""
    for work in works.values():
        work()  # warm
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        works[line.strip()]()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """One of the two processes."""

    def __init__(self, *arguments: str, preload: str | None = None) -> None:
        more = {} if preload is None else {"LD_PRELOAD": preload}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | more,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin, self.process.stdout
        if self._out.readline().strip() != "ready":
            raise RuntimeError(f"the worker {arguments} did not start")

    def seconds(self, what: str) -> float:
        time.sleep(REST)
        self._in.write(what + "\n")
        self._in.flush()
        return float(self._out.readline())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--blas", default=find_library("openblas"), help="library to preload")
    parser.add_argument("--serve", choices=["artifact", "dense"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        dense = options.serve == "dense"
        serve(dense_works(options.shape) if dense else artifact_works(options.artifact))
        return
    if options.blas is None:
        parser.error("OpenBLAS was not found; install it (Debian: libopenblas0) or give --blas")
    common = (str(options.artifact), "--shape", options.shape)
    ours = Worker(*common, "--serve", "artifact")
    dense = Worker(*common, "--serve", "dense", preload=options.blas)
    for what, count in TOKENS.items():
        pairs = [(ours.seconds(what), dense.seconds(what)) for _ in range(options.rounds)]
        mine, theirs = zip(*pairs, strict=True)
        ratios = [b / a for a, b in pairs]
        lower, _, upper = statistics.quantiles(ratios, n=4)
        record = {
            "benchmark": f"mlx-linux-{what}",
            "shape": options.shape,
            "tokens": count,
            "tokens_per_second": round(count / statistics.median(mine), 1),
            "dense_tokens_per_second": round(count / statistics.median(theirs), 1),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(lower, 3), round(upper, 3)],
            "ratio_of_best": round(min(theirs) / min(mine), 3),
            "rounds": options.rounds,
            "blas": Path(options.blas).name,
            "cores": os.cpu_count(),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
