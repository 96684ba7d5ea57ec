"""The one training loop: every stage, teacher or student, runs through `fit`.

A step takes a window of micro-batches, sums the weighted terms' gradients, clips and updates. The
state that a resumed run needs is written beside the stage directory on a budget of minutes and
steps (training_state.py).
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from bitdistill import distributed
from bitdistill.data import Batch, Batches
from bitdistill.distributed import ALONE, World
from bitdistill.engine import Engine
from bitdistill.hardware import Hardware, TrainingError
from bitdistill.interrupt import Stop, stop_signals
from bitdistill.monitor import Monitor
from bitdistill.objective import Objective, recompute_activations
from bitdistill.optimizer import make_optimizer, schedule, total_steps
from bitdistill.prepare import Counts, count_window, prepare
from bitdistill.progress import Reporter
from bitdistill.quantize import set_integer, share_anneal
from bitdistill.schema import Machine, Training
from bitdistill.sequences import merge_states
from bitdistill.student import cast
from bitdistill.training_state import Budget, States, saved_states

LOG_EVERY = 10
TRITS_EVERY = 50
WEIGHT_RECORDS = 200  # of every linear, about, in a stage
# sections of the configuration, where a stage has another name
SECTIONS = {"bitnet-sft": "bitnet_sft", "pretrained": "pretrain", "student": "distill"}


class Fit:
    """One stage in training: model, optimizer, data and position."""

    def __init__(
        self,
        name: str,
        objective: Objective,
        batches: Batches,
        settings: Training,
        machine: Machine,
        reporter: Reporter,
        state_dir: Path,
        fingerprint: str = "",
        world: World = ALONE,
    ) -> None:
        self.fingerprint = fingerprint  # of everything the stage depends on
        self.name, self.objective, self.batches = name, objective, batches
        self.model: PreTrainedModel = objective.student
        self.settings, self.machine, self.reporter = settings, machine, reporter
        self.state_dir, self.world = state_dir, world
        self.hardware = Hardware.resolve(machine)
        self.total = total_steps(settings, batches)
        self.step, self.tokens = 0, 0
        self.unread = 0  # this device's tokens since the last record
        self.model.train()
        if objective.teacher is not None:
            teacher = cast(objective.teacher, self.hardware.dtype).to(self.hardware.device)
            teacher.eval().requires_grad_(False)
        self._integer = False
        if machine.recompute:
            recompute_activations(self.model, True)
        graphs = self.hardware.cuda and self.hardware.wants(machine.graphs) and world.size == 1
        if world.size > 1:
            distributed.shard(objective, self.model, self.hardware.device)
        else:
            objective.to(self.hardware.device)
        self.anneal = share_anneal(self.model)
        self.parts = distributed.own_parts(self.model)
        self.monitor = Monitor(objective, self.hardware, self.parts, world)
        moved = self.parts.values()
        self.optimizer = make_optimizer(moved, settings, self.hardware, graphs=graphs)
        rest = settings.clip_norm, self.hardware, world
        self.engine = Engine(objective, self.parts, self.optimizer, *rest, graphs=graphs)

    def fit_relation_weight(self) -> None:
        """Where a target ratio is asked for, find the relations' weight on the first window.

        Of task examples, the first that has labels: small batches may hold mixtures alone.
        """
        if self.objective.relations.target_ratio is None:
            return
        for step in range(self.batches.steps_per_epoch() or 1):
            window = self.batches.window(step)
            if self.world.any(any(bool((b["labels"] >= 0).any()) for b in window)):
                break
        with self.hardware.autocast():
            moved = [self.hardware.move(batch) for batch in window]
            self.objective.fit_relation_weight(moved, self.world.sum)

    def run(self) -> dict[str, float]:
        """Train to the end; the mean terms of the last records."""
        compiled = self.hardware.wants(self.machine.compile)
        if compiled:
            self.objective.compile_head()
        with self.engine.stream():
            if self.step == 0:
                self.fit_relation_weight()  # once: no reason to compile layers
                self._record_histogram()
            if compiled:
                self.objective.compile()
            self.anneal.fill_(1.0)
            last = self._loop()
            self._check_weights()
            self._record_histogram()
        self._restore_model()
        return last

    def _restore_model(self) -> None:
        """The model as it is saved and used: fully ternary, with nothing of the training on it."""
        self.anneal.fill_(1.0)
        self.objective.release()
        set_integer(self.model, False)
        recompute_activations(self.model, False)
        self.model.eval()

    def _loop(self) -> dict[str, float]:
        """Steps to the end, with records, saved states and an ear for signals."""
        read = self.step
        last: dict[str, float] = {}
        machine = self.machine
        budget = Budget(machine.save_minutes, machine.save_steps, self.step)
        with self.reporter.stage(self.name, self.total, self.step) as meter, stop_signals() as stop:
            while self.step < self.total:
                with meter.waiting():
                    window = self.batches.window(self.step)
                self.optimize(window)
                self.step += 1
                self.unread += sum(int(b["attention_mask"].sum()) for b in window)
                if self.step % LOG_EVERY == 0 or self.step == self.total:
                    last = self.read_terms(self.step - read)
                    tokens = self._all_unread()
                    self.tokens += tokens
                    self.unread = 0
                    length = window[0]["input_ids"].shape[1]
                    meter.update(self.step, tokens, last, partial(self._measured, tokens, length))
                    read = self.step
                due, stopping = self._agreed(budget.due(self.step, read == self.step), stop)
                if due and self.step < self.total:
                    with budget.saving(self.step):
                        self.save()
                if stopping and self.step < self.total:
                    self.save()
                    raise TrainingError(
                        f"stage {self.name} was stopped at step {self.step} of {self.total} and "
                        "its state saved; --resume continues it"
                    )
        return last

    def _all_unread(self) -> int:
        return int(self.world.sum([self.unread])[0])

    def _record_histogram(self) -> None:
        """What the master weights are like, before the first step and after the last."""
        if histogram := self.monitor.histogram():
            record = {"stage": self.name, "step": self.step, "histogram": histogram}
            self.reporter.record_weights(record)

    def _agreed(self, due: bool, stop: Stop) -> tuple[bool, bool]:
        """Whether to save, by the first process' clock, and whether any process is to stop."""
        due_sum, stops = self.world.sum([due and self.world.main, stop.requested])
        return due_sum > 0, stops > 0

    def _measured(self, tokens: int, length: int, seconds: float) -> dict[str, float]:
        """What a record says besides the terms; all devices ask, with the tokens of all."""
        rate = float(self.optimizer.param_groups[0]["lr"])
        measured = {"learning_rate": rate, "tokens": self.tokens}
        measured |= self.monitor.machine(tokens, length, seconds)
        if self.step % TRITS_EVERY == 0 or self.step == self.total:
            measured |= self.monitor.trits()
            every = TRITS_EVERY * max(1, self.total // (TRITS_EVERY * WEIGHT_RECORDS))
            if self.monitor.linears and (self.step % every == 0 or self.step == self.total):
                record = {"stage": self.name, "step": self.step, **self.monitor.linears}
                self.reporter.record_weights(record)
        return measured

    def optimize(self, window: list[Batch]) -> None:
        """One optimizer step over a window of micro-batches."""
        settings = self.settings
        self._set_anneal()
        if self.step >= settings.decay_until * self.total:
            self.optimizer.param_groups[0]["weight_decay"] = 0.0
        counts = self._counts(window)
        rate = settings.learning_rate * schedule(settings, self.step, self.total)
        self.engine.step([prepare(batch, counts) for batch in window], rate)

    def _counts(self, window: list[Batch]) -> Counts[float]:
        """The counts of all devices' windows.

        Gradients are averaged over the devices, so each takes its share of the counts: the average
        of the devices' losses is then the loss of the whole window.
        """
        counts = count_window(window, self.objective.relations)
        return Counts(*(total / self.world.size for total in self.world.sum(counts)))

    def _set_anneal(self) -> None:
        """The share of quantisation of this step; once it is whole, products may be integer."""
        amount = 1.0
        if self.settings.anneal > 0:
            amount = min(1.0, (self.step + 1) / (self.settings.anneal * self.total))
            self.anneal.fill_(amount)
        if self.machine.integer_forward and amount == 1.0 and not self._integer:
            set_integer(self.model, True)
            self.engine.forget_graphs()
            self._integer = True

    def read_terms(self, steps: int) -> dict[str, float]:
        """Mean terms since the last reading; TrainingError as soon as one is not finite."""
        terms = self.engine.read(steps)
        if not all(math.isfinite(value) for value in terms.values()):
            found = ", ".join(f"{key} {value}" for key, value in terms.items())
            raise self._diverged(f"the loss is not finite ({found})")
        return terms

    def _check_weights(self) -> None:
        """A finite loss can still have had gradients that are not; such weights are not kept."""
        if self.world.any(not all(bool(p.isfinite().all()) for p in self.parts.values())):
            raise self._diverged("the weights are not finite")

    def _diverged(self, fact: str) -> TrainingError:
        section = SECTIONS.get(self.name, self.name)
        kept = f"; the state of an earlier step is kept in {self.state_dir}"
        return TrainingError(
            f"stage {self.name}: {fact} at step {self.step}; lower {section}.learning_rate or "
            f"raise {section}.warmup" + (kept if saved_states(self.state_dir) else "")
        )

    def save(self) -> None:
        """Write the training state, whole or not at all (training_state.py)."""
        self._check_weights()
        data = self.world.gather(self.batches.state())
        position = {
            "data": None if data[0] is None else merge_states(data),
            "relation_weight": self.objective.relation_weight,
            "tokens": self.tokens + self._all_unread(),
        }
        self._states().save(self.step, self.parts, self.optimizer, position)

    def restore(self) -> None:
        """Return to the newest whole state; FormatError or TrainingError where there is none."""
        position = self._states().restore(self.parts, self.optimizer)
        self.step = position["step"]
        self.batches.restore(position["data"])
        self.objective.relation_weight = position["relation_weight"]
        self.tokens = position["tokens"]

    def _states(self) -> States:
        identity = {"stage": self.name, "total": self.total, "fingerprint": self.fingerprint}
        keep, say = self.machine.keep_states, self.reporter.say
        return States(self.state_dir, identity, keep, say, self.world)
