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

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill import checkpoint, manifest, training_state
from bitdistill.cards import model_card
from bitdistill.config import dump_config
from bitdistill.data import Batches, Shard, TaskBatches, check_sources, corpus_batches, task_rows
from bitdistill.distributed import World, collect
from bitdistill.hardware import Hardware, TrainingError
from bitdistill.inputs import Inputs
from bitdistill.objective import make_objective
from bitdistill.prefetch import prefetched
from bitdistill.progress import Reporter
from bitdistill.schema import Config, Training
from bitdistill.stages import Stage, describe
from bitdistill.student import make_student, measure_gains, quantization_statistics, set_gains
from bitdistill.teacher import load_model
from bitdistill.training import Fit

LoadedModel = tuple[PreTrainedModel, Tokenizer]


class Recipe:
    """One run: resolved configuration, output directory, and the stages in order."""

    def __init__(
        self, config: Config, out: Path, *, resume: bool = False, quiet: bool = False
    ) -> None:
        self.config, self.out, self.resume = config, out, resume
        if any(p.exists() and not p.is_dir() for p in (out, *out.parents)):
            raise FileExistsError(f"{out} cannot be a directory there; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        self.world = World.from_environment()
        log = out / "log.jsonl" if self.world.main else None
        self.reporter = Reporter(log, quiet or not self.world.main)

    def run(self) -> Path:
        """All stages, on however many devices; returns the student directory."""
        with self.world.joined(Hardware.resolve(self.config.machine)):
            return self._run()

    def _run(self) -> Path:
        config = self.config
        check_sources(config)
        self.inputs = Inputs(config)
        if config.machine.threads is not None:
            torch.set_num_threads(config.machine.threads)
        shared = ("model", "seed")
        base = None
        if config.base.enabled:
            text = ("task",) if "task" in config.corpus.sources else ()
            base = Stage("base", "teacher", "base", (*shared, "base", "corpus", *text), None)
            self._stage(base, self._train_base)
        parent = base.directory if base is not None else None
        task = (*shared, "task")
        teacher = Stage("teacher", "teacher", "fp16-sft", (*task, "teacher"), parent)
        self._stage(teacher, self._train_teacher)
        if config.bitnet_sft.enabled:
            direct = Stage("bitnet-sft", "student", "bitnet-sft", (*task, "bitnet_sft"), parent)
            self._stage(direct, self._train_bitnet_sft)
        start = teacher.directory if config.student.start == "teacher" else parent
        refined = Stage("refined", "student", "refined", (*task, "student"), start)
        self._stage(refined, self._refine)
        last = refined
        if config.pretrain.enabled:
            parts = (*refined.depends, "pretrain", "corpus")
            last = Stage("pretrained", "student", "pretrained", parts, refined.directory)
            self._stage(last, self._pretrain)
        parts = (*last.depends, "teacher", "distill", "method")
        student = Stage("student", "student", config.method, parts, last.directory)
        self._stage(student, self._distill)
        return self.out / student.directory

    # --- the stages -----------------------------------------------------------------------------

    def _train_base(self, stage: Stage) -> tuple[LoadedModel, dict[str, Any]]:
        model, tokenizer = load_model(self.config.model, self.config.seed)
        batches = self._corpus(self.config.base, tokenizer)
        return (model, tokenizer), self._fit(stage, model, None, batches, self.config.base)

    def _train_teacher(self, stage: Stage) -> tuple[LoadedModel, dict[str, Any]]:
        model, tokenizer = self._base()
        settings = self.config.teacher
        batches = self._examples(settings, tokenizer)
        return (model, tokenizer), self._fit(stage, model, None, batches, settings)

    def _train_bitnet_sft(self, stage: Stage) -> tuple[LoadedModel, dict[str, Any]]:
        model, tokenizer = self._base()
        settings = self.config.bitnet_sft
        student = make_student(model, "none", self.config.student.activation_bits)
        batches = self._examples(settings, tokenizer)
        return (student, tokenizer), self._fit(stage, student, None, batches, settings)

    def _refine(self, stage: Stage) -> tuple[LoadedModel, dict[str, Any]]:
        options = self.config.student
        source = self._load("teacher") if options.start == "teacher" else self._base()
        model, tokenizer = source
        hardware = Hardware.resolve(self.config.machine)
        model.to(hardware.device).eval()
        student = make_student(model, options.norm_style, options.activation_bits)
        gains: dict[str, float] = {}
        if options.calibrate and options.norm_style != "none":
            batches = self._examples(self.config.distill, tokenizer, World())
            windows = (batches.window(step) for step in range(options.calibration_batches))
            moved = (hardware.move(batch) for window in windows for batch in window)
            gains = measure_gains(model, options.norm_style, moved)
            set_gains(student, gains)
        return (student, tokenizer), {"gains": gains}

    def _pretrain(self, stage: Stage) -> tuple[LoadedModel, dict[str, Any]]:
        student, tokenizer = self._load("refined")
        settings = self.config.pretrain
        teacher = self._base()[0] if settings.needs_teacher else None
        batches = self._corpus(settings, tokenizer)
        return (student, tokenizer), self._fit(stage, student, teacher, batches, settings)

    def _distill(self, stage: Stage) -> tuple[LoadedModel, dict[str, Any]]:
        assert stage.parent is not None
        student, tokenizer = self._load(stage.parent)
        settings = self.config.distill
        teacher = self._load("teacher")[0] if settings.needs_teacher else None
        batches = self._examples(settings, tokenizer)
        return (student, tokenizer), self._fit(stage, student, teacher, batches, settings)

    # --- what the stages share ------------------------------------------------------------------

    def _load(self, directory: str) -> LoadedModel:
        path = self.out / directory
        return checkpoint.load(path), checkpoint.load_tokenizer(path)

    def _base(self) -> LoadedModel:
        if self.config.base.enabled:
            return self._load("base")
        return load_model(self.config.model, self.config.seed)

    def _examples(
        self, settings: Training, tokenizer: Tokenizer, world: World | None = None
    ) -> TaskBatches:
        """Task batches, shared by the devices of this run or of `world`."""
        world = self.world if world is None else world
        rows = task_rows(self.config.task, tokenizer, settings.max_length, self.config.seed)
        return TaskBatches(
            rows,
            pad=tokenizer.pad_token_id or 0,
            batch_size=settings.batch_size,
            accumulate=world.share(settings.accumulate, "accumulate"),
            seed=self.config.seed,
            multiple=self.config.machine.pad_multiple,
            shard=Shard(world.rank, world.size),
        )

    def _corpus(self, settings: Training, tokenizer: Tokenizer) -> Batches:
        return corpus_batches(
            self.config,
            tokenizer,
            settings.max_length,
            settings.batch_size,
            self.world.share(settings.accumulate, "accumulate"),
            Shard(self.world.rank, self.world.size),
        )

    def _fit(
        self,
        stage: Stage,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None,
        batches: Batches,
        settings: Training,
    ) -> dict[str, Any]:
        """Train, and return what the manifest should say of it."""
        context = model.config.max_position_embeddings
        if settings.max_length > context:
            raise TrainingError(
                f"stage {stage.directory}: max_length {settings.max_length} is longer than the "
                f"model's context of {context}; lower it"
            )
        torch.manual_seed(self.config.seed)
        # sharding changes a model for good: what is saved in the end is another one
        trained = copy.deepcopy(model) if self.world.size > 1 else model
        state_dir = self.out / f"{stage.directory}.training"
        fit = Fit(
            stage.directory,
            make_objective(trained, teacher, settings),
            prefetched(batches, self.config.machine),
            settings,
            self.config.machine,
            self.reporter,
            state_dir,
            self._fingerprint(stage),
            self.world,
        )
        if training_state.saved_states(state_dir):
            if not self.resume:
                raise TrainingError(
                    f"stage {stage.directory} was interrupted; pass --resume to continue it, or "
                    f"remove {state_dir} to start it again"
                )
            fit.restore()
            self.reporter.say(f"{stage.directory}: continuing at step {fit.step}")
        with closing(fit.batches):
            terms = fit.run()
        model.cpu()
        if trained is not model:
            collect(trained, model)
        weight = fit.objective.relation_weight
        return {"steps": fit.total, "terms": terms, "relation_weight": weight}

    def _stage(
        self, stage: Stage, work: Callable[[Stage], tuple[LoadedModel, dict[str, Any]]]
    ) -> None:
        """Skip a complete stage, refuse one made otherwise, else do it and write its directory."""
        path = self.out / stage.directory
        mark = self._fingerprint(stage)
        if path.exists():
            content = manifest.read_manifest(path, stage.kind)
            if content.get("fingerprint") != mark:
                made_with = self.inputs.difference(stage.depends, content)
                raise TrainingError(
                    f"{path} was made with {made_with}; use another --out, or remove it and the "
                    "stages after it"
                )
            training_state.discard(self.out / f"{stage.directory}.training")
            self.reporter.say(f"{stage.directory}: complete, skipped")
            return
        self.reporter.say(f"{stage.directory}: started")
        if self.world.main:
            (self.out / "config.yaml").write_text(dump_config(self.config), encoding="utf-8")
        (model, tokenizer), metrics = work(stage)
        if stage.kind == "student":
            metrics |= quantization_statistics(model)
        made = {
            "fingerprint": mark,
            "inputs": self.inputs.of(stage.depends),
            "metrics": metrics,
        }
        content = describe(stage, self.config, model, made)
        card = model_card(content)
        with self.world.phase():
            if self.world.main:
                checkpoint.save(path, model, tokenizer, stage.kind, content, card)
                training_state.discard(self.out / f"{stage.directory}.training")
        self.reporter.say(f"{stage.directory}: written to {path}")

    def _fingerprint(self, stage: Stage) -> str:
        values = self.config.model_dump(mode="json")
        parent = None
        if stage.parent is not None:
            parent = manifest.read_manifest(self.out / stage.parent)["fingerprint"]
        own = {key: values[key] for key in stage.depends}
        return manifest.fingerprint([own, self.inputs.of(stage.depends), parent])


def train(
    config: Config, out: str | Path | None = None, *, resume: bool = False, quiet: bool = False
) -> Path:
    """Run every stage of a recipe in `out` (runs/NAME) and return the student directory.

    Raises TrainingError, ConfigError, ModelError or FormatError with the remedy; what is complete
    stays, and a later call continues after it.
    """
    out = Path("runs") / config.name if out is None else Path(out)
    return Recipe(config, out, resume=resume, quiet=quiet).run()
