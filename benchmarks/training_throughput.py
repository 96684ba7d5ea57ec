"""Tokens a second of the training loop, for a model shape with random weights and tokens.

    python benchmarks/training_throughput.py --shape qwen3-0.6b --method bitnet --length 512
    torchrun --nproc_per_node 2 benchmarks/training_throughput.py ...    # `--batch` on each device

What memory large models take (random weights; the second on two devices):

    ... --shape qwen3-0.6b --teacher qwen3-4b --method distill --relations --length 512
    ... --shape qwen3-4b --method bitnet --recompute --batch 16 --accumulate 2 --length 512

Methods: `float` trains the model as it is, `subln` its copy with the added norms and float weights,
`bitnet` its ternary copy, `distill` the ternary copy with the float model, or a model of the shape
`--teacher`, as teacher, `trainer` the ternary copy in transformers' own Trainer, eager. Prints one
JSON line. Tokens are those of all devices together. Utilisation counts the model's own arithmetic
(6 per matrix weight and token, attention, head; teachers 2), nothing that is computed again, over
the GPUs' dense bf16 rate. `peak_gib` is what training had allocated at most, on the device that had
most; `held_gib` before the first step. `starting` splits `ready_seconds`: imports of torch and of
transformers, the device's first allocation, making the models, and the rest of what a stage sets up
before its first step.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import argparse  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any  # noqa: E402

STARTING: dict[str, float] = {}  # seconds, in order
MARKS = [START]


def started(part: str) -> None:
    """What has passed since the part before belongs to this one."""
    MARKS.append(time.perf_counter())
    STARTING[part] = round(MARKS[-1] - MARKS[-2], 2)


import torch  # noqa: E402

from bitdistill.cli import import_transformers  # noqa: E402
from bitdistill.hardware import Hardware, start_compilers  # noqa: E402
from bitdistill.schema import Distillation, Machine, Training  # noqa: E402

if "--no-compile" not in sys.argv:
    start_compilers(Machine())  # as `bitdistill train` does, before transformers is imported
started("torch")
import_transformers()

from synthetic import SHAPES, Synthetic, make_model  # noqa: E402
from torch import nn  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from bitdistill.distributed import World  # noqa: E402
from bitdistill.int8 import weights_to_int8  # noqa: E402
from bitdistill.monitor import PEAK_OPERATIONS, forward_operations  # noqa: E402
from bitdistill.objective import make_objective  # noqa: E402
from bitdistill.progress import Reporter  # noqa: E402
from bitdistill.quantize import BitLinear  # noqa: E402
from bitdistill.student import make_student  # noqa: E402
from bitdistill.training import Fit  # noqa: E402

started("transformers")

WORLD = World.from_environment()
HARDWARE = Hardware.resolve(Machine())
DEVICE = HARDWARE.device
torch.zeros(1, device=DEVICE)
started("device")


def commit() -> str:
    """Of the code that is measured; `-dirty` where something tracked was changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no checkout, or no git
        return "unknown"
    return done.stdout.strip()


def unquantised(student: PreTrainedModel) -> PreTrainedModel:
    """The student with its norms, its ternary layers replaced by float ones of the same weights."""
    for path, layer in list(student.named_modules()):
        if not isinstance(layer, BitLinear):
            continue
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        norm = [] if layer.norm is None else [layer.norm]
        student.set_submodule(path, nn.Sequential(*norm, plain))
    return student


