"""One validated schema for a whole run: YAML files, `extends`, and `--set a.b=c`.

Unknown keys are refused with a suggestion, wherever they stand. The schema's defaults are neutral;
what we recommend is in recipes/*.yaml, where it can be read and compared.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from bitdistill.names import suggest
from bitdistill.tasks import Task, get_task


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


class Section(BaseModel):
    """A part of the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(Section):
    """The off-the-shelf model. `source`: a local directory, a hub id, or `tiny` (made on the spot).

    `gguf_file` names a GGUF file inside `source` that transformers can read.
    """

    source: str
    gguf_file: str | None = None
    revision: str | None = None
    licence: str | None = None


class TaskData(Section):
    """A built-in task by name, or a task of your own; and where its examples are.

    `train` and `validation` are local JSON lines, CSV or parquet files; without them the hub's
    data set is used. `columns` maps the task's column names to the file's.
    """

    name: str
    train: str | None = None
    validation: str | None = None
    columns: dict[str, str] = {}
    limit_train: int | None = Field(None, gt=0)
    limit_validation: int | None = Field(None, gt=0)
    kind: Literal["label", "summary"] | None = None
    prompt: str | None = None
    inputs: list[str] = []
    target: str | None = None
    labels: list[str] = []
    max_new_tokens: int = Field(128, gt=0)

    @model_validator(mode="after")
    def _complete(self) -> TaskData:
        self.resolve()
        return self

    def resolve(self) -> Task:
        """The task; ValueError for an unknown name without a prompt of its own."""
        if self.prompt is None:
            return get_task(self.name)
        if not self.inputs or not self.target or (self.kind != "summary" and not self.labels):
            raise ValueError("a task of your own needs prompt, inputs, target and (label) labels")
        if len({label.strip().lower() for label in self.labels}) < len(self.labels):
            raise ValueError(f"labels {self.labels} must differ in more than case and spaces")
        return Task(
            name=self.name,
            kind=self.kind or "label",
            prompt=self.prompt,
            columns=tuple(self.inputs),
            target=self.target,
            labels=tuple(self.labels),
            max_new_tokens=1 if self.labels else self.max_new_tokens,
        )


class Corpus(Section):
    """Text for continued pre-training. `source`: a local file, a hub data set, `task` (the task's
    own prompts and answers) or `tiny` (the embedded generator). Several sources are mixed by
    listing them; a hub data set is streamed."""

    sources: list[str] = ["task"]
    column: str = "text"
    configuration: str | None = None
    split: str = "train"
    limit: int | None = Field(None, gt=0)


