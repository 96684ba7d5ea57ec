"""Whole recipes of a few steps: what is written, skipped, refused and continued."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import bitdistill
from bitdistill import checkpoint, manifest
from bitdistill.config import Config, load_config
from bitdistill.quantize import BitLinear
from bitdistill.recipe import train
from bitdistill.training import Fit, TrainingError

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()
SHORT = {"steps": 2, "batch_size": 2, "max_length": 24, "learning_rate": 1e-3}


@pytest.fixture
def recipe(
    make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> Callable[..., Config]:
    """`recipe(*settings)`: a run of two steps a stage on a local random teacher and file."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    make_teacher("qwen3").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\n")
    rows = [
        {"sentence": f"{WORDS[i]} {WORDS[-i]}", "label": i % 2, "gist": WORDS[i]} for i in range(12)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "name": "test",
        "model": {"source": str(tmp_path / "model")},
        "task": {"name": "sst2", "train": str(data), "validation": str(data)},
        "machine": {"device": "cpu"},
        "teacher": SHORT,
        "bitnet_sft": SHORT | {"enabled": False},
        "pretrain": SHORT | {"enabled": False, "logits": {"weight": 0.5, "temperature": 1.0}},
        "distill": SHORT
        | {
            "anneal": 0.5,
            "logits": {"weight": 1.0, "temperature": 2.0},
            "relations": {"target_ratio": 0.1, "split_heads": 4},
        },
        "student": {"calibration_batches": 2},
    }
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(values))
    return lambda *settings: load_config(str(file), settings)


def log_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def stages_of(out: Path) -> set[str]:
    return {p.parent.name for p in out.glob("*/bitdistill.json")}


