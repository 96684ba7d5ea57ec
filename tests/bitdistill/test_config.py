"""Recipes, files, `extends` and `--set`: what is accepted, and how the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bitdistill.config import (
    ConfigError,
    dump_config,
    load_config,
    merge,
    parse_setting,
    recipe_names,
)
from bitdistill.schema import Config

OWN_TASK = """
extends: tiny
name: tickets
task:
  name: tickets
  prompt: "{subject}\\n{body}\\nQueue:"
  inputs: [subject, body]
  target: queue
  labels: [" billing", " technical", " other"]
  train: train.csv
  validation: validation.csv
  columns: {subject: title}
"""


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_validate_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name.rpartition("/")[2]
    file = tmp_path / "dumped.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(file)) == config
    assert load_config(str(file), ["distill.epochs=3"]).distill.steps is None


def test_tiny_is_the_default() -> None:
    assert "tiny" in recipe_names()
    assert load_config() == load_config("tiny")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'?"),
        ("distill.learning_rte=1", "unknown key 'distill.learning_rte'; did you mean 'learning_"),
        ("distill.logits.temprature=1", "'distill.logits.temprature'; did you mean 'temperature'?"),
        ("task.zzz=1", "unknown key 'task.zzz'; known: name, train, validation"),
        ("distill.batch_size=0", "distill.batch_size: Input should be greater than 0"),
        ("distill.learning_rate=nan", "distill.learning_rate: "),
        ("distill.relations.layer=1.5", "should be less than or equal to 1"),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
        ("seed=99999999999999999999", "seed: "),
        ("student.norm_style=subln", "student.norm_style: Input should be 'paper', 'allnorm' or"),
        ("task.name=sst22", "task: unknown task 'sst22'; did you mean 'sst2'?"),
        ("name=a/b", "name: name must be a plain word"),
        ("distill=3", "distill: "),
        ("seed", "--set 'seed' is not of the form key.key=value"),
        ("=1", "--set '=1' is not of the form key.key=value"),
        ("seed=[1", "--set seed: the value is not valid YAML"),
        ("distill.ce=0", "distill: relations.target_ratio is a share of the cross-entropy, and ce"),
        ("distill.steps=null", "distill: give exactly one of steps and epochs"),
        ("teacher.enabled=false", "teacher.enabled: every run has this stage; see --until"),
        ("distill.enabled=false", "distill.enabled: every run has this stage"),
        ("base.candidates=labels", "base.candidates: text has no labels; use vocabulary"),
        ("name=7", "name: Input should be a valid string, YAML reads it as 7; quote it"),
        (
            "task.labels=[yes, 'no']",
            "task.labels.0: Input should be a valid string, YAML reads it as True; quote it",
        ),
        ("teacher.steps=true", "teacher: steps is a number; true is none"),
        ("distill.learning_rate=no", "distill: learning_rate is a number; false is none"),
        ("if_summary=3", "if_summary is 3; it holds settings for summary tasks, by section"),
        ("pretrain.enabled=true", "pretrain: give exactly one of steps and epochs"),
    ],
)
def test_settings_that_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [setting])
    assert message in str(caught.value)


def test_the_remedy_for_text_that_looks_like_a_number_works() -> None:
    assert load_config("tiny", ["name='7'"]).name == "7"


def test_every_mistake_is_named() -> None:
    with pytest.raises(ConfigError, match=r"distill\.batch_size: .*; unknown key 'sed'"):
        load_config("tiny", ["distill.batch_size=-1", "sed=1"])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a=1e-4", {"a": 1e-4}),
        ("a.b=2.5E6", {"a": {"b": 2.5e6}}),
        ("a.b.c=null", {"a": {"b": {"c": None}}}),
        ("a=true", {"a": True}),
        ("a=x=y", {"a": "x=y"}),
        ("a=", {"a": None}),
        ("a=[1, two]", {"a": [1, "two"]}),
        ("a={b: 1}", {"a": {"b": 1}}),
        ("a=7", {"a": 7}),
        ("a='7'", {"a": "7"}),
    ],
)
def test_settings_are_yaml_and_numbers(setting: str, value: dict[str, object]) -> None:
    assert parse_setting(setting) == value


def test_settings_apply_in_order_and_reach_the_schema() -> None:
    config = load_config("tiny", ["seed=1", "seed=2", "distill.learning_rate=1e-4"])
    assert (config.seed, config.distill.learning_rate) == (2, 1e-4)
    config = load_config("tiny", ["student.activation_bits=null"])
    assert config.student.activation_bits is None


@pytest.mark.parametrize(
    ("over", "steps", "epochs"),
    [
        ({"epochs": 2}, None, 2),
        ({"steps": 7}, 7, None),
        ({"steps": 7, "epochs": None}, 7, None),
        ({"steps": None, "epochs": 3}, None, 3),
        ({"batch_size": 4}, 5, None),
    ],
)
def test_steps_and_epochs_replace_each_other(
    over: dict[str, object], steps: int | None, epochs: float | None
) -> None:
    merged = merge({"distill": {"steps": 5, "anneal": 0.5}}, {"distill": over})["distill"]
    assert (merged.get("steps"), merged.get("epochs")) == (steps, epochs)
    assert merged["anneal"] == 0.5


def test_both_steps_and_epochs_are_refused() -> None:
    with pytest.raises(ConfigError, match="teacher: give exactly one of steps and epochs"):
        load_config("tiny", ["teacher={steps: 1, epochs: 1}"])


def test_merge_leaves_its_arguments_alone() -> None:
    base, over = {"a": {"b": 1}, "steps": 3}, {"a": {"c": 2}, "epochs": 1}
    assert merge(base, over) == {"a": {"b": 1, "c": 2}, "epochs": 1}
    assert (base, over) == ({"a": {"b": 1}, "steps": 3}, {"a": {"c": 2}, "epochs": 1})


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match="unknown recipe 'tinny'; did you mean 'tiny'"):
        load_config("tinny")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("- a\n- b\n", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
        ("name: x\n", "model: Field required"),
        ("extends: tinny\n", "unknown recipe 'tinny'"),
        ("extends: 5\n", "extends: 5 is not the name of a recipe"),
        ("extends: other.yaml\n", "other.yaml does not exist; check the path"),
        ("extends: own.yaml\n", "extend each other in a circle"),
    ],
)
def test_files_that_are_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(str(file))
    assert message in str(caught.value)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"own.yaml is not UTF-8 text; save it again"):
        load_config(str(tmp_path / "own.yaml"))


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"recipe file nowhere/own.yaml does not exist"):
        load_config("nowhere/own.yaml")


def test_a_file_extends_a_neighbour_which_extends_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("extends: tiny\nname: below\nseed: 3\n")
    (tmp_path / "above.yml").write_text("extends: below.yaml\nname: above\nteacher: {epochs: 2}\n")
    config = load_config(str(tmp_path / "above.yml"))
    tiny = load_config("tiny")
    assert (config.name, config.seed) == ("above", 3)
    assert (config.teacher.steps, config.teacher.epochs) == (None, 2)
    assert config.teacher.learning_rate == tiny.teacher.learning_rate
    assert config.distill == tiny.distill


def test_a_task_of_your_own(tmp_path: Path) -> None:
    file = tmp_path / "tickets.yaml"
    file.write_text(OWN_TASK, encoding="utf-8")
    task = load_config(str(file)).task.resolve()
    assert (task.name, task.kind, task.target, task.hub) == ("tickets", "label", "queue", None)
    assert task.columns == ("subject", "body")
    assert task.labels == (" billing", " technical", " other")
    assert task.max_new_tokens == 1


def test_a_summary_task_of_your_own() -> None:
    own = "{name: s, kind: summary, prompt: '{text} TL;DR:', inputs: [text], target: summary}"
    task = load_config("tiny", [f"task={own}", "task.max_new_tokens=40"]).task.resolve()
    assert (task.kind, task.labels, task.max_new_tokens) == ("summary", (), 40)


def test_a_built_in_task_is_not_changed_in_vain() -> None:
    with pytest.raises(ConfigError, match="built in, so labels, max_new_tokens would have"):
        load_config("tiny", ["task={name: sst2, labels: [a, b], max_new_tokens: 4}"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels", [], "a task of your own needs prompt, inputs, target and (label) labels"),
        ("target", None, "a task of your own needs prompt, inputs, target and (label) labels"),
        (
            "prompt",
            "{titel}",
            "prompt has the fields ['titel'], the inputs are ['subject', 'body']",
        ),
        ("prompt", "no input", "prompt has the fields []"),
        ("prompt", "{subject.x}", "prompt has the fields ['subject.x']"),
        ("prompt", "{subject} }", "prompt is not a template"),
        ("labels", [" Yes", "yes"], "must differ in more than case and spaces"),
    ],
)
def test_mistakes_in_a_task_of_your_own(key: str, value: object, message: str) -> None:
    values = yaml.safe_load(OWN_TASK)["task"] | {key: value}
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [f"task={yaml.safe_dump(values, default_flow_style=True)}"])
    assert message in str(caught.value)


def test_a_configuration_cannot_be_changed() -> None:
    config: Config = load_config("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 5  # type: ignore[misc]
