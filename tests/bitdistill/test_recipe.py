"""Whole recipes of a few steps: stages, manifests, and the switches of the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from short_runs import log_of, stages_of

import bitdistill
from bitdistill import checkpoint, manifest
from bitdistill.config import load_config
from bitdistill.hardware import TrainingError
from bitdistill.quantize import BitLinear
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.teacher import name_of


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
    for name, rounded in {"bitnet-sft": True, "refined": False, "student": True}.items():
        table = checkpoint.load(out / name).get_input_embeddings().weight
        assert torch.equal(table.half().float(), table) == rounded  # where nothing follows
    files = ["config.yaml", "log.jsonl", "run.lock", "weights.jsonl"]
    assert sorted(p.name for p in out.iterdir() if p.is_file()) == files


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
        "base_model": name_of(config.model),
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
    assert content["metrics"]["tokens_in_all"] == content["metrics"]["tokens"] > 0
    assert set(content["metrics"]["terms"]) == {"ce", "logits", "relations", "gradient_norm"}
    assert content["metrics"]["relation_weight"] > 0
    assert 0 < content["metrics"]["zero_fraction"]["down_proj"] < 1
    gains = manifest.read_manifest(out / "refined")["metrics"]["gains"]
    assert len(gains) == 4
    card = (out / "student" / "README.md").read_text()
    assert "license: mit" in card
    assert f"base_model: {name_of(config.model)}" in card
    direct = manifest.read_manifest(out / "bitnet-sft", "student")
    assert (direct["norm_style"], direct["parent"]) == ("none", None)


def test_gains_and_weights_survive_every_stage(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    """The student's norms move on from the calibrated gains, never from ones."""
    out = tmp_path / "run"
    train(
        recipe(
            "pretrain.enabled=true", "pretrain.learning_rate=1e-7", "distill.learning_rate=1e-7"
        ),
        out,
        quiet=True,
    )
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
    tokens = {r["stage"]: r["tokens"] for r in records}
    metrics = manifest.read_manifest(tmp_path / "run" / "student")["metrics"]
    assert tokens["pretrained"] == 2 * 2 * 24  # steps of full sequences
    assert metrics["tokens_in_all"] == tokens["pretrained"] + tokens["student"]
    terms = [set(r) & {"ce", "logits", "relations"} for r in records]
    assert terms == [{"ce"}, {"ce", "logits"}, {"ce", "logits", "relations"}]
    assert all(r["learning_rate"] > 0 and r["tokens_per_second"] > 0 for r in records)


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
        remedy = rf"map it with --set task\.columns\.{column}=NAME"
        with pytest.raises(ValueError, match=f"'text' is missing; .*{remedy}"):
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


@pytest.mark.parametrize("key", ["validation", "corpus"])
def test_files_that_cannot_be_read_are_found_before_the_first_stage(
    recipe: Callable[..., Config], tmp_path: Path, key: str
) -> None:
    file = tmp_path / "other.csv"
    file.write_text("sentense,verdict\na,1\n")
    setting = f"task.{key}={file}" if key != "corpus" else f"corpus.sources=[task, {file}]"
    with pytest.raises(ValueError, match=r"column 'sentence' is missing|has no column 'text'"):
        train(recipe("pretrain.enabled=true", setting), tmp_path / "run", quiet=True)
    assert stages_of(tmp_path / "run") == set()


def test_a_loss_that_is_not_finite_leaves_no_stage(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        TrainingError, match=r"not finite .*at step 2; lower distill\.learning_rate"
    ):
        train(recipe("distill.learning_rate=1e30"), out, quiet=True)
    assert stages_of(out) == {"teacher", "refined"}
    assert list(out.glob("*.partial")) == []


def test_stages_that_no_task_shaped_are_shared(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    """Another seed and another task find stage 2 there; another stage 2 is another directory."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(f'{{"text": "the film {i} is not good"}}\n' for i in range(60)))
    shared = [f"shared={tmp_path / 'shared'}", "pretrain.enabled=true", f"corpus.sources=[{text}]"]
    train(recipe(*shared), tmp_path / "a", quiet=True)
    assert stages_of(tmp_path / "a") == {"teacher", "student"}
    (made,) = (p for p in (tmp_path / "shared").iterdir())
    assert stages_of(made) == {"refined", "pretrained"}
    before = (made / "pretrained" / "bitdistill.json").stat().st_mtime_ns
    other = recipe(*shared, "seed=1", "task.limit_train=8")
    train(other, tmp_path / "b", quiet=True)
    assert (made / "pretrained" / "bitdistill.json").stat().st_mtime_ns == before
    train(recipe(*shared, "pretrain.seed=1"), tmp_path / "c", quiet=True, until="pretrained")
    assert len(list((tmp_path / "shared").iterdir())) == 2
    assert stages_of(tmp_path / "c") == {"teacher"}
    with pytest.raises(ValueError, match="can be shared where"):
        recipe(*shared, "student.start=teacher")


def test_a_run_until_a_stage(recipe: Callable[..., Config], tmp_path: Path) -> None:
    assert train(recipe(), tmp_path / "run", quiet=True, until="teacher").name == "teacher"
    assert stages_of(tmp_path / "run") == {"teacher"}
    with pytest.raises(ValueError, match="no stage 'base' in this run; it has teacher, refined"):
        train(recipe(), tmp_path / "run", quiet=True, until="base")