def make_models(args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """What is trained, and its teacher."""
    model = make_model(args.shape, DEVICE)
    if args.method == "float":
        return model, None
    with DEVICE:
        student = make_student(model, "paper")
    if args.method == "subln":
        return unquantised(student), None
    if args.method != "distill":
        return student, None
    if args.teacher is not None:
        model = make_model(args.teacher, DEVICE, torch.bfloat16)
    if args.teacher_bits == 8:
        weights_to_int8(model)
    return student, model


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


def fit_of(args: argparse.Namespace, data: Synthetic, folder: str) -> Fit:
    """The stage that `args.method` names."""
    machine = Machine(
        compile=args.compile,
        graphs=args.graphs,
        integer_forward=args.integer,
        recompute=args.recompute,
    )
    common: dict[str, Any] = {"steps": 10**6, "warmup": 0.0, "learning_rate": 1e-5}
    settings = Training(**common)
    if args.method == "distill":
        heads = 8 if "qwen" in args.shape else SHAPES[args.shape]["num_key_value_heads"]
        relations = {"weight": 1.0 if args.relations else 0.0, "split_heads": heads}
        settings = Distillation(**common, logits={"weight": 1.0}, relations=relations)
    models = make_models(args)
    started("models")
    objective = make_objective(*models, settings)
    state = Path(folder) / "state"
    fit = Fit("bench", objective, data, settings, machine, Reporter(quiet=True), state, world=WORLD)
    if fit.hardware.wants(machine.compile):
        objective.compile()
    return fit


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of blocks of steps after warm-up, and what follows from them."""
    torch.manual_seed(WORLD.rank)
    data = Synthetic(SHAPES[args.shape]["vocab_size"], args.batch, args.length, args.accumulate)
    tokens = WORLD.size * args.accumulate * args.batch * sum(args.length) / len(args.length)
    record = {
        key: getattr(args, key) for key in ("shape", "method", "teacher", "teacher_bits", "batch")
    }
    record |= {"accumulate": args.accumulate, "lengths": args.length, "devices": WORLD.size}
    record |= {key: getattr(args, key) for key in ("relations", "integer", "recompute")}
    single = WORLD.size == 1 and args.accumulate == 1
    record |= {"graphs": args.graphs == "auto" and single and args.method != "trainer"}
    if args.method == "trainer":
        student, _ = make_models(args)
        seconds = trainer_seconds(student, data, args.steps)
        measured: dict[str, Any] = {"operations": 3 * forward_operations(student, max(args.length))}
    else:
        seconds, measured = timed_fit(args, data)
    operations = measured.pop("operations")
    device = torch.cuda.get_device_name() if HARDWARE.cuda else "cpu"
    peak = next((rate for name, rate in PEAK_OPERATIONS.items() if name in device), None)
    used = None if peak is None else operations * tokens / seconds / peak / WORLD.size
    memory = torch.cuda.max_memory_allocated() / 2**30 if HARDWARE.cuda else 0.0
    return record | {
        "steps_per_second": round(1 / seconds, 2),
        "tokens_per_second": round(tokens / seconds),
        "utilisation": None if used is None else round(used, 4),
        **measured,
        "peak_gib": round(max(WORLD.gather(memory)), 2) if HARDWARE.cuda else None,
        "device": device,
        "torch": torch.__version__,
        "commit": commit(),
        "note": args.note,
    }


def operations_of(fit: Fit, length: int) -> float:
    """Operations a token: a backward pass is two forward passes, the teacher has one alone."""
    operations = 3 * forward_operations(fit.objective.student, length)
    if fit.objective.teacher is not None:
        operations += forward_operations(fit.objective.teacher, length)
    return operations


def timed_fit(args: argparse.Namespace, data: Synthetic) -> tuple[float, dict[str, Any]]:
    """Seconds a step; operations a token, seconds from the start of the process to the beginning
    and to the end of the first step, memory (GiB) before it."""
    cycle = len(args.length)
    with TemporaryDirectory() as folder:
        fit = fit_of(args, data, folder)
        measured: dict[str, Any] = {"operations": operations_of(fit, max(args.length))}
        started("fit")
        measured["starting"] = STARTING
        measured["ready_seconds"] = round(MARKS[-1] - START, 1)
        if HARDWARE.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            measured["held_gib"] = round(torch.cuda.memory_allocated() / 2**30, 2)
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
    measured["first_step_seconds"] = round(first, 1)
    return statistics.median(times[1:]), measured


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
        "--method", choices=["float", "subln", "bitnet", "distill", "trainer"], default="bitnet"
    )
    parser.add_argument("--teacher", choices=SHAPES)
    parser.add_argument("--teacher-bits", type=int, choices=[8, 16], default=16)
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
    args = parser.parse_args()
    with WORLD.joined(HARDWARE):
        record = measure(args)
    if WORLD.main:
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
