"""Whatever happens while a state is written, the last good one loads: kill, full disk, damage.

A child process is killed at every single file operation of a save in turn (an audit hook counts
them), which is every point where a crash can leave something different behind.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import advance, settings, weights

from bitdistill import manifest
from bitdistill.hardware import TrainingError
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.training import Fit
from bitdistill.training_state import saved_states

# the child of a fork writes files and dies; it needs none of the parent's threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

FILES = ("model.safetensors", "optimizer.safetensors", "position.json", manifest.MANIFEST)
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")


def killed_at(operation: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies by SIGKILL before that file operation; false if it ended."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, arguments: object) -> None:
            nonlocal left
            if event not in OPERATIONS:
                return
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_save_killed_anywhere(start: Callable[..., Fit]) -> None:
    """The state before or the new one loads, each exactly; the next save works."""
    fit, again = start(settings()), start(settings())
    good: dict[int, dict[str, torch.Tensor]] = {}
    for _ in range(2):  # the third save also removes the first
        advance(fit, 1)
        fit.save()
        good[fit.step] = weights(fit)
    before = fit.state_dir.with_name("before")
    shutil.copytree(fit.state_dir, before)
    advance(fit, 1)
    good[fit.step] = weights(fit)
    operation, reached = 0, []
    while killed_at(operation, fit.save):
        again.restore()
        reached.append(again.step)
        assert all(torch.equal(v, good[again.step][k]) for k, v in weights(again).items())
        fit.save()
        again.restore()
        assert again.step == 3
        advance(again, 1)
        again.save()  # after which nothing of the dead process is left
        assert [p.name for p in sorted(fit.state_dir.iterdir())] == [
            "step-00000003",
            "step-00000004",
        ]
        shutil.rmtree(fit.state_dir)
        shutil.copytree(before, fit.state_dir)
        operation += 1
    assert operation > 20
    assert set(reached) == {2, 3}
    assert reached == sorted(reached)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_replacement_killed_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    """The old directory or the new one is there; without an exchange call, after the next start."""
    if not exchange:
        monkeypatch.setattr(manifest, "_exchange", lambda *paths: False)
    path = tmp_path / "artifact"

    def write(text: str) -> None:
        with manifest.new_directory(path, force=True) as partial:
            (partial / "weights").write_text(text)
            manifest.write_manifest(partial, "artifact", {})

    def abandoned() -> None:
        with pytest.raises(KeyError), manifest.new_directory(path, force=True):
            raise KeyError

    operation, found = 0, []
    write("old")
    while killed_at(operation, lambda: write("new")):
        if exchange:
            manifest.verify_files(path, manifest.read_manifest(path))
        elif not path.exists():
            with pytest.raises(manifest.FormatError, match=r"was being replaced when .* rename"):
                manifest.read_manifest(path)
        abandoned()
        manifest.verify_files(path, manifest.read_manifest(path))
        assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
        found.append((path / "weights").read_text())
        write("old")
        operation += 1
    assert operation > 10
    assert set(found) == {"old", "new"}


# --- a full disk ----------------------------------------------------------------------------------


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refused_then_fine(
    fit: Fit, again: Fit, cramped: contextlib.AbstractContextManager[Any]
) -> None:
    """A save without room leaves the state before; with room it works, from the same memory."""
    advance(fit, 1)
    with cramped, pytest.raises(TrainingError) as caught:
        fit.save()
    message = str(caught.value)
    assert "the training state of step 2 could not be written" in message
    assert message.endswith("the state of step-00000001 is kept, and --resume continues it")
    assert [p.name for p in fit.state_dir.iterdir()] == ["step-00000001"]
    again.restore()
    assert again.step == 1
    fit.save()
    again.restore()
    assert again.step == 2


@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
def test_no_room_for_a_file(start: Callable[..., Fit], share: float) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    size = (fit.state_dir / "step-00000001" / "model.safetensors").stat().st_size
    refused_then_fine(fit, start(settings()), largest_file(int(share * size)))


def test_no_room_for_a_stage(recipe: Callable[..., Config], tmp_path: Path) -> None:
    """Neither for its model nor for what its teacher said: an OSError, and nothing half-made."""
    out = tmp_path / "run"
    with largest_file(20_000), pytest.raises(OSError, match=r"run/teacher could not be written \("):
        train(recipe(), out, quiet=True)
    assert [p.name for p in out.iterdir() if "teacher" in p.name] == []
    train(recipe(), out, quiet=True, until="refined")
    with largest_file(20_000), pytest.raises(OSError, match=r"00000\.safetensors could not be wr"):
        train(recipe("distill.cache=4"), out, quiet=True)
    assert train(recipe("distill.cache=4"), out, quiet=True).is_dir()


@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_a_full_disk(start: Callable[..., Fit], tmp_path: Path, share: float) -> None:
    """A real one: a file system of a few hundred kilobytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fit, again = start(settings()), start(settings())
    advance(fit, 1)
    fit.save()
    size = sum(p.stat().st_size for p in fit.state_dir.rglob("*"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int((1 + share) * size)}", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can be mounted by root only")
    try:
        shutil.copytree(fit.state_dir, disk / "states")
        fit.state_dir = again.state_dir = disk / "states"
        larger = ["mount", "-o", f"remount,size={8 * size}", str(disk)]
        with contextlib.ExitStack() as room:
            room.callback(subprocess.run, larger, check=True)
            refused_then_fine(fit, again, room)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- damage ---------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])


@pytest.mark.parametrize(
    ("file", "how"),
    [(f, h) for f in FILES for h in ("truncated", "altered", "removed")],
)
def test_the_state_before_a_damaged_one_is_used(
    start: Callable[..., Fit], file: str, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """And what follows is the uninterrupted run, bit for bit."""
    fit = start(settings(), "packed")
    advance(fit, 1)
    fit.save()
    expected = advance(fit, 1)
    fit.save()
    newest = saved_states(fit.state_dir)[-1]
    damage(newest / file, how)
    again = start(settings(), "packed")
    again.reporter.console.quiet = False
    again.restore()
    said = "".join(capfd.readouterr().err.split())  # lines are wrapped at 80
    assert "asavedstateisdamaged(" in said
    assert file in said
    assert "theonebeforeit" in said
    assert again.step == 1
    assert advance(again, 1) == expected
    assert all(torch.equal(v, weights(fit)[k]) for k, v in weights(again).items())
    again.save()  # of the step whose state was damaged
    assert sorted(p.name for p in fit.state_dir.iterdir()) == [
        "step-00000001",
        "step-00000002",
        "step-00000002.damaged",
    ]


def test_no_whole_state(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    for _ in range(2):
        advance(fit, 1)
        fit.save()
    for state in saved_states(fit.state_dir):
        damage(state / "model.safetensors", "truncated")
    before = weights(again := start(settings()))
    with pytest.raises(manifest.FormatError) as caught:
        again.restore()
    assert "holds no whole training state" in str(caught.value)
    assert str(caught.value).endswith("remove it to start the stage again")
    assert len(saved_states(fit.state_dir)) == 2
    assert all(torch.equal(v, before[k]) for k, v in weights(again).items())
