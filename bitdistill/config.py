"""Read a configuration: shipped recipes and YAML files, `extends`, and `--set a.b=c`.

A recipe is a name, a file, or several of them joined by `+`, each laid on top of those before it:
`smollm2-135m-sst2+paper` trains that task by the paper's method, `qwen3-4b+mnli+paper` is one of
the paper's experiments, put together from a model, a task and a method.

The result is a `schema.Config`; every mistake becomes a ConfigError that names the key and, where
there is one, the key that was probably meant.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bitdistill.names import suggest
from bitdistill.schema import Config
from bitdistill.schema_data import Section, TaskData
from bitdistill.tasks import TASKS

PARTS = "parts"
# arXiv 2510.13998, tables 1 to 3
EXPERIMENTS = (
    *(
        f"qwen3-{size}+{task}+paper"
        for size in ("0.6b", "1.7b", "4b")
        for task in ("mnli", "qnli", "sst2", "cnn_dailymail")
    ),
    "gemma3-1b+mnli+paper",
    "qwen2.5-0.5b+mnli+paper",
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


def _shipped() -> dict[str, Traversable]:
    """Name -> file of all recipes and parts; a recipe in a folder is called `folder/name`."""
    found: dict[str, Traversable] = {}
    for entry in (resources.files("bitdistill") / "recipes").iterdir():
        prefix = "" if entry.name == PARTS else f"{entry.name}/"
        files = [(prefix, file) for file in entry.iterdir()] if entry.is_dir() else [("", entry)]
        for start, file in files:
            if file.name.endswith(".yaml"):
                found[start + file.name.removesuffix(".yaml")] = file
    return found


def part_names() -> list[str]:
    """The shipped parts: models, tasks and methods, to be joined by `+`."""
    folder = resources.files("bitdistill") / "recipes" / PARTS
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir())


def recipe_names() -> list[str]:
    """The recipes that ship with the package, and the paper's experiments, joined from parts."""
    return [*sorted(set(_shipped()) - set(part_names())), *EXPERIMENTS]


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values")
    return value


def _parts(recipe: str) -> list[str]:
    """The parts of `a+b+c`; a file whose path has a plus sign in it is one part."""
    return [recipe] if Path(recipe).is_file() else recipe.split("+")


def _is_file(part: str) -> bool:
    return Path(part).suffix in (".yaml", ".yml")


def _read_recipe(parts: list[str], seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of parts, each laid on top of those before it; a join is named after its parts."""
    values: dict[str, Any] = {}
    names = []
    for part in parts:
        own = _read_part(part, seen)
        names.append(own.get("name", part.rpartition("/")[2].removesuffix(".yaml")))
        values = lay(values, own)
    return values | {"name": "+".join(map(str, names))} if len(parts) > 1 else values


def _read_part(part: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """The values of a file or shipped name on top of those it extends.

    A file that is extended is looked for beside the file that extends it.
    """
    if part in seen:
        raise ConfigError(f"recipes extend each other in a circle: {' -> '.join((*seen, part))}")
    path = Path(part)
    if _is_file(part):
        if not path.is_file():
            raise ConfigError(f"recipe file {path} does not exist; check the path")
        try:
            values = _read_yaml(path.read_text(encoding="utf-8"), part)
        except UnicodeDecodeError:
            raise ConfigError(f"recipe file {path} is not UTF-8 text; save it again") from None
    else:
        shipped = _shipped()
        if part not in shipped:
            raise ConfigError(f"unknown recipe {part!r}{suggest(part, shipped)}")
        values = _read_yaml(shipped[part].read_text(encoding="utf-8"), part)
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"extends: {parent!r} is not the name of a recipe or of a YAML file")
    below = [str(path.parent / p) if _is_file(p) else p for p in parent.split("+")]
    return lay(_read_recipe(below, (*seen, part)), values)


def lay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`merge`, with what `if_summary` holds laid in as soon as the task is known.

    A method's weights may differ between the kinds of task; a part that has both puts those for
    summaries under that key.
    """
    kind = _task_kind(base, over)
    if kind is not None:
        base, over = (_settled(values, kind) for values in (base, over))
    return merge(base, over)


def _task_kind(*layers: dict[str, Any]) -> str | None:
    """label or summary, by the topmost `task` that says so; None where no task is known."""
    kind: str | None = None
    for task in (values.get("task") for values in layers):
        if isinstance(task, dict):
            known = TASKS.get(str(task.get("name")))
            kind = task.get("kind") or (known.kind if known else kind or "label")
    return kind


def _settled(values: dict[str, Any], kind: str) -> dict[str, Any]:
    rest = {key: value for key, value in values.items() if key != "if_summary"}
    more = values.get("if_summary", {})
    if not isinstance(more, dict):
        raise ConfigError(
            f"if_summary is {more!r}; it holds settings for summary tasks, by section"
        )
    return merge(rest, more) if kind == "summary" else rest


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
        # YAML 1.1 reads 1e-4 as a string; a number is meant, unless it is quoted
        value = float(value) if value == text.strip() and _is_number(value) else value
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


def _known_keys(location: tuple[int | str, ...], schema: type[Section]) -> list[str]:
    """The keys allowed where an unknown one was found."""
    model: Any = schema
    for part in location[:-1]:
        field = model.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not isinstance(field.annotation, type):
            return []
        model = field.annotation
    return list(getattr(model, "model_fields", {}))


def _explain(error: ValidationError, schema: type[Section] = Config) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(map(str, item["loc"])) or "configuration"
        if item["type"] == "extra_forbidden":
            known = _known_keys(item["loc"], schema)
            lines.append(f"unknown key {key!r}{suggest(str(item['loc'][-1]), known)}")
        else:
            quote = item["type"] == "string_type" and isinstance(item["input"], bool | int | float)
            hint = f", YAML reads it as {item['input']!r}; quote it" if quote else ""
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}{hint}")
    return "; ".join(lines)


def load_config(recipe: str = "tiny", settings: tuple[str, ...] | list[str] = ()) -> Config:
    """Resolve a recipe (shipped names and YAML files joined by `+`) and `--set` into a Config.

    Raises ConfigError, which names the key and what would be right.
    """
    values = _read_recipe(_parts(recipe))
    for setting in settings:
        values = lay(values, parse_setting(setting))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None


def load_task(path: str | Path) -> TaskData:
    """The task of a YAML file: a recipe's `task:` section, or that section on its own.

    Raises ConfigError, which names the key and what would be right.
    """
    values = _read_recipe([str(path)])
    try:
        return TaskData.model_validate(values.get("task", values))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, TaskData)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, complete."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
