"""Tokens a second of the training loop, for a model shape with random weights and tokens.

    python benchmarks/training_throughput.py --shape qwen3-0.6b --method bitnet --length 512

Methods: `float` trains the model as it is, `bitnet` its ternary copy, `distill` the ternary copy
with the float model as teacher, `trainer` the ternary copy in transformers' own Trainer, eager.
Prints one JSON line. Utilisation counts the model's own arithmetic (6 per matrix weight and token,
attention, head; teachers 2), nothing that is computed again, over the GPU's dense bf16 rate.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel  # noqa: E402

from bitdistill.data import IGNORED, Batch  # noqa: E402
from bitdistill.monitor import PEAK_OPERATIONS, forward_operations  # noqa: E402
from bitdistill.objective import make_objective  # noqa: E402
from bitdistill.progress import Reporter  # noqa: E402
from bitdistill.schema import Distillation, Machine, Training  # noqa: E402
from bitdistill.student import make_student  # noqa: E402
from bitdistill.training import Fit  # noqa: E402


def qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    """The parts of a Qwen3 configuration that differ between sizes."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    rest = {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": tied}
    return sizes | attention | rest


SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": qwen3(1024, 3072, 28, 16, True),
    "qwen3-1.7b": qwen3(2048, 6144, 28, 16, True),
    "qwen3-4b": qwen3(2560, 9728, 36, 32, True),
}


class Synthetic:
    """Random tokens: `length` is one length (text, every token learnt) or several (a task)."""

    def __init__(self, vocabulary: int, batch: int, lengths: list[int], accumulate: int) -> None:
        self.batches = []
        for length in lengths:
            ids = torch.randint(0, vocabulary, (batch, length))
            labels = ids.clone()
            if len(lengths) > 1:
                labels[:, :-1] = IGNORED
            ones = torch.ones_like(ids)
            self.batches.append({"input_ids": ids, "attention_mask": ones, "labels": labels})
        self.accumulate = accumulate

    def window(self, step: int) -> list[Batch]:
        return [self.batches[step % len(self.batches)]] * self.accumulate

    def steps_per_epoch(self) -> int | None:
        return 1 << 30 if len(self.batches) > 1 else None

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


def make_model(shape: str, layers: int | None = None) -> PreTrainedModel:
    """Random weights, made on the GPU where there is one."""
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), max_position_embeddings=4096, **values)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def trainer_seconds(model: PreTrainedModel, data: Synthetic, steps: int) -> float:
    """Seconds a step of transformers' Trainer over the same batches, eager."""
    from transformers import Trainer, TrainingArguments

    rows = [
        {k: v[i] for k, v in data.batches[0].items()} for i in range(len(data.batches[0]["labels"]))
    ]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=len(rows),
            max_steps=steps + 3,
            bf16=True,
            optim="adamw_torch_fused",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=10**6,
        )
        marks: list[float] = []
        trainer = Trainer(model, arguments, train_dataset=rows * (steps + 3))
        inner = trainer.training_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            torch.cuda.synchronize()
            marks.append(time.perf_counter())
            return inner(*args, **kwargs)

        trainer.training_step = timed
        trainer.train()
    return statistics.median(b - a for a, b in itertools.pairwise(marks[3:]))


def fit_of(args: argparse.Namespace, model: PreTrainedModel, data: Synthetic, folder: str) -> Fit:
    """The stage that `args.method` names."""
    machine = Machine(
        compile=args.compile,
        graphs=args.graphs,
        integer_forward=args.integer,
        recompute=args.recompute,
    )
    common: dict[str, Any] = {"steps": 10**6, "warmup": 0.0, "learning_rate": 1e-5}
    teacher, settings = None, Training(**common)
    student = model
    if args.method != "float":
        student = make_student(model, "paper")
    if args.method == "distill":
        relations = {
            "weight": 1.0 if args.relations else 0.0,
            "split_heads": 8 if "qwen" in args.shape else 3,
        }
        settings = Distillation(**common, logits={"weight": 1.0}, relations=relations)
        teacher = model
    objective = make_objective(student, teacher, settings)
    fit = Fit("bench", objective, data, settings, machine, Reporter(quiet=True), Path(folder) / "s")
    if fit.hardware.wants(machine.compile):
        objective.compile()
    return fit


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of blocks of steps after warm-up, and what follows from them."""
    torch.manual_seed(0)
    model = make_model(args.shape)
    data = Synthetic(model.config.vocab_size, args.batch, args.length, args.accumulate)
    tokens = args.accumulate * args.batch * sum(args.length) / len(args.length)
    record = {"shape": args.shape, "method": args.method, "batch": args.batch}
    record |= {"accumulate": args.accumulate, "lengths": args.length}
    record |= {"integer": args.integer, "recompute": args.recompute}
    record |= {"graphs": args.graphs == "auto" and args.method != "trainer"}
    if args.method == "trainer":
        seconds, first = trainer_seconds(make_student(model, "paper"), data, args.steps), None
    else:
        seconds, first = timed_fit(args, model, data)
    forwards = 4 if args.method == "distill" else 3  # a backward pass is two, the teacher one
    operations = forwards * forward_operations(model, max(args.length))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    peak = next((rate for name, rate in PEAK_OPERATIONS.items() if name in device), None)
    return record | {
        "steps_per_second": round(1 / seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "utilisation": None if peak is None else round(operations * tokens / seconds / peak, 4),
        "first_step_seconds": None if first is None else round(first, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if peak else None,
        "device": device,
        "torch": torch.__version__,
        "note": args.note,
    }


def timed_fit(
    args: argparse.Namespace, model: PreTrainedModel, data: Synthetic
) -> tuple[float, float]:
    """Seconds a step, and seconds from the start of the process to the end of the first step."""
    cycle = len(args.length)
    with TemporaryDirectory() as folder:
        fit = fit_of(args, model, data, folder)
        with fit.engine.stream():
            fit.fit_relation_weight()
            times = []
            for block in range(args.blocks + 1):
                count = 4 * cycle if block == 0 else args.steps - args.steps % cycle
                start = time.perf_counter()
                for step in range(count):
                    fit.optimize(data.window(step))
                    fit.step += 1
                    if block == 0 and step == 0:
                        fit.read_terms(1)
                        first = time.perf_counter() - START
                fit.read_terms(count)  # waits for the device
                times.append((time.perf_counter() - start) / count)
            if args.profile is not None:
                profile(fit, data, cycle, args.profile)
    return statistics.median(times[1:]), first


def profile(fit: Fit, data: Synthetic, steps: int, path: Path) -> None:
    """Write where the device's time goes in a few steps, by kernel."""
    with torch.profiler.profile() as profiler:
        for step in range(steps):
            fit.optimize(data.window(step))
        fit.read_terms(steps)
    table = profiler.key_averages().table(
        sort_by="self_device_time_total", row_limit=60, max_name_column_width=110
    )
    path.write_text(table, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument(
        "--method", choices=["float", "bitnet", "distill", "trainer"], default="bitnet"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, nargs="+", default=[32, 64, 96])
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--relations", action="store_true")
    parser.add_argument(
        "--no-graphs", dest="graphs", action="store_const", const=False, default="auto"
    )
    parser.add_argument(
        "--no-compile", dest="compile", action="store_const", const=False, default="auto"
    )
    parser.add_argument("--integer", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--note", default="")
    parser.add_argument("--profile", type=Path, help="write a table of the kernels' times")
    print(json.dumps(measure(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
