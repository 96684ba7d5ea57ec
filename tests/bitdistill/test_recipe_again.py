"""A recipe run a second time: skipped, refused, or continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Timer
from typing import Any

import pytest
import torch
from filelock import FileLock
from short_runs import stages_of

from bitdistill import checkpoint, distributed, manifest
from bitdistill.hardware import TrainingError
from bitdistill.inputs import Inputs
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.stages import fingerprint, plan_stages
from bitdistill.training import Fit


def interrupt(monkeypatch: pytest.MonkeyPatch, stage: str, step: int) -> None:
    """Save after every step, and stop `stage` as a user would, before that step."""
    optimize = Fit.optimize

    def stopping(self: Fit, window: Any) -> None:
        if self.name == stage and self.step > 0:
            self.save()
        if self.name == stage and self.step == step:
            raise KeyboardInterrupt
        optimize(self, window)

    monkeypatch.setattr(Fit, "optimize", stopping)


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
        train(
            recipe(f"{section}.steps=4", f"{section}.weight_decay=0.5"),
            out,
            resume=True,
            quiet=True,
        )
    assert state.is_dir()
    train(config, out, resume=True, quiet=True)
    assert not state.exists()
    metrics = [manifest.read_manifest(tmp_path / r / stage)["metrics"] for r in ("whole", "run")]
    assert metrics[0]["tokens"] == metrics[1]["tokens"] > 0
    whole, resumed = (checkpoint.load(tmp_path / run / "student") for run in ("whole", "run"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resume_without_anything_to_continue(recipe: Callable[..., Config], tmp_path: Path) -> None:
    train(recipe(), tmp_path / "run", resume=True, quiet=True)
    assert stages_of(tmp_path / "run") == {"teacher", "refined", "student"}


def test_two_trainings_in_one_folder(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """Each would remove the unfinished files of the other."""
    out = tmp_path / "run"
    out.mkdir()
    with FileLock(out / "run.lock"), pytest.raises(TrainingError, match="another training is wri"):
        train(recipe(), out, quiet=True)
    assert not stages_of(out)
    assert train(recipe(), out, quiet=True).is_dir()


@pytest.mark.parametrize("held", [1.5, 0.0])
def test_a_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: float) -> None:
    """In short waits, after each of which the processes of a run agree to go on waiting."""
    monkeypatch.setattr(distributed, "LOCK_SECONDS", 0.1)
    lock, asked = FileLock(tmp_path / "stage.lock", thread_local=False), []
    acquire = distributed._acquire
    monkeypatch.setattr(
        distributed, "_acquire", lambda *given: asked.append(given) or acquire(*given)
    )
    lock.acquire()
    Timer(held, lock.release, [True]).start()
    with distributed.World().locked(tmp_path / "stage.lock"):
        pass
    assert len(asked) > 5 * held


def test_what_stages_depend_on(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """Settings of other sections that reach a stage are part of what it is known by."""

    def marks(*settings: str) -> dict[str, str]:
        config = recipe("bitnet_sft.steps=2", "bitnet_sft.enabled=true", *settings)
        inputs = Inputs(config)
        stages = plan_stages(config, tmp_path, inputs)
        return {name: fingerprint(stage, config, inputs) for name, stage in stages.items()}

    plain = marks()
    for settings, changed in {
        ("student.activation_bits=null",): {"bitnet-sft", "refined", "student"},
        ("distill.batch_size=3",): {"refined", "student"},
        ("distill.mixtures=2",): {"refined", "student"},
        ("distill.learning_rate=0.5",): {"student"},
        ("student.calibrate=false",): {"refined", "student"},
    }.items():
        found = marks(*settings)
        assert {name for name in plain if found[name] != plain[name]} == changed, settings
