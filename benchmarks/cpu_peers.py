"""Our ONNX artifacts beside other CPU runtimes, on one model shape with random weights.

    python benchmarks/cpu_peers.py make models/peers
    python benchmarks/cpu_peers.py time --threads 2 --prompt 128 --out rates.jsonl \\
        ours-int8=models/peers/head-int8 ort-fp32=models/peers/onnx-fp32 \\
        tq2_0=TQ2_0.gguf,llama.cpp/llama-bench
    python benchmarks/cpu_peers.py show rates.jsonl

`make` writes the Qwen3-0.6B shape: a student's artifacts with an 8-bit and a 4-bit head, weights in
2 and 1.6 bits (`-base3`), and its full-precision model as a stock ONNX graph in fp32 and in 2 bits.
`time` loads all rows beside each other and times them in turn (evals/alternate.py): a prompt, then
tokens one by one. GGUF files run in the llama-bench given with them, which decodes from an empty
context; the other rows decode after the prompt, where a step costs more. One JSON line a row;
several calls append to one file. `show` takes medians over all rounds, and ratios within a round
of one call. `isa` is the instruction set of our kernels; that peers use no other is the caller's to
see to (for ONNX Runtime: avx2_only.py).

The share of the roofline is a token's bytes of body and head over the bandwidth that one read of
memory reached in the same call (`ceiling-read` of the kernels' benchmark).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SHAPE = "qwen3-0.6b"
CONTEXT = 4096  # tokens; the stock graphs hold tables of that many positions
BASELINES = ("fp32", "int2")
HEAD_BITS = (8, 4)
WEIGHT_BITS = {"": 2.0, "-base3": 1.6}
OF_A_CALL = ("isa", "threads", "prompt", "decode", "read_gbytes_per_s")
BUDGET = 600.0  # seconds a row may take in all; the number of rounds is what bounds it
CEILING_SECONDS = 0.5
Line = dict[str, Any]


def make(out: Path) -> None:
    """Write OUT/head-int8, -int8-base3, -int4 and -int4-base3, OUT/onnx-fp32 and -int2."""
    import torch
    from shapes import SHAPES
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitdistill import checkpoint, student
    from bitdistill.exporters import export
    from bitdistill.exporters.stock import export_stock
    from bitdistill.tiny import make_base

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPES[SHAPE] | {"max_position_embeddings": CONTEXT})
    teacher = AutoModelForCausalLM.from_config(config).eval()
    _, tokenizer = make_base(0)
    content = {
        "stage": "student", "method": "random", "base_model": "random", "family": "qwen3",
        "licence": "none", "norm_style": "paper", "activation_bits": 8, "task": None,
        "recipe": "none", "parent": None, "metrics": {},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(out / "teacher", teacher, tokenizer, "teacher", content, "# Random\n")
    model = student.make_student(teacher, "paper", 8)
    checkpoint.save(out / "student", model, tokenizer, "student", content, "# Random\n")
    del model, teacher
    for bits, (end, weight) in itertools.product(HEAD_BITS, WEIGHT_BITS.items()):
        options = {"embed_bits": bits, "weight_bits": weight}
        export(out / "student", "onnx", out / f"head-int{bits}{end}", **options)
    for kind in BASELINES:
        export_stock(out / "teacher", kind, out / f"onnx-{kind}")


def _job(row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What evals/alternate.py needs of `NAME=PATH[,LLAMA_BENCH]`."""
    name, _, rest = row.partition("=")
    path, _, program = rest.partition(",")
    files = [p for p in Path(path).rglob("*") if p.is_file()] or [Path(path)]
    plan = {
        "prefill_tokens": arguments.prompt, "decode_tokens": arguments.decode,
        "repeats": arguments.rounds, "budget": BUDGET,
    }  # fmt: skip
    return {
        "name": name, "path": path, "llama_bench": program or None, "load": {}, "seed": 0,
        "bytes": sum(p.stat().st_size for p in files), "threads": arguments.threads, "plan": plan,
    }  # fmt: skip


def _streamed_bytes(path: str) -> int | None:
    """Bytes of body and head that a token reads; None where the directory does not say."""
    manifest = Path(path) / "bitdistill.json"
    if not manifest.is_file():
        return None
    content = json.loads(manifest.read_text(encoding="utf-8"))
    if content.get("ops") != "custom":
        return None
    parts = content["parts"]
    return int(parts["body"] + (parts.get("head") or parts["embedding"]))


def _read_ceiling(threads: int) -> float:
    """GB/s of one read of memory."""
    from bitdistill.backends.kernels.bench.ceilings import read_rate

    return round(1e-9 * read_rate(threads, CEILING_SECONDS), 3)


