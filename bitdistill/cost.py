"""What a run costs on H100s: computed from its arithmetic and measured utilisation, not measured.

    python -m bitdistill.cost     # the paper's experiments, as a Markdown table

Hours are the models' operations (monitor.py counts them) over the H100's dense bf16 rate times the
share of it that training reached. That share was measured for Qwen3-0.6B at 32 x 512 tokens
(docs/results/training-throughput.jsonl); small models and short sequences reach less. Activations
computed again are not among the operations: the share leaves them out as well, and Qwen3-4B, which
computes them again, was measured within 1 % of what this gives (a test says so). Memory is
that of AdamW's fp32 state, a bf16 teacher, the loss's chunk of logits, and what the layers keep for
the backward pass, of which BYTES a value were fitted to the same measurements: they come out within
11 % (a test says so). Several GPUs are assumed to share evenly and to lose nothing to exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitdistill.config import EXPERIMENTS, load_config
from bitdistill.decoder import head_width
from bitdistill.distributed import kept_whole
from bitdistill.hardware import TrainingError
from bitdistill.losses import CHUNK_ELEMENTS
from bitdistill.monitor import PEAK_OPERATIONS, forward_operations
from bitdistill.schema import Config, Distillation, Training

RATE = PEAK_OPERATIONS["H100"]
# of the rate, by what is trained: as it is, ternary, ternary beside a teacher
UTILISATION = {"float": 0.3895, "ternary": 0.3618, "distill": 0.3741}
BYTES = {"float": 2.2, "ternary": 2.75, "distill": 2.6}
STATE_BYTES = 16  # fp32 master weight, gradient and two AdamW moments
GIB = 2**30
CORPUS_STAGES = ("base", "pretrained")

# Public configurations of the paper's models, so that the table needs no download.
_QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16},
    "Qwen/Qwen3-1.7B": _QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    | {"num_attention_heads": 16},
    "Qwen/Qwen3-4B": _QWEN3
    | {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36}
    | {"num_attention_heads": 32},
    "Qwen/Qwen2.5-0.5B": {"model_type": "qwen2", "vocab_size": 151936}
    | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
    "google/gemma-3-1b-pt": {"model_type": "gemma3_text", "vocab_size": 262144, "head_dim": 256}
    | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
    | {"num_attention_heads": 4, "num_key_value_heads": 1},
}
# training examples of the hub's data sets, and the padded length assumed for one
EXAMPLES = {
    "mnli": (392702, 64),
    "qnli": (104743, 96),
    "sst2": (67349, 64),
    "cnn_dailymail": (287113, 512),
}


@dataclass(frozen=True)
class Cost:
    """Of one stage: tokens with padding, hours of one H100, GiB on one H100 and on each of 8.

    Eight share the rows of a step, in micro-batches no larger than one GPU's.
    """

    stage: str
    tokens: float
    hours: float
    gib: float
    gib_of_8: float


def enabled_stages(config: Config) -> dict[str, Training]:
    """The stages that train, by name, in order."""
    stages = {
        "base": config.base,
        "teacher": config.teacher,
        "bitnet-sft": config.bitnet_sft,
        "pretrained": config.pretrain,
        "student": config.distill,
    }
    return {name: settings for name, settings in stages.items() if settings.enabled}


def stage_tokens(name: str, stage: Training, examples: int, per_example: float) -> float:
    """Tokens that a stage processes, padding included; TrainingError for a corpus with epochs."""
    size = stage.batch_size * stage.accumulate
    if name in CORPUS_STAGES:
        if stage.steps is None:
            raise TrainingError(f"a corpus has no epochs: give steps for stage {name}")
        return stage.steps * size * stage.max_length
    steps = stage.steps or math.ceil((stage.epochs or 0) * math.ceil(examples / size))
    return steps * size * per_example


def _values_a_token(config: Any) -> float:
    """Values that a layer keeps of a token for the backward pass, by the widths it works in."""
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    head = head_width(config)
    return 4 * config.hidden_size + 2 * (heads + 2 * keys) * head + 3 * config.intermediate_size


def memory_gib(
    model: PreTrainedModel,
    kind: str,
    tokens: float,
    *,
    teacher: PreTrainedModel | None = None,
    recompute: bool = False,
    gpus: int = 1,
    accumulate: int = 1,
    learnt: float | None = None,
    chunk: int = CHUNK_ELEMENTS["fused"],
) -> float:
    """Peak GiB of one GPU for micro-batches of `tokens`, of which `learnt` (all) have a loss.

    `kind` is float, ternary or distill. The state is shared by `gpus`; the teacher is not, nor are
    a small student's gathered weights, or gradients between the `accumulate` micro-batches of a
    step. `chunk` logits are computed at once.
    """
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    held = STATE_BYTES * parameters / gpus
    whole = (accumulate > 1) + kept_whole(model)  # gradients, weights
    held += 4 * parameters * (1 - 1 / gpus) * whole
    held += 2 * sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0
    values, layers = _values_a_token(config) * BYTES[kind], config.num_hidden_layers
    kept = layers * 4 * config.hidden_size + values if recompute else layers * values
    logits = min((tokens if learnt is None else learnt) * config.vocab_size, chunk)
    head = 6 * model.lm_head.weight.numel() + (6 if teacher is not None else 4) * logits
    return (held + tokens * kept + head) / GIB


def costs(
    config: Config,
    model: PreTrainedModel,
    examples: int,
    per_example: float,
    teacher: PreTrainedModel | None = None,
) -> list[Cost]:
    """The cost of every stage that trains; `teacher`: `teacher_model`'s, else the base model's.

    `per_example` is the mean padded length of the task's `examples`.
    """
    guide = model if teacher is None else teacher
    found = []
    for name, stage in enabled_stages(config).items():
        trained = guide if name == "teacher" else model
        beside = guide if isinstance(stage, Distillation) and stage.needs_teacher else None
        kind = "distill" if beside is not None else "ternary"
        kind = "float" if name in ("base", "teacher") else kind
        text = name in CORPUS_STAGES
        length = float(stage.max_length) if text else per_example
        operations = 3 * forward_operations(trained, int(length))  # backward is twice forward
        operations += 0 if beside is None else forward_operations(beside, int(length))
        tokens = stage_tokens(name, stage, examples, per_example)
        memory = []
        for gpus in (1, 8):
            rows = min(stage.batch_size, math.ceil(stage.batch_size * stage.accumulate / gpus))
            options: dict[str, Any] = {"teacher": beside, "recompute": config.machine.recompute}
            options |= {"gpus": gpus, "learnt": rows * (length if text else 1)}
            options["accumulate"] = math.ceil(stage.accumulate / gpus)
            memory.append(memory_gib(trained, kind, rows * length, **options))
        hours = operations * tokens / (RATE * UTILISATION[kind]) / 3600
        found.append(Cost(name, tokens, hours, *memory))
    return found


def describe(stages: list[Cost]) -> str:
    """One line for a person."""
    hours, largest = sum(c.hours for c in stages), max(c.gib for c in stages)
    return (
        f"on one H100, computed and not measured: {hours:.2g} hours "
        f"({', '.join(f'{c.stage} {c.hours:.2g}' for c in stages)}), {largest:.1f} GiB at most; "
        f"sharded by 8, {max(c.gib_of_8 for c in stages):.1f} GiB each"
    )


def without_weights(shape: dict[str, Any]) -> PreTrainedModel:
    """A model of a shape whose weights take no memory."""
    values = {"tie_word_embeddings": True} | shape
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))


def table() -> str:
    """The paper's experiments: tokens, GPU hours and memory, as Markdown.

    Below them models with several tasks, which share one stage 2.
    """
    lines = [
        "| Recipe | Teacher | BitNet-SFT | Stage 2 | Stage 3 | All | GiB on 1 | GiB on each of 8 |",
        f"| --- |{' ---: |' * 7}",
    ]
    models: dict[str, PreTrainedModel] = {}
    by_model: dict[str, list[list[Cost]]] = {}
    for name in EXPERIMENTS:
        config = load_config(name)
        source = config.model.source
        if source not in models:
            models[source] = without_weights(SHAPES[source])
        found = costs(config, models[source], *EXAMPLES[config.task.name])
        lines.append(_row(name, [found]))
        by_model.setdefault(name.split("+")[0], []).append(found)
    lines += [
        _row(f"{model}, {len(tasks)} tasks, stage 2 once", tasks)
        for model, tasks in by_model.items()
        if len(tasks) > 1
    ]
    return "\n".join(lines)


def _row(name: str, tasks: list[list[Cost]]) -> str:
    """The sum over tasks, of which only the first trains stage 2."""
    every = [stage for task in tasks for stage in task]
    hours = [
        sum(c.hours for c in (tasks[0] if stage == "pretrained" else every) if c.stage == stage)
        for stage in ("teacher", "bitnet-sft", "pretrained", "student")
    ]
    cells = [f"{h:.3g}" for h in (*hours, sum(hours))]
    cells += [f"{max(c.gib for c in every):.0f}", f"{max(c.gib_of_8 for c in every):.0f}"]
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table())
