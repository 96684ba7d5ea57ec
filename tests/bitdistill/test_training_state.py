"""Training states: exact resumption, whole or not at all, and refused when damaged."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from short_runs import advance, anneal_of, settings, weights

from bitdistill import manifest
from bitdistill.hardware import TrainingError
from bitdistill.schema import Machine
from bitdistill.training import Fit
from bitdistill.training_state import discard


@pytest.mark.parametrize("data", ["task", "packed"])
@pytest.mark.parametrize("stop", [3, 7])
def test_a_resumed_run_is_the_uninterrupted_one(
    start: Callable[..., Fit], data: str, stop: int
) -> None:
    """Bit for bit: weights, optimizer, data, annealing, relation weight and random state."""
    options = settings()
    whole, part = start(options, data), start(options, data)
    for fit in (whole, part):
        fit.objective.fit_relation_weight(fit.batches.window(0))
    expected = advance(whole, 8)
    advance(part, stop)
    random = torch.get_rng_state()
    part.save()
    torch.manual_seed(99)
    rest = start(options, data)
    rest.restore()
    assert torch.equal(torch.get_rng_state(), random)
    assert rest.step == stop
    assert rest.objective.relation_weight == part.objective.relation_weight
    assert advance(rest, 8 - stop) == expected[stop:]
    final = weights(whole)
    for name, value in weights(rest).items():
        assert torch.equal(value, final[name]), name
    assert anneal_of(rest) == anneal_of(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(
    start: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Between two steps; the rest of the run is then the uninterrupted one, bit for bit."""
    options = settings(steps=12)
    whole, part = start(options, "packed"), start(options, "packed")
    terms = whole.run()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    optimize = Fit.optimize

    def signalled(self: Fit, window: Any, sums: Any) -> None:
        optimize(self, window, sums)
        if self.step == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Fit, "optimize", signalled)
    with pytest.raises(TrainingError, match=r"stopped at step 5 of 12 .*; --resume continues it"):
        part.run()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    rest = start(options, "packed")
    rest.restore()
    assert rest.step == 5
    assert rest.run() == terms
    final = weights(whole)
    for name, value in weights(rest).items():
        assert torch.equal(value, final[name]), name


def test_run_continues_where_it_was_saved(
    start: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through `run` itself: its own saves, the relation weight not fitted again."""
    options = settings(steps=20)
    whole = start(options, "packed")
    terms = whole.run()
    part = start(options, "packed")
    part.machine = Machine(device="cpu", save_minutes=1e-9)
    optimize = Fit.optimize

    def interrupted(self: Fit, window: Any, sums: Any) -> None:
        if self.step == 14:
            raise KeyboardInterrupt
        optimize(self, window, sums)

    monkeypatch.setattr(Fit, "optimize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    monkeypatch.undo()
    rest = start(options, "packed")
    rest.restore()
    assert rest.step == 10
    assert rest.run() == terms
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(rest).items())


def test_a_state_of_the_last_step_is_complete(start: Callable[..., Fit]) -> None:
    fit = start(settings(steps=4))
    advance(fit, 4)
    fit.save()
    again = start(settings(steps=4))
    again.restore()
    assert again.run() == {}
    assert not again.model.training


def test_an_interrupted_save_leaves_the_old_state(
    start: Callable[..., Fit], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = start(settings())
    advance(fit, 2)
    fit.save()
    kept = weights(fit)
    advance(fit, 1)

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(manifest, "write_json", full)
    with pytest.raises(OSError, match="no space left"):
        fit.save()
    monkeypatch.undo()
    assert [p.name for p in fit.state_dir.parent.glob("*.partial")] == []
    again = start(settings())
    again.restore()
    assert again.step == 2
    assert all(torch.equal(value, kept[name]) for name, value in weights(again).items())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "position.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
def test_a_damaged_state_is_refused(start: Callable[..., Fit], file: str, damage: str) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    path = fit.state_dir / file
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-5])
    else:
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    with pytest.raises(manifest.FormatError, match=file):
        start(settings()).restore()
    assert fit.state_dir.is_dir()


def test_the_state_of_another_run_is_refused(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    with pytest.raises(TrainingError, match=r"state of another run \(total differ\); continue"):
        start(settings(steps=9)).restore()
    other = start(settings())
    other.fingerprint = "changed"
    with pytest.raises(TrainingError, match=r"\(fingerprint differ\).*or remove it to start stage"):
        other.restore()
    content = json.loads((fit.state_dir / manifest.MANIFEST).read_text())
    (fit.state_dir / manifest.MANIFEST).write_text(json.dumps(content | {"format_version": 0}))
    with pytest.raises(manifest.FormatError, match="format version 0, this bitdistill reads 1"):
        start(settings()).restore()


def test_discarding_a_state_twice_is_harmless(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    discard(fit.state_dir)
    assert not fit.state_dir.exists()
    discard(fit.state_dir)
