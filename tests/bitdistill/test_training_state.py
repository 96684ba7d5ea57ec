"""Training states: exact resumption, whole or not at all, and refused when damaged."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from short_runs import advance, anneal_of, settings, weights

from bitdistill import manifest, training_state
from bitdistill.hardware import TrainingError
from bitdistill.schema import Machine
from bitdistill.training import Fit
from bitdistill.training_state import Budget, discard, saved_states


def steps_saved(fit: Fit) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in saved_states(fit.state_dir)]


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
    generator = torch.get_rng_state()
    part.save()
    torch.manual_seed(99)
    rest = start(options, data)
    rest.restore()
    assert torch.equal(torch.get_rng_state(), generator)
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

    def signalled(self: Fit, window: Any) -> None:
        optimize(self, window)
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


@pytest.mark.parametrize(("save_steps", "saved"), [(None, [10]), (4, [10, 14]), (3, [10, 13])])
def test_run_continues_where_it_was_saved(
    start: Callable[..., Fit],
    monkeypatch: pytest.MonkeyPatch,
    save_steps: int | None,
    saved: list[int],
) -> None:
    """Through `run` itself: its own saves, the relation weight not fitted again."""
    options = settings(steps=20)
    whole = start(options, "packed")
    terms = whole.run()
    part = start(options, "packed")
    part.machine = Machine(device="cpu", save_minutes=1e-9, save_steps=save_steps)
    monkeypatch.setattr(training_state, "SHARE", float("inf"))  # at each record
    optimize = Fit.optimize

    def interrupted(self: Fit, window: Any) -> None:
        if self.step == 14:
            raise KeyboardInterrupt
        optimize(self, window)

    monkeypatch.setattr(Fit, "optimize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        part.run()
    monkeypatch.undo()
    rest = start(options, "packed")
    rest.restore()
    assert steps_saved(part) == saved
    assert rest.step == saved[-1]
    assert rest.run().keys() == terms.keys()
    final = weights(whole)
    assert all(torch.equal(value, final[name]) for name, value in weights(rest).items())


def test_saves_take_a_twentieth_of_the_time() -> None:
    """By a clock of its own: ten minutes, or twenty times what the last save took."""
    now = [1000.0]
    budget = Budget(10, None, 0, lambda: now[0])

    def first_due() -> float:
        """Seconds from the end of the last save."""
        start = now[0]
        while not budget.due(1, True):
            now[0] += 1
        assert not budget.due(1, False)  # only after a record
        return now[0] - start

    for seconds, wait in ((5, 601), (100, 601), (31, 2001), (1, 621), (1, 601)):
        assert first_due() == wait
        with budget.saving(1):
            now[0] += seconds


def test_steps_between_saves_are_taken_at_their_word() -> None:
    now = [0.0]
    budget = Budget(10, 3, 4, lambda: now[0])
    assert [budget.due(step, False) for step in (5, 6, 7)] == [False, False, True]
    with budget.saving(7):
        now[0] += 1000
    assert [budget.due(step, True) for step in (8, 9, 10)] == [False, False, True]


def test_a_state_of_the_last_step_is_complete(start: Callable[..., Fit]) -> None:
    fit = start(settings(steps=4))
    advance(fit, 4)
    fit.save()
    again = start(settings(steps=4))
    again.restore()
    assert again.run() == {}
    assert not again.model.training


def test_the_state_of_another_run_is_refused(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    with pytest.raises(TrainingError, match=r"state of another run \(total differ\); continue"):
        start(settings(steps=9)).restore()
    other = start(settings())
    other.fingerprint = "changed"
    with pytest.raises(
        TrainingError, match=r"\(fingerprint differ\).*or remove .*\.training to start"
    ):
        other.restore()
    file = fit.state_dir / "step-00000001" / manifest.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 0}))
    with pytest.raises(manifest.FormatError, match="format version 0, this bitdistill reads 1"):
        start(settings()).restore()


def test_discarding_a_state_twice_is_harmless(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    advance(fit, 1)
    fit.save()
    discard(fit.state_dir)
    assert not fit.state_dir.exists()
    discard(fit.state_dir)


def test_the_last_states_are_kept(start: Callable[..., Fit]) -> None:
    fit = start(settings())
    fit.machine = Machine(device="cpu", keep_states=3)
    for _ in range(5):
        advance(fit, 1)
        fit.save()
        fit.save()  # as a signal would, right after
    assert steps_saved(fit) == [3, 4, 5]
    assert sorted(p.name for p in fit.state_dir.iterdir()) == [
        f"step-{step:08d}" for step in (3, 4, 5)
    ]


def test_a_run_leaves_the_global_generators_of_others_alone(start: Callable[..., Fit]) -> None:
    """Python's and NumPy's: if a run drew on them, a state would have to hold them."""
    before = random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    for data in ("task", "packed"):
        start(settings(), data).run()
    assert (random.getstate(), repr(np.random.get_state())) == before  # noqa: NPY002
