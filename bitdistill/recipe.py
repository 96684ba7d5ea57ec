"""The stages of BitNet Distillation, top to bottom (arXiv 2510.13998).

    base         (only the embedded `tiny` model) pre-train the base model
    teacher      fine-tune the base model in full precision: the FP16-SFT baseline and the teacher
    bitnet-sft   on request: fine-tune a ternary copy of the base model directly
    refined      stage 1: ternary linears, SubLN with calibrated gains
    pretrained   stage 2: continued pre-training, with the base model as teacher if asked for
    student      stage 3: distil the teacher into the student on the task

Each stage is a directory with a manifest, written when the stage is complete. A complete stage is
skipped, an interrupted one continues with `resume`, and a stage made with another configuration is
never overwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill import checkpoint, manifest, training_state
from bitdistill.cards import model_card
from bitdistill.config import dump_config
from bitdistill.data import Batch, Batches
from bitdistill.distributed import World, collect, skeleton
from bitdistill.feeds import calibration, candidates, corpus_batches, seed_of, task_batches
from bitdistill.hardware import Hardware, TrainingError, start_compilers
from bitdistill.initialise import initialise
from bitdistill.int8 import weights_to_int8
from bitdistill.objective import make_objective
from bitdistill.prefetch import prefetched
from bitdistill.progress import Reporter
from bitdistill.schema import Config, Distillation, Training
from bitdistill.stages import LAST, Stage, describe, directory_of, fingerprint, plan
from bitdistill.student import (
    make_student,
    measure_gains,
    quantization_statistics,
    round_tables,
    set_gains,
)
from bitdistill.teacher import check_teacher, load_model
from bitdistill.teacher_cache import remember
from bitdistill.training import Fit
from bitdistill.written import summaries

LoadedModel = tuple[PreTrainedModel, Tokenizer]
Made = tuple[LoadedModel, dict[str, Any]]  # and what the manifest should say of it


class Recipe:
    """One run: resolved configuration, output directory, and the stages in order."""

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        resume: bool = False,
        quiet: bool = False,
        until: str = LAST,
    ) -> None:
        self.config, self.out, self.resume, self.until = config, out, resume, until
        self.inputs, self.stages = plan(config, out, until)
        out.mkdir(parents=True, exist_ok=True)
        self.world = World.from_environment()
        log = out / "log.jsonl" if self.world.main else None
        self.reporter = Reporter(log, quiet or not self.world.main)

    def run(self) -> Path:
        """The stages up to `until`, on however many devices; returns the last one's directory."""
        check_teacher(self.config)
        joined = self.world.joined(Hardware.resolve(self.config.machine))
        with joined, self.world.locked(self.out / "run.lock", wait=False):
            if self.config.machine.threads is not None:
                torch.set_num_threads(self.config.machine.threads)
            start_compilers(self.config.machine)
            for name, stage in self.stages.items():
                shared = stage.root != self.out  # by several runs, of which one makes it
                with self.world.locked(stage.root / f"{name}.lock") if shared else nullcontext():
                    self._stage(stage, WORK[name])
                if name == self.until:
                    break
        return self.stages[self.until].path

    # --- the stages -----------------------------------------------------------------------------

    def _train_base(self, stage: Stage) -> Made:
        model, tokenizer = load_model(self.config.model, self.config.seed)
        batches = corpus_batches(self.config, self.config.base, tokenizer, self.world)
        return self._fit(stage, tokenizer, model, None, batches, self.config.base)

    def _train_teacher(self, stage: Stage) -> Made:
        model, tokenizer = self._teacher_base()
        settings = self.config.teacher
        batches = task_batches(self.config, settings, tokenizer, self.world)
        return self._fit(stage, tokenizer, model, None, batches, settings)

    def _train_bitnet_sft(self, stage: Stage) -> Made:
        model, tokenizer = self._base()
        settings = self.config.bitnet_sft
        student = make_student(model, "none", self.config.student.activation_bits)
        batches = task_batches(self.config, settings, tokenizer, self.world)
        return self._fit(stage, tokenizer, student, None, batches, settings)

    def _refine(self, stage: Stage) -> Made:
        options = self.config.student
        teacher = self.stages["teacher"]
        model, tokenizer = self._load(teacher) if stage.parent is teacher else self._base()
        hardware = Hardware.resolve(self.config.machine)
        model.to(hardware.device).eval()
        student = make_student(model, options.norm_style, options.activation_bits)
        gains: dict[str, float] = {}
        measure = options.calibrate and options.norm_style != "none"
        moved: list[Batch] = []
        if measure or options.initialise != "absmean":
            moved = [hardware.move(batch) for batch in calibration(self.config, tokenizer)]
        if measure:
            gains = measure_gains(model, options.norm_style, moved)
            set_gains(student, gains)
        errors = initialise(student, options.initialise, moved)
        return (student, tokenizer), {"gains": gains, "initialisation": errors}

    def _pretrain(self, stage: Stage) -> Made:
        student, tokenizer = self._load(self.stages["refined"])
        settings = self.config.pretrain
        teacher = self._teacher_base()[0] if settings.needs_teacher else None
        batches = corpus_batches(self.config, settings, tokenizer, self.world)
        return self._fit(stage, tokenizer, student, teacher, batches, settings)

    def _distill(self, stage: Stage) -> Made:
        assert stage.parent is not None
        student, tokenizer = self._load(stage.parent)
        settings = self.config.distill
        teacher = self._load(self.stages["teacher"])[0] if settings.needs_teacher else None
        written = None
        if teacher is not None and settings.mixtures:
            mark = fingerprint(self.stages["teacher"], self.config, self.inputs)
            written = summaries(self.config, teacher, mark, tokenizer, self.out, self.world)
        batches = task_batches(self.config, settings, tokenizer, self.world, written)
        return self._fit(stage, tokenizer, student, teacher, batches, settings)

    # --- what the stages share ------------------------------------------------------------------

    def _load(self, stage: Stage) -> LoadedModel:
        return checkpoint.load(stage.path), checkpoint.load_tokenizer(stage.path)

    def _base(self) -> LoadedModel:
        if self.config.base.enabled:
            return self._load(self.stages["base"])
        return load_model(self.config.model, self.config.seed)

    def _teacher_base(self) -> LoadedModel:
        """What the teacher is before it is fine-tuned: the base model, or `teacher_model`."""
        other = self.config.teacher_model
        return self._base() if other is None else load_model(other, self.config.seed)

    def _fit(
        self,
        stage: Stage,
        tokenizer: Tokenizer,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batches: Batches,
        settings: Training,
    ) -> Made:
        """Train; the trained model is whole on the first process alone."""
        context = model.config.max_position_embeddings
        if settings.max_length > context:
            raise TrainingError(
                f"stage {stage.name}: max_length {settings.max_length} is longer than the "
                f"model's context of {context}; lower it"
            )
        torch.manual_seed(seed_of(self.config, settings))
        among = candidates(settings, self.config.task.resolve(), tokenizer)
        if self.config.machine.teacher_bits == 8 and teacher is not None:
            weights_to_int8(teacher)
        layer = None
        if isinstance(settings, Distillation) and settings.cache and teacher is not None:
            asked = settings, among, Hardware.resolve(self.config.machine), self.world
            teacher_mark = fingerprint(self.stages["teacher"], self.config, self.inputs)
            made_from = f"{teacher_mark}-{self.config.machine.teacher_bits}"
            models, root = (model, teacher), self.out / "teacher-cache"
            batches, layer = remember(root, made_from, models, batches, *asked)
            teacher = None
        # sharding changes a model for good: what is saved in the end is another one
        kept = skeleton(model) if self.world.size > 1 else model
        fit = Fit(
            stage.name,
            make_objective(model, teacher, settings, among, layer),
            prefetched(batches, self.config.machine),
            settings,
            self.config.machine,
            self.reporter,
            stage.state,
            fingerprint(stage, self.config, self.inputs),
            self.world,
        )
        if training_state.saved_states(stage.state):
            if not self.resume:
                raise TrainingError(
                    f"stage {stage.name} was interrupted; pass --resume to continue it, or "
                    f"remove {stage.state} to start it again"
                )
            fit.restore()
            self.reporter.say(f"{stage.name}: continuing at step {fit.step}")
        with closing(fit.batches):
            terms = fit.run()
        if kept is model:
            model.cpu()
        else:
            collect(model, kept, self.world)
        weight = fit.objective.relation_weight
        made = {"steps": fit.total, "tokens": fit.tokens, "terms": terms}
        return (kept, tokenizer), made | {"relation_weight": weight}

    def _stage(self, stage: Stage, work: Callable[[Recipe, Stage], Made]) -> None:
        """Skip a complete stage, refuse one made otherwise, else do it and write its directory."""
        path = stage.path
        mark = fingerprint(stage, self.config, self.inputs)
        if path.exists():
            content = manifest.read_manifest(path, stage.kind)
            if content.get("fingerprint") != mark:
                made_with = self.inputs.difference(stage.depends, content)
                raise TrainingError(
                    f"{path} was made with {made_with}; use another --out, or remove it and the "
                    "stages after it"
                )
            training_state.discard(stage.state)
            self.reporter.say(f"{stage.name}: complete, skipped")
            return
        self.reporter.begin(stage.name)
        if self.world.main:
            (self.out / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        made = work(self, stage)
        with self.world.phase():
            if self.world.main:
                self._write(stage, mark, made)
        self.reporter.say(f"{stage.name}: written to {path}")

    def _write(self, stage: Stage, mark: str, made: Made) -> None:
        (model, tokenizer), metrics = made
        if stage.kind == "student":
            metrics |= quantization_statistics(model)
            if all(other.parent is not stage for other in self.stages.values()):
                round_tables(model)
        inputs = self.inputs.of(stage.depends)
        found = {"fingerprint": mark, "inputs": inputs, "metrics": metrics}
        content = describe(stage, self.config, model, found)
        checkpoint.save(stage.path, model, tokenizer, stage.kind, content, model_card(content))
        training_state.discard(stage.state)


WORK: dict[str, Callable[[Recipe, Stage], Made]] = {
    "base": Recipe._train_base,
    "teacher": Recipe._train_teacher,
    "bitnet-sft": Recipe._train_bitnet_sft,
    "refined": Recipe._refine,
    "pretrained": Recipe._pretrain,
    LAST: Recipe._distill,
}


def train(
    config: Config,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    quiet: bool = False,
    until: str = LAST,
) -> Path:
    """Run a recipe's stages in `out` (runs/NAME) up to `until`, and return that one's directory.

    Raises TrainingError, ConfigError, ModelError or FormatError with the remedy; what is complete
    stays, and a later call continues after it.
    """
    return Recipe(config, directory_of(config, out), resume=resume, quiet=quiet, until=until).run()
