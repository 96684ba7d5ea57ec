"""The schema of a whole run: every setting, its default, and what it means.

Unknown keys are refused wherever they stand. The defaults are neutral; what we recommend is in
recipes/*.yaml, where it can be read and compared. config.py reads those files.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bitdistill.schema_data import Corpus, Model, Section, TaskData


class Training(Section):
    """Optimisation of one stage. Give `steps` or `epochs`. Rates are per step, shares of the run.

    `accumulate` micro-batches of `batch_size` make a step; several devices share them.

    `anneal` is the share of the steps over which quantisation is blended in (0: hard at once).
    `decay_until` is the share of the run after which weight decay is zero.

    `candidates` are what the answers of a label task compete with: the whole vocabulary, or the
    task's other labels alone (each a single token), which is how they are scored later.
    """

    enabled: bool = True
    steps: int | None = Field(None, gt=0)
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(32, gt=0)
    accumulate: int = Field(1, gt=0)
    max_length: int = Field(512, gt=1)
    learning_rate: float = Field(5e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    decay_until: float = Field(1.0, ge=0, le=1)
    clip_norm: float = Field(1.0, gt=0)
    anneal: float = Field(0.0, ge=0, le=1)
    candidates: Literal["vocabulary", "labels"] = "vocabulary"

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.enabled and (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class LogitsLoss(Section):
    """KL(teacher || student) of softmax(z / temperature), over the tokens that count.

    `tau_squared` multiplies by temperature^2, as the authors' code does and the paper does not.
    `prompt_weight` compares the predictions of the prompt's own tokens as well, over the whole
    vocabulary: a mean of its own, so that a long prompt does not drown the answer.
    """

    weight: float = Field(0.0, ge=0)
    prompt_weight: float = Field(0.0, ge=0)
    temperature: float = Field(5.0, gt=0)
    tau_squared: bool = False


class RelationLoss(Section):
    """Attention relations of one layer (MiniLM): KL of softmax(A A^T) for A in Q, K, V.

    `layer` is an index, or a share of the depth; teacher and student layers correspond by depth.
    `states`: `projection` takes Q, K, V as projected, `attention` after qk-norm and rotary
    embedding and before key/value heads are repeated (the authors' code). `scaling`: `sqrt` divides
    by sqrt(d_r), `normalised` divides L2-normalised states' products by `temperature` (the paper's
    Algorithm 1). `mask` leaves out padding and future tokens (the paper does not).
    `divide_by_heads` divides by `split_heads` once more (the authors' code).
    `target_ratio` sets the weight so that the term starts at that ratio of the cross-entropy.
    """

    weight: float = Field(0.0, ge=0)
    target_ratio: float | None = Field(None, gt=0)
    layer: int | Annotated[float, Field(ge=0, le=1)] = 0.75
    split_heads: int = Field(8, gt=0)
    states: Literal["projection", "attention"] = "projection"
    scaling: Literal["sqrt", "normalised"] = "sqrt"
    temperature: float = Field(1.0, gt=0)
    mask: bool = True
    divide_by_heads: bool = False

    @property
    def active(self) -> bool:
        """Whether the term is computed at all."""
        return self.weight > 0 or self.target_ratio is not None


class AlignmentLoss(Section):
    """Residual streams layer by layer (alignment.py), for a teacher of the student's own width."""

    weight: float = Field(0.0, ge=0)


class Distillation(Training):
    """A stage with a teacher: L = ce L_CE + logits L_LD + relations L_AD + alignment L_HA.

    `mixtures` new examples for each labelled one are made from parts of the task's own inputs
    (mixtures.py); they have no answer, only what the teacher says of them: of labels, in every
    epoch others; of summaries, which it has to write (written.py), the same in all.
    With `cache` the teacher runs once, beforehand: that many of its likeliest tokens of an answer,
    and the relations' states, are kept on the disk (teacher_cache.py).
    """

    ce: float = Field(1.0, ge=0)
    logits: LogitsLoss = LogitsLoss()
    relations: RelationLoss = RelationLoss()
    alignment: AlignmentLoss = AlignmentLoss()
    mixtures: int = Field(0, ge=0)
    cache: int = Field(0, ge=0)

    @property
    def needs_teacher(self) -> bool:
        """Whether any term compares with a teacher."""
        logits = self.logits.weight > 0 or self.logits.prompt_weight > 0
        return logits or self.relations.active or self.alignment.weight > 0

    @model_validator(mode="after")
    def _ratio_of_something(self) -> Distillation:
        if self.relations.target_ratio is not None and self.ce == 0:
            raise ValueError(
                "relations.target_ratio is a share of the cross-entropy, and ce is 0: give "
                "relations.weight, and relations.target_ratio=null"
            )
        return self

    @model_validator(mode="after")
    def _mixtures_are_judged(self) -> Distillation:
        if self.mixtures and not self.logits.weight:
            raise ValueError("mixtures have no answers: they need logits.weight above 0")
        live = self.mixtures or self.logits.prompt_weight or self.alignment.weight
        if self.cache and (live or isinstance(self, Pretraining)):
            raise ValueError("cache must be 0 for a corpus, mixtures, prompt_weight and alignment")
        return self


class Pretraining(Distillation):
    """Stage 2. `seed` is its own, so that runs of several seeds can share it."""

    seed: int = Field(0, ge=0, lt=2**63)


class Student(Section):
    """Stage 1. `start`: whether the student takes the base model's weights or the teacher's.

    `initialise`: the weights as they are, or moved by GPTQ or AWQ on the calibration batches.
    """

    norm_style: Literal["paper", "allnorm", "none"] = "paper"
    activation_bits: Literal[8] | None = 8
    calibrate: bool = True
    calibration_batches: int = Field(8, gt=0)
    start: Literal["base", "teacher"] = "base"
    initialise: Literal["absmean", "gptq", "awq"] = "absmean"


class Machine(Section):
    """Where and how to compute. `precision` is the arithmetic; master weights are always fp32.

    `compile` compiles each decoder layer and the losses, `graphs` replays steps as CUDA graphs;
    `auto` does so on CUDA. `pad_multiple` keeps the number of batch lengths, and so of graphs,
    small. `integer_forward` takes ternary products on int8 tensor cores once annealing is over
    (the gradients stay in `precision`). `recompute` keeps one layer's activations at a time and
    computes them again backward: less memory, about a third more arithmetic. `teacher_bits`: 8
    keeps a teacher's linear layers in int8 (int8.py), 16 in `precision`.
    A stage's state is saved after `save_minutes` (or twenty times what the last save took) or
    `save_steps`; the last `keep_states` are kept.
    `workers` processes read, tokenise and pack a corpus; 0 does so in the training process. The
    sequences do not depend on it. A thread makes `prefetch` windows of batches ready ahead.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool | Literal["auto"] = "auto"
    graphs: bool | Literal["auto"] = "auto"
    integer_forward: bool = False
    recompute: bool = False
    teacher_bits: Literal[8, 16] = 16
    threads: int | None = Field(None, gt=0)
    save_minutes: float = Field(10.0, gt=0)
    save_steps: int | None = Field(None, gt=0)
    keep_states: int = Field(2, gt=0)
    pad_multiple: int = Field(8, gt=0)
    workers: int = Field(2, ge=0)
    prefetch: int = Field(4, ge=0)


class Config(Section):
    """A whole run. Stage 2 distils from the base model, stage 3 from the task's teacher.

    `teacher_model` is another model with the same tokenizer, of whatever depth and width, that
    takes the base model's place as teacher: fine-tuned for stage 3, as it is in stage 2.

    `shared` is a directory for the stages that no task has shaped (stages 1 and 2): runs that agree
    on them find each other's there.
    """

    name: str
    seed: int = Field(0, ge=0, lt=2**63)
    shared: str | None = None
    method: Literal["bitdistill", "bitdistill-paper", "bitdistill-authors"] = "bitdistill"
    model: Model
    teacher_model: Model | None = None
    task: TaskData
    corpus: Corpus = Corpus()
    machine: Machine = Machine()
    base: Training = Training(enabled=False)
    teacher: Training
    bitnet_sft: Training = Training(enabled=False)
    student: Student = Student()
    pretrain: Pretraining = Pretraining(enabled=False)
    distill: Distillation

    @field_validator("base", "bitnet_sft", "pretrain", mode="before")
    @classmethod
    def _off_unless_given_a_length(cls, value: Any) -> Any:
        """A method may say how an optional stage trains without turning it on."""
        if isinstance(value, dict) and not {"enabled", "steps", "epochs"} & value.keys():
            return value | {"enabled": False}
        return value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not value or "/" in value:
            raise ValueError("name must be a plain word")
        return value

    @model_validator(mode="after")
    def _stages_that_are(self) -> Config:
        for name in ("teacher", "distill"):
            if not getattr(self, name).enabled:
                raise ValueError(f"{name}.enabled: every run has this stage; see --until STAGE")
        for name in ("base", "pretrain"):
            stage = getattr(self, name)
            if stage.enabled and stage.candidates != "vocabulary":
                raise ValueError(f"{name}.candidates: text has no labels; use vocabulary")
        return self

    @model_validator(mode="after")
    def _own_weights(self) -> Config:
        if self.teacher_model is not None and self.student.start == "teacher":
            raise ValueError(
                "student.start: the teacher is another model (teacher_model); start from base"
            )
        return self

    @model_validator(mode="after")
    def _shareable(self) -> Config:
        shaped = self.student.start == "teacher" or "task" in self.corpus.sources
        if self.shared is not None and (self.base.enabled or shaped or not self.pretrain.enabled):
            raise ValueError(
                "shared: stages 1 and 2 can be shared where pretrain is enabled, student.start is "
                "base, and corpus.sources has no `task`"
            )
        return self