def time(arguments: argparse.Namespace) -> Iterator[Line]:
    """One line for each row; WorkerError for one that cannot be timed."""
    from bitdistill.backends.kernels.binding import Kernels
    from bitdistill.evals.alternate import time_rows
    from bitdistill.evals.environment import machine

    jobs = [_job(row, arguments) for row in arguments.rows]
    ceiling = _read_ceiling(arguments.threads)
    for job, measured in zip(jobs, time_rows(jobs, _say), strict=True):
        speed, memory = measured["speed"], measured["memory"]
        yield {
            "row": job["name"], "isa": Kernels().isa, "threads": arguments.threads,
            "prompt": speed["prefill_tokens"], "decode": speed["decode_tokens"],
            "rounds": speed["rounds"],
            "memory_mib": round(memory["serve"] - memory["bare"], 1), "bytes": job["bytes"],
            "streamed_bytes": _streamed_bytes(job["path"]), "read_gbytes_per_s": ceiling,
            "versions": measured["facts"]["versions"], "processor": machine()["processor"],
        }  # fmt: skip


def _say(stage: str, done: int, total: int) -> None:
    print(f"{stage} {done}/{total}", file=sys.stderr)


def _calls(lines: Sequence[Line]) -> list[dict[str, Line]]:
    """The rows of each call: lines that follow each other, of one setting and different names."""
    calls: list[dict[str, Line]] = []
    settings: list[Any] = []
    for line in lines:
        last, settings = settings, [line[name] for name in OF_A_CALL]
        if last != settings or line["row"] in calls[-1]:
            calls.append({})
        calls[-1][line["row"]] = line
    return calls


def _rates(lines: Sequence[Line]) -> list[tuple[float, float]]:
    """(prefill, decode) of every round."""
    return [(prefill, decode) for line in lines for prefill, decode in line["rounds"]]


def _roofline(lines: Sequence[Line]) -> str:
    shares = [
        decode * line["streamed_bytes"] / line["read_gbytes_per_s"] * 1e-7
        for line in lines
        if line["streamed_bytes"]
        for _, decode in line["rounds"]
    ]
    return f"{statistics.median(shares):.0f} %" if shares else "–"


def show(lines: Sequence[Line]) -> str:
    """Markdown: a table for each instruction set, number of threads and length of the prompt.

    Tokens/s are medians; `x NAME` columns say how many times faster the rows named `ours...` are
    than this one, prefill / decode, as medians of ratios within a round of one call.
    """
    tables: dict[tuple[str, int, int], list[dict[str, Line]]] = {}
    for call in _calls(lines):
        line = next(iter(call.values()))
        tables.setdefault((line["isa"], line["threads"], line["prompt"]), []).append(call)
    return "\n".join(_table(*settings, calls) for settings, calls in tables.items())


def _table(isa: str, threads: int, prompt: int, calls: Sequence[dict[str, Line]]) -> str:
    names = list(dict.fromkeys(name for call in calls for name in call))
    ours = [name for name in names if name.startswith("ours")]
    head = ["row", f"prefill {prompt}", "decode", "roofline", "MiB", *(f"x {n}" for n in ours)]
    text = [f"{isa}, {threads} threads", "", _line(head), _line(["---"] * len(head))]
    for name in names:
        found = [call[name] for call in calls if name in call]
        rates = _rates(found)
        medians = [f"{statistics.median(r[i] for r in rates):,.1f}" for i in (0, 1)]
        memory = f"{max(line['memory_mib'] for line in found):,.0f}"
        ratios = [_ratio(own, name, calls) for own in ours]
        text.append(_line([name, *medians, _roofline(found), memory, *ratios]))
    return "\n".join([*text, ""])


def _ratio(ours: str, theirs: str, calls: Sequence[dict[str, Line]]) -> str:
    both = [(call[ours], call[theirs]) for call in calls if {ours, theirs} <= call.keys()]
    # a row whose time is spent has fewer rounds, the first ones
    pairs = [p for a, b in both for p in zip(a["rounds"], b["rounds"], strict=False)]
    if not pairs:
        return "–"
    return " / ".join(f"{statistics.median(a[i] / b[i] for a, b in pairs):.2f}" for i in (0, 1))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("out", type=Path)
    commands.add_parser("show").add_argument("files", type=Path, nargs="+")
    timed = commands.add_parser("time")
    timed.add_argument("rows", nargs="+", metavar="NAME=PATH[,LLAMA_BENCH]")
    timed.add_argument("--threads", type=int, default=2)
    timed.add_argument("--prompt", type=int, default=128)
    timed.add_argument("--decode", type=int, default=64)
    timed.add_argument("--rounds", type=int, default=3)
    timed.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.out)
    elif arguments.command == "time":
        lines = list(time(arguments))
        if arguments.out is not None:
            with arguments.out.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)
        print(show(lines))
    else:
        texts = [path.read_text(encoding="utf-8") for path in arguments.files]
        print(show([json.loads(line) for text in texts for line in text.splitlines()]))


if __name__ == "__main__":
    main()
