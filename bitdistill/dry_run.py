"""`bitdistill train --dry-run`: find out what a run would meet, before it takes hours.

Checks packages, data and model, counts parameters, runs one distillation step on real data, and
estimates time and memory from it. Nothing is written.
"""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from bitdistill.config import dump_config
from bitdistill.cost import STATE_BYTES, costs, describe, enabled_stages, stage_tokens
from bitdistill.data import TaskBatches
from bitdistill.distributed import World
from bitdistill.documents import open_source
from bitdistill.feeds import candidates, task_batches
from bitdistill.int8 import weights_to_int8
from bitdistill.objective import make_objective
from bitdistill.progress import Reporter
from bitdistill.quantize import BitLinear
from bitdistill.schema import Config, Distillation
from bitdistill.sources import is_local
from bitdistill.stages import LAST, directory_of, plan
from bitdistill.student import make_student
from bitdistill.teacher import ModelError, check_model, check_teacher, load_model
from bitdistill.training import Fit

MIB = 1 << 20


def check_packages(config: Config) -> list[str]:
    """Packages that this run would need later; ImportError names what is missing and the remedy."""
    needed = ["safetensors", "tokenizers", "transformers"]
    local_or_hub = config.task.train is not None or config.task.resolve().hub is not None
    if local_or_hub or set(config.corpus.sources) - {"task", "tiny"}:
        needed.append("datasets")
    if config.task.resolve().kind == "summary":
        needed += ["rouge_score", "sacrebleu"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"missing packages: {', '.join(missing)}; pip install bitdistill again")
    return needed


def _check_hub(config: Config) -> None:
    """Read the first text of every corpus source on the hub."""
    if config.base.enabled or config.pretrain.enabled:
        for name in config.corpus.sources:
            if not is_local(name):
                open_source(name, config.corpus, config.task, config.seed).next()


def _parameters(model: PreTrainedModel) -> tuple[int, int]:
    """(ternary, all) parameters."""
    ternary = sum(m.weight.numel() for m in model.modules() if isinstance(m, BitLinear))
    return ternary, sum(p.numel() for p in model.parameters())


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _one_step(
    config: Config,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: TaskBatches,
    among: list[int] | None,
) -> tuple[float, int, dict[str, float], int]:
    """Seconds, tokens, terms and peak bytes of a distillation step, the teacher not yet trained."""
    settings: Distillation = config.distill
    if config.machine.teacher_bits == 8:
        weights_to_int8(teacher)
    with TemporaryDirectory() as folder:
        fit = Fit(
            "dry-run",
            make_objective(student, teacher if settings.needs_teacher else None, settings, among),
            batches,
            settings,
            config.machine,
            Reporter(quiet=True),
            Path(folder) / "state",
        )
        fit.fit_relation_weight()
        window = batches.window(0)
        fit.optimize(window)  # the first step pays for allocations
        fit.read_terms(1)
        start = time.perf_counter()
        fit.optimize(window)
        terms = fit.read_terms(1)
        seconds = time.perf_counter() - start
    tokens = sum(batch["attention_mask"].numel() for batch in window)
    return seconds, tokens, terms, _peak_bytes(fit.hardware.device)


def dry_run(config: Config, out: str | Path | None = None, until: str = LAST) -> str:
    """Everything that a run with these arguments depends on, checked; a report for a person.

    Raises what the run itself would raise: ModelError, ValueError, OSError, ImportError.
    """
    packages = check_packages(config)
    if config.model.source != "tiny":
        check_model(config.model)
    plan(config, directory_of(config, out), until)
    base, tokenizer = load_model(config.model, config.seed)
    _check_hub(config)
    settings = config.distill
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token; set eos_token in its config")
    batches = task_batches(config, settings, tokenizer, World())
    rows = batches.rows
    check_teacher(config)
    student = make_student(base, config.student.norm_style, config.student.activation_bits)
    teacher = base
    if config.teacher_model is not None:
        teacher = load_model(config.teacher_model, config.seed)[0]
    ternary, total = _parameters(student)
    among = candidates(settings, config.task.resolve(), tokenizer)
    seconds, tokens, terms, peak = _one_step(config, student, teacher, batches, among)
    lines = [
        dump_config(config),
        f"packages: {', '.join(packages)}: found",
        f"data: {len(rows)} training examples, {sum(len(r.ids) for r in rows) / len(rows):.0f} "
        "tokens on average",
        f"student: {total / 1e6:.2f}M parameters, {ternary / 1e6:.2f}M of them ternary "
        f"({ternary / 4 / MIB:.2f} MiB at 2 bits)",
        f"one step: {seconds:.2f} s for {tokens} tokens; "
        + ", ".join(f"{key} {value:.3f}" for key, value in terms.items()),
        f"memory: {total * STATE_BYTES / MIB:.0f} MiB for the student's training state, "
        f"{peak / MIB:.0f} MiB peak in that step",
    ]
    per_example = tokens / (settings.batch_size * settings.accumulate)
    for name, stage in enabled_stages(config).items():  # each costs a token what that step does
        minutes = stage_tokens(name, stage, batches.count, per_example) * seconds / tokens / 60
        lines.append(f"time: stage {name} about {minutes:.1f} minutes")
    other = None if teacher is base else teacher
    lines.append("cost: " + describe(costs(config, base, batches.count, per_example, other)))
    return "\n".join(lines)