class Training(Section):
    """Optimisation of one stage. Give `steps` or `epochs`. Rates are per step, shares of the run.

    `anneal` is the share of the steps over which quantisation is blended in (0: hard at once).
    `decay_until` is the share of the run after which weight decay is zero.
    """

    enabled: bool = True
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(32, gt=0)
    accumulate: int = Field(1, gt=0)
    max_length: int = Field(512, gt=1)
    learning_rate: float = Field(5e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    decay_until: float = Field(1.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    anneal: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.enabled and (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class LogitsLoss(Section):
    """KL(teacher || student) of softmax(z / temperature), over the tokens that count.

    `tau_squared` multiplies by temperature^2, as the authors' code does and the paper does not.
    """

    weight: float = Field(0.0, ge=0)
    temperature: float = Field(5.0, gt=0)
    tau_squared: bool = False


class RelationLoss(Section):
    """Attention relations of one layer (MiniLM): KL of softmax(A A^T) for A in Q, K, V.

    `layer` is an index, or a share of the depth; teacher and student layers correspond by depth.
    `states`: `projection` takes Q, K, V as projected, `attention` after qk-norm and rotary
    embedding and before key/value heads are repeated (the authors' code). `scaling`: `sqrt` divides
    by sqrt(d_r), `normalised` divides L2-normalised states' products by `temperature` (the paper's
    Algorithm 1). `mask` leaves out padding and future tokens (the paper does not).
    `divide_by_heads` divides by `split_heads` once more (the authors' code).
    `target_ratio` sets the weight so that the term starts at that ratio of the cross-entropy.
    """

    weight: float = Field(0.0, ge=0)
    target_ratio: float | None = Field(None, gt=0)
    layer: int | float = 0.75
    split_heads: int = Field(8, gt=0)
    states: Literal["projection", "attention"] = "projection"
    scaling: Literal["sqrt", "normalised"] = "sqrt"
    temperature: float = Field(1.0, gt=0)
    mask: bool = True
    divide_by_heads: bool = False

    @property
    def active(self) -> bool:
        """Whether the term is computed at all."""
        return self.weight > 0 or self.target_ratio is not None


class Distillation(Training):
    """A stage with a teacher: L = ce L_CE + logits.weight L_LD + relations.weight L_AD."""

    ce: float = Field(1.0, ge=0)
    logits: LogitsLoss = LogitsLoss()
    relations: RelationLoss = RelationLoss()

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        return self.logits.weight > 0 or self.relations.active


class Student(Section):
    """Stage 1. `start`: whether the student takes the base model's weights or the teacher's."""

    norm_style: Literal["paper", "allnorm", "none"] = "paper"
    activation_bits: Literal[8] | None = 8
    calibrate: bool = True
    calibration_batches: int = Field(8, gt=0)
    start: Literal["base", "teacher"] = "base"


class Machine(Section):
    """Where and how to compute. `precision` is the arithmetic; master weights are always fp32.

    `compile` compiles each decoder layer; `auto` does so on CUDA. `pad_multiple` keeps the number
    of batch lengths, and so of compiled variants, small.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    threads: int | None = Field(None, gt=0)
    save_minutes: float = Field(5.0, gt=0)
    pad_multiple: int = Field(8, gt=0)


class Config(Section):
    """A whole run. Stage 2 distils from the base model, stage 3 from the task's teacher."""

    name: str
    seed: int = 0
    method: Literal["bitdistill", "bitdistill-paper"] = "bitdistill"
    model: Model
    task: TaskData
    corpus: Corpus = Corpus()
    machine: Machine = Machine()
    base: Training = Training(enabled=False)
    teacher: Training
    bitnet_sft: Training = Training(enabled=False)
    student: Student = Student()
    pretrain: Distillation = Distillation(enabled=False)
    distill: Distillation

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or "/" in value:
            raise ValueError("name must be a plain word")
        return value


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    folder = resources.files("bitdistill") / "recipes"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values")
    return value


def _read_recipe(recipe: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a recipe on top of those it extends; a file's path is relative to its own."""
    path = Path(recipe)
    if recipe in seen:
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join((*seen, recipe))}")
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe file {path} does not exist; check the path")
        try:
            values = _read_yaml(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError:
            raise ConfigError(f"recipe file {path} is not UTF-8 text; save it again") from None
    else:
        if recipe not in recipe_names():
            raise ConfigError(f"unknown recipe {recipe!r}{suggest(recipe, recipe_names())}")
        file = resources.files("bitdistill") / "recipes" / f"{recipe}.yaml"
        values = _read_yaml(file.read_text(encoding="utf-8"), recipe)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"extends: {parent!r} is not the name of a recipe or of a YAML file")
    if Path(parent).suffix in (".yaml", ".yml"):
        parent = str(path.parent / parent)
    return merge(_read_recipe(parent, (*seen, recipe)), values)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over` laid on top, mapping by mapping.

    `steps` and `epochs` say the same thing, so one that is set replaces the other below it.
    """
    merged = dict(base)
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if over.get(key) is not None and other not in over:
            merged.pop(other, None)
    for key, value in over.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def parse_setting(setting: str) -> dict[str, Any]:
    """`a.b=c` -> {"a": {"b": c}}, with c read as YAML."""
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {setting!r} is not of the form key.key=value")
    try:
        value: Any = yaml.safe_load(text)
        # YAML 1.1 reads 1e-4 as a string; a number is meant
        value = float(value) if isinstance(value, str) and _is_number(value) else value
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: the value is not valid YAML: {error}") from None
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    model: Any = Config
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(getattr(model, "model_fields", {}))


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"])) or "configuration"
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"])
            lines.append(f"unknown key {key!r}{suggest(str(item['loc'][-1]), known)}")
        else:
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(lines)


def load_config(recipe: str = "tiny", settings: tuple[str, ...] | list[str] = ()) -> Config:
    """Resolve a recipe (a shipped name or a YAML file) and `--set` changes into a Config.

    Raises ConfigError, which names the key and what would be right.
    """
    values = _read_recipe(recipe)
    for setting in settings:
        values = merge(values, parse_setting(setting))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, complete."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
