"""The one training loop: every stage, teacher or student, runs through `fit`.

A step takes a window of micro-batches, sums the weighted terms' gradients, clips and updates. The
state that a resumed run needs is written beside the stage directory on a budget of minutes and
steps (training_state.py).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.data import Batch, Batches
from bitdistill.hardware import Hardware, TrainingError
from bitdistill.interrupt import stop_signals
from bitdistill.objective import Objective, count_window
from bitdistill.progress import Reporter
from bitdistill.quantize import set_anneal
from bitdistill.schema import Machine, Training
from bitdistill.student import layers_of
from bitdistill.training_state import Budget, States, saved_states

LOG_EVERY = 10
# sections of the configuration, where a stage has another name
SECTIONS = {"bitnet-sft": "bitnet_sft", "pretrained": "pretrain", "student": "distill"}


def schedule(settings: Training, step: int, total: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then cosine, linear or constant."""
    warmup = max(1, round(settings.warmup * total))
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    return 1 - share if settings.schedule == "linear" else 1.0


def total_steps(settings: Training, batches: Batches) -> int:
    """Optimizer steps of a stage; TrainingError where `epochs` is asked of a stream."""
    if settings.steps is not None:
        return settings.steps
    per_epoch = batches.steps_per_epoch()
    if per_epoch is None or settings.epochs is None:
        raise TrainingError("a corpus has no epochs: give the stage's steps instead")
    return max(1, math.ceil(settings.epochs * per_epoch))


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
    ) -> None:
        self.fingerprint = fingerprint  # of everything the stage depends on
        self.name, self.objective, self.batches = name, objective, batches
        self.model: PreTrainedModel = objective.student
        self.settings, self.machine, self.reporter = settings, machine, reporter
        self.state_dir = state_dir
        self.hardware = Hardware.resolve(machine)
        self.total = total_steps(settings, batches)
        self.step = 0
        self.model.to(self.hardware.device).train()
        if objective.teacher is not None:
            teacher = objective.teacher.to(self.hardware.device, self.hardware.dtype)
            teacher.eval().requires_grad_(False)
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.AdamW:
        """AdamW; matrices decay, vectors (norms, biases) do not."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        decay = self.settings.weight_decay
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = self.hardware.device.type == "cuda"
        return torch.optim.AdamW(
            groups, lr=self.settings.learning_rate, betas=(0.9, 0.98), fused=fused
        )

    def _compile_layers(self) -> None:
        """Regional compilation: each decoder layer alone, which starts up far faster."""
        wanted = self.machine.compile
        if not wanted or (wanted == "auto" and self.hardware.device.type != "cuda"):
            return
        for model in filter(None, (self.model, self.objective.teacher)):
            for layer in layers_of(model):
                if layer not in self.objective.captured_layers:
                    layer.compile(dynamic=False)
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)

    def fit_relation_weight(self) -> None:
        """Where a target ratio is asked for, find the relations' weight on the first window."""
        if self.objective.relations.target_ratio is not None:
            window = self.batches.window(0)
            window = [{k: self.hardware.move(v) for k, v in batch.items()} for batch in window]
            with self.hardware.autocast():
                self.objective.fit_relation_weight(window)

    def run(self) -> dict[str, float]:
        """Train to the end; the mean terms of the last records."""
        self._compile_layers()
        if self.step == 0:
            self.fit_relation_weight()
        set_anneal(self.model, 1.0)
        sums: dict[str, Tensor] = {}
        tokens, read = 0, self.step
        last: dict[str, float] = {}
        machine = self.machine
        budget = Budget(machine.save_minutes, machine.save_steps, self.step)
        with self.reporter.stage(self.name, self.total, self.step) as meter, stop_signals() as stop:
            while self.step < self.total:
                with meter.waiting():
                    window = self.batches.window(self.step)
                tokens += sum(int(b["attention_mask"].sum()) for b in window)
                self.optimize(window, sums)
                self.step += 1
                if self.step % LOG_EVERY == 0 or self.step == self.total:
                    last = self._read_terms(sums, self.step - read)
                    meter.update(self.step, tokens, last, self._rate())
                    tokens, read = 0, self.step
                if budget.due(self.step, read == self.step) and self.step < self.total:
                    self.save()
                    budget.saved(self.step)
                if stop.requested and self.step < self.total:
                    self.save()
                    raise TrainingError(
                        f"stage {self.name} was stopped at step {self.step} of {self.total} and "
                        "its state saved; --resume continues it"
                    )
        self._check_weights()
        set_anneal(self.model, 1.0)
        self.model.eval()
        return last

    def _rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def optimize(self, window: list[Batch], sums: dict[str, Tensor]) -> None:
        """One optimizer step over a window of micro-batches."""
        settings = self.settings
        if settings.anneal > 0:
            set_anneal(self.model, min(1.0, (self.step + 1) / (settings.anneal * self.total)))
        rate = settings.learning_rate * schedule(settings, self.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.step >= settings.decay_until * self.total:
            self.optimizer.param_groups[0]["weight_decay"] = 0.0
        counts = count_window(window, self.objective.relations)
        for batch in window:
            with self.hardware.autocast():
                moved = {key: self.hardware.move(value) for key, value in batch.items()}
                terms = self.objective(moved, counts)
                loss = torch.stack(list(terms.values())).sum()
            loss.backward()
            for key, term in terms.items():
                sums[key] = sums.get(key, torch.zeros_like(term)) + term.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _read_terms(self, sums: dict[str, Tensor], steps: int) -> dict[str, float]:
        """Mean terms since the last reading; TrainingError as soon as one is not finite."""
        terms = {key: float(value) / steps for key, value in sums.items()}
        sums.clear()
        if not all(math.isfinite(value) for value in terms.values()):
            found = ", ".join(f"{key} {value}" for key, value in terms.items())
            raise self._diverged(f"the loss is not finite ({found})")
        return terms

    def _check_weights(self) -> None:
        """A finite loss can still have had gradients that are not; such weights are not kept."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
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
        position = {
            "data": self.batches.state(),
            "relation_weight": self.objective.relation_weight,
        }
        self._states().save(self.step, self.model, self.optimizer, position)

    def restore(self) -> None:
        """Return to the newest whole state; FormatError or TrainingError where there is none."""
        position = self._states().restore(self.model, self.optimizer, self.hardware.device)
        self.step = position["step"]
        self.batches.restore(position["data"])
        self.objective.relation_weight = position["relation_weight"]

    def _states(self) -> States:
        identity = {"stage": self.name, "total": self.total, "fingerprint": self.fingerprint}
        return States(self.state_dir, identity, self.machine.keep_states, self.reporter.say)
