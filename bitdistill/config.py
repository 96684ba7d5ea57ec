"""Read a configuration: shipped recipes and YAML files, `extends`, and `--set a.b=c`.

The result is a `schema.Config`; every mistake becomes a ConfigError that names the key and, where
there is one, the key that was probably meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bitdistill.names import suggest
from bitdistill.schema import Config, Section, TaskData


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and the remedy."""


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(_recipes_in(resources.files("bitdistill") / "recipes"))


def _recipes_in(folder: Traversable, prefix: str = "") -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _recipes_in(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".yaml"):
            yield prefix + entry.name.removesuffix(".yaml")


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


def load_task(path: str | Path) -> TaskData:
    """The task of a YAML file: a recipe's `task:` section, or that section on its own.

    Raises ConfigError, which names the key and what would be right.
    """
    values = _read_recipe(str(path))
    try:
        return TaskData.model_validate(values.get("task", values))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, TaskData)}") from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, complete."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