def interrupt(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Save after every step, and stop `stage` as a user would, before that step."""
    optimize = Fit.optimize

    def stopping(self: Fit, window: Any, sums: Any) -> None:
        if self.name == stage and self.step > 0:
            self.save()
        if self.name == stage and self.step == step:
            raise KeyboardInterrupt
        optimize(self, window, sums)

    monkeypatch.setattr(Fit, "optimize", stopping)


def test_the_embedded_recipe(tmp_path: Path) -> None:
    short = [f"{stage}.steps=2" for stage in ("base", "teacher", "bitnet_sft", "distill")]
    short += [f"{stage}.batch_size=4" for stage in ("base", "teacher", "bitnet_sft", "distill")]
    config = load_config("tiny", [*short, "task.limit_train=50", "student.calibration_batches=1"])
    out = tmp_path / "run"
    student = train(config, out, quiet=True)
    assert student == out / "student"
    assert stages_of(out) == {"base", "teacher", "bitnet-sft", "refined", "student"}
    methods = {name: manifest.read_manifest(out / name)["method"] for name in stages_of(out)}
    assert methods == {
        "base": "base",
        "teacher": "fp16-sft",
        "bitnet-sft": "bitnet-sft",
        "refined": "refined",
        "student": "bitdistill",
    }
    assert load_config(str(out / "config.yaml")) == config
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == ["config.yaml", "log.jsonl"]


def test_manifests_say_what_a_stage_is(recipe: Callable[..., Config], tmp_path: Path) -> None:
    config = recipe("bitnet_sft.enabled=true")
    out = tmp_path / "run"
    train(config, out, quiet=True)
    assert stages_of(out) == {"teacher", "bitnet-sft", "refined", "student"}
    content = manifest.read_manifest(out / "student", "student")
    manifest.verify_files(out / "student", content)
    expected = {
        "stage": "student",
        "method": "bitdistill",
        "base_model": config.model.source,
        "family": "qwen3",
        "licence": "mit",
        "norm_style": "paper",
        "activation_bits": 8,
        "parent": "refined",
        "recipe": "test",
        "validation": config.task.validation,
        "seed": 0,
    }
    assert {key: content[key] for key in expected} == expected
    assert content["task"]["labels"] == [" negative", " positive"]
    assert content["metrics"]["steps"] == 2
    assert set(content["metrics"]["terms"]) == {"ce", "logits", "relations"}
    assert content["metrics"]["relation_weight"] > 0
    assert 0 < content["metrics"]["zero_fraction"]["down_proj"] < 1
    gains = manifest.read_manifest(out / "refined")["metrics"]["gains"]
    assert len(gains) == 4
    card = (out / "student" / "README.md").read_text()
    assert "license: mit" in card
    assert f"base_model: {config.model.source}" in card
    direct = manifest.read_manifest(out / "bitnet-sft", "student")
    assert (direct["norm_style"], direct["parent"]) == ("none", None)


def test_gains_and_weights_survive_every_stage(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    """The student's norms move on from the calibrated gains, never from ones."""
    out = tmp_path / "run"
    train(recipe("pretrain.enabled=true", "pretrain.learning_rate=1e-7",
                 "distill.learning_rate=1e-7"), out, quiet=True)  # fmt: skip
    gains = manifest.read_manifest(out / "refined")["metrics"]["gains"]
    for stage in ("refined", "pretrained", "student"):
        model = checkpoint.load(out / stage)
        for name, module in model.named_modules():
            if isinstance(module, BitLinear) and module.norm is not None:
                expected = torch.full_like(module.norm.weight, gains[name])
                torch.testing.assert_close(module.norm.weight.data, expected, rtol=0, atol=1e-6)
                assert abs(gains[name] - 1) > 1e-3


def test_the_log_is_json_lines(recipe: Callable[..., Config], tmp_path: Path) -> None:
    train(recipe("pretrain.enabled=true"), tmp_path / "run", quiet=True)
    records = log_of(tmp_path / "run")
    assert [(r["stage"], r["step"]) for r in records] == [
        ("teacher", 2),
        ("pretrained", 2),
        ("student", 2),
    ]
    terms = [set(r) & {"ce", "logits", "relations"} for r in records]
    assert terms == [{"ce"}, {"ce", "logits"}, {"ce", "logits", "relations"}]
    assert all(r["learning_rate"] > 0 and r["tokens_per_second"] > 0 for r in records)


def test_a_complete_run_is_not_done_again(
    recipe: Callable[..., Config], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(recipe(), out, quiet=True)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*") if p.is_file()}
    assert train(recipe(), out) == out / "student"
    assert before == {
        p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*") if p.is_file()
    }
    said = capfd.readouterr()
    assert said.out == ""
    for stage in ("teacher", "refined", "student"):
        assert f"{stage}: complete, skipped" in said.err


@pytest.mark.parametrize(
    ("setting", "stage"),
    [
        ("seed=1", "teacher"),
        ("teacher.learning_rate=2e-3", "teacher"),
        ("student.norm_style=allnorm", "refined"),
        ("distill.logits.weight=2", "student"),
        ("method=bitdistill-paper", "student"),
    ],
)
def test_another_configuration_is_refused(
    recipe: Callable[..., Config], tmp_path: Path, setting: str, stage: str
) -> None:
    out = tmp_path / "run"
    train(recipe(), out, quiet=True)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(TrainingError) as caught:
        train(recipe(setting), out, quiet=True)
    assert str(caught.value) == (
        f"{out / stage} was made with another configuration; use another --out, or remove it and "
        "the stages after it"
    )
    assert before == {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_settings_of_the_machine_are_not_another_configuration(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    train(recipe(), tmp_path / "run", quiet=True)
    train(recipe("machine.save_minutes=1"), tmp_path / "run", quiet=True)


def test_a_directory_of_someone_else_is_left_alone(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    (tmp_path / "run" / "teacher").mkdir(parents=True)
    (tmp_path / "run" / "teacher" / "thesis.tex").write_text("years of work")
    with pytest.raises(manifest.FormatError, match=r"has no bitdistill.json"):
        train(recipe(), tmp_path / "run", quiet=True)
    assert (tmp_path / "run" / "teacher" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_an_interrupted_stage(
    recipe: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """It needs --resume, continues with it, and ends with what an uninterrupted run has."""
    section = {"student": "distill"}.get(stage, stage)
    config = recipe(f"{section}.steps=4")
    train(config, tmp_path / "whole", quiet=True)
    out = tmp_path / "run"
    interrupt(monkeypatch, stage, 3)
    with pytest.raises(KeyboardInterrupt):
        train(config, out, quiet=True)
    monkeypatch.undo()
    assert stage not in stages_of(out)
    state = out / f"{stage}.training"
    with pytest.raises(TrainingError) as caught:
        train(config, out, quiet=True)
    assert str(caught.value) == (
        f"stage {stage} was interrupted; pass --resume to continue it, or remove {state} to start "
        "it again"
    )
    with pytest.raises(TrainingError, match="is the state of another run"):
        train(recipe(f"{section}.steps=4", f"{section}.weight_decay=0.5"), out,
              resume=True, quiet=True)  # fmt: skip
    assert state.is_dir()
    train(config, out, resume=True, quiet=True)
    assert not state.exists()
    whole, resumed = (checkpoint.load(tmp_path / run / "student") for run in ("whole", "run"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resume_without_anything_to_continue(recipe: Callable[..., Config], tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run", resume=True, quiet=True)
    assert stages_of(tmp_path / "run") == {"teacher", "refined", "student"}


@pytest.mark.parametrize("start", ["base", "teacher"])
def test_where_the_student_starts(
    recipe: Callable[..., Config], tmp_path: Path, start: str
) -> None:
    out = tmp_path / "run"
    train(recipe(f"student.start={start}"), out, quiet=True)
    refined = checkpoint.load(out / "refined").state_dict()
    source = tmp_path / "model" if start == "base" else out / "teacher"
    from transformers import AutoModelForCausalLM

    origin = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert all(torch.equal(refined[name], value) for name, value in origin.items())
    parent = manifest.read_manifest(out / "refined")["parent"]
    assert parent == ("teacher" if start == "teacher" else None)


@pytest.mark.parametrize(
    ("settings", "norms"),
    [
        (["student.norm_style=allnorm"], 14),
        (["student.norm_style=none"], 0),
        (["student.calibrate=false", "student.activation_bits=null"], 4),
    ],
)
def test_switches_of_the_student(
    recipe: Callable[..., Config], tmp_path: Path, settings: list[str], norms: int
) -> None:
    train(recipe(*settings), tmp_path / "run", quiet=True)
    model = bitdistill.load(tmp_path / "run" / "student")
    linears = [m for m in model.modules() if isinstance(m, BitLinear)]
    assert sum(m.norm is not None for m in linears) == norms
    bits = None if "student.activation_bits=null" in settings else 8
    assert {m.activation_bits for m in linears} == {bits}


def test_pretraining_stands_between(recipe: Callable[..., Config], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(recipe("pretrain.enabled=true"), out, quiet=True)
    parents = {name: manifest.read_manifest(out / name)["parent"] for name in stages_of(out)}
    assert parents == {
        "teacher": None,
        "refined": None,
        "pretrained": "refined",
        "student": "pretrained",
    }


def test_a_summary_task(recipe: Callable[..., Config], tmp_path: Path) -> None:
    config = recipe("task.name=cnn_dailymail", "task.columns={article: sentence, highlights: gist}")
    student = train(config, tmp_path / "run", quiet=True)
    task = manifest.read_manifest(student)["task"]
    assert (task["kind"], task["target"]) == ("summary", "highlights")
    assert {"ce", "logits", "relations"} <= set(log_of(tmp_path / "run")[-1])


def test_data_that_is_wrong_destroys_nothing(recipe: Callable[..., Config], tmp_path: Path) -> None:
    out = tmp_path / "run"
    for column in ("sentence", "label"):
        with pytest.raises(ValueError, match=f"'text' is missing; .*map it with columns.{column}"):
            train(recipe(f"task.columns={{{column}: text}}"), out, quiet=True)
    assert stages_of(out) == set()
    train(recipe(), out, quiet=True)


@pytest.mark.parametrize("key", ["train", "validation", "corpus"])
def test_missing_files_are_found_before_the_first_stage(
    recipe: Callable[..., Config], tmp_path: Path, key: str
) -> None:
    setting = f"task.{key}=none.csv" if key != "corpus" else "corpus.sources=[task, none.csv]"
    with pytest.raises(FileNotFoundError, match=r"data file none.csv does not exist; check the"):
        train(recipe("pretrain.enabled=true", setting), tmp_path / "run", quiet=True)
    assert stages_of(tmp_path / "run") == set()


def test_a_loss_that_is_not_finite_leaves_no_stage(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"not finite at step 2; lower distill\.learning_rate"):
        train(recipe("distill.learning_rate=1e30"), out, quiet=True)
    assert stages_of(out) == {"teacher", "refined"}
    assert list(out.glob("*.partial")) == []
