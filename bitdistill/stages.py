"""What distinguishes the stages of a recipe, and what a stage's manifest says of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from bitdistill import __version__
from bitdistill.schema import Config
from bitdistill.teacher import licence_of, name_of


@dataclass(frozen=True)
class Stage:
    """What distinguishes a stage: where it is written and what configuration it depends on."""

    directory: str
    kind: str  # of the manifest: teacher or student
    method: str
    depends: tuple[str, ...]  # sections of the configuration
    parent: str | None


def describe(
    stage: Stage, config: Config, model: PreTrainedModel, made: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a stage; `made`: what only the run knows (fingerprint, inputs, metrics)."""
    student = getattr(model.config, "bitdistill", {})
    task = None if stage.directory == "base" else config.task.resolve().to_json()
    return made | {
        "stage": stage.directory,
        "method": stage.method,
        "base_model": name_of(config.model),
        "family": model.config.model_type.removeprefix("bitdistill_"),
        "licence": licence_of(config.model),
        "norm_style": student.get("norm_style"),
        "activation_bits": student.get("activation_bits"),
        "task": task,
        "validation": config.task.validation,
        "columns": config.task.columns,
        "recipe": config.name,
        "seed": config.seed,
        "parent": stage.parent,
        "created_by": f"bitdistill {__version__}",
    }
