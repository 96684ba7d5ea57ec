"""The stages of a recipe: what each depends on, where it is, and what its manifest says of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitdistill import __version__, manifest
from bitdistill.data import check_sources
from bitdistill.inputs import Inputs
from bitdistill.schema import Config
from bitdistill.teacher import licence_of, name_of

LAST = "student"


@dataclass(frozen=True)
class Stage:
    """What distinguishes a stage: where it is written and what configuration it depends on."""

    name: str
    kind: str  # of the manifest: teacher or student
    method: str
    depends: tuple[str, ...]  # sections of the configuration
    parent: Stage | None
    root: Path  # the run's directory, or one that runs share

    @property
    def path(self) -> Path:
        """The stage's directory."""
        return self.root / self.name

    @property
    def state(self) -> Path:
        """Where its training saves, beside that."""
        return self.root / f"{self.name}.training"


def plan_stages(config: Config, out: Path, inputs: Inputs) -> dict[str, Stage]:
    """The stages of this run by name, in order, and what each of them depends on."""
    own, task = ("model", "seed"), ("model", "seed", "task")
    text: tuple[str, ...] = ()
    if "task" in config.corpus.sources:  # of limit_train examples, those that the seed chose
        text = ("task",) if config.task.limit_train is None else ("task", "seed")
    base = None
    if config.base.enabled:
        base = Stage("base", "teacher", "base", (*own, "base", "corpus", *text), None, out)
    guide = ("teacher", "teacher_model")
    teacher = Stage("teacher", "teacher", "fp16-sft", (*task, *guide), base, out)
    plan = [base, teacher]
    if config.bitnet_sft.enabled:
        direct = (*task, "bitnet_sft", "student.activation_bits")
        plan.append(Stage("bitnet-sft", "student", "bitnet-sft", direct, base, out))
    start = teacher if config.student.start == "teacher" else base
    # calibrated on the next stage's batches
    batches = tuple(f"distill.{x}" for x in ("batch_size", "accumulate", "max_length", "mixtures"))
    refined = Stage("refined", "student", "refined", (*task, "student", *batches), start, out)
    last = refined
    if config.pretrain.enabled:
        # no task has shaped them, nor a seed but their own
        tiny = own if config.model.source == "tiny" else ("model",)
        parts = (*tiny, "teacher_model", "student", "pretrain", "corpus", *text)
        refined = Stage("refined", "student", "refined", parts, start, out)
        last = Stage("pretrained", "student", "pretrained", parts, refined, out)
        if config.shared is not None:
            root = Path(config.shared) / fingerprint(last, config, inputs)[:12]
            refined = replace(refined, root=root)
            last = replace(last, parent=refined, root=root)
        plan += [refined, last]
    else:
        plan.append(refined)
    parts = ("model", "seed", "task", "student", *guide, "distill", "method")
    plan.append(Stage(LAST, "student", config.method, parts, last, out))
    return {stage.name: stage for stage in plan if stage is not None}


def plan(config: Config, out: Path, until: str) -> tuple[Inputs, dict[str, Stage]]:
    """What a run reads, and its stages; the error of one that cannot begin, or has no `until`."""
    if any(p.exists() and not p.is_dir() for p in (out, *out.parents)):
        raise FileExistsError(f"{out} cannot be a directory there; choose another --out")
    check_sources(config)
    inputs = Inputs(config)
    stages = plan_stages(config, out, inputs)
    if until not in stages:
        raise ValueError(f"no stage {until!r} in this run; it has {', '.join(stages)}")
    return inputs, stages


def directory_of(config: Config, out: str | Path | None) -> Path:
    """The directory of a run: as given, or runs/NAME."""
    return Path("runs") / config.name if out is None else Path(out)


def fingerprint(stage: Stage, config: Config, inputs: Inputs) -> str:
    """A hash of all that a stage depends on, its parents' included."""
    values = config.model_dump(mode="json")
    parent = None if stage.parent is None else fingerprint(stage.parent, config, inputs)
    own = {key: reduce(getitem, key.split("."), values) for key in stage.depends}
    return manifest.fingerprint([own, inputs.of(stage.depends), parent])


def _tokens_in_all(stage: Stage, metrics: dict[str, Any]) -> int:
    """Tokens, without padding, that this stage and a student's stages before it trained on."""
    before = 0
    if stage.kind == "student" and stage.parent is not None and stage.parent.kind == "student":
        parent = manifest.read_manifest(stage.parent.path)
        before = parent["metrics"]["tokens_in_all"]
    return before + metrics.get("tokens", 0)  # stage 1 has none


def describe(
    stage: Stage, config: Config, model: PreTrainedModel, made: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a stage; `made`: what only the run knows (fingerprint, inputs, metrics)."""
    student = getattr(model.config, "bitdistill", {})
    task = None if stage.name == "base" else config.task.resolve().to_json()
    source = config.model
    if stage.name == "teacher" and config.teacher_model is not None:
        source = config.teacher_model
    tokens = _tokens_in_all(stage, made["metrics"])
    return made | {
        "metrics": made["metrics"] | {"tokens_in_all": tokens},
        "stage": stage.name,
        "method": stage.method,
        "base_model": name_of(source),
        "family": model.config.model_type.removeprefix("bitdistill_"),
        "licence": licence_of(source),
        "norm_style": student.get("norm_style"),
        "activation_bits": student.get("activation_bits"),
        "task": task,
        "validation": config.task.validation,
        "columns": config.task.columns,
        "recipe": config.name,
        "seed": config.seed,
        "parent": None if stage.parent is None else stage.parent.name,
        "created_by": f"bitdistill {__version__}",
    }
