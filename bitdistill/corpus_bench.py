"""How many tokens a second a corpus yields: `python -m bitdistill.corpus_bench MODEL SOURCE...`.

MODEL is a directory with a tokenizer, SOURCE whatever `corpus.sources` takes. For each number of
workers one JSON line: the seconds until the first window and until the first window of a resumed
run, and the tokens per second in between, with a consumer that does nothing else. Training never
waits for data where it asks for fewer.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import closing
from typing import Any

from bitdistill.config import load_config
from bitdistill.data import PackedBatches
from bitdistill.distributed import World
from bitdistill.feeds import corpus_batches
from bitdistill.schema import Training


def measure(batches: PackedBatches, again: PackedBatches, steps: int) -> dict[str, Any]:
    """Seconds and tokens per second over `steps` windows; `again` resumes behind them."""
    with closing(batches), closing(again):
        start = time.perf_counter()
        batches.window(0)
        first = time.perf_counter()
        tokens = sum(b["input_ids"].numel() for s in range(steps) for b in batches.window(s + 1))
        end = time.perf_counter()
        again.restore(batches.state())
        again.window(steps + 1)
        resumed = time.perf_counter() - end
    return {
        "start_seconds": round(first - start, 2),
        "resume_seconds": round(resumed, 2),
        "tokens": tokens,
        "tokens_per_second": round(tokens / (end - first)),
    }


def main() -> None:
    """Print one JSON line per number of workers."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for workers in options.workers:
        settings = [f"corpus.sources={json.dumps(options.sources)}", f"machine.workers={workers}"]
        config = load_config("tiny", settings)
        size = Training(steps=1, batch_size=options.batch_size, max_length=options.length)
        batches, again = (corpus_batches(config, size, tokenizer, World()) for _ in range(2))
        found = measure(batches, again, options.steps)
        print(json.dumps({"workers": workers} | found), flush=True)


if __name__ == "__main__":
    main()
