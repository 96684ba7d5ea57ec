"""What a run's stages are fed with: the task's examples, mixtures of them, and packed text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.corpus import corpus_steps
from bitdistill.data import (
    Batch,
    Batches,
    Fresh,
    PackedBatches,
    Shard,
    TaskBatches,
    task_examples,
)
from bitdistill.distributed import World
from bitdistill.encoding import encode_examples
from bitdistill.mixtures import Mixtures
from bitdistill.schema import Config, Distillation, Pretraining, Training
from bitdistill.tasks import Task, check_beginnings
from bitdistill.written import Written


def seed_of(config: Config, settings: Training) -> int:
    """The seed of a stage: stage 2 has its own, so that runs of several seeds can share it."""
    return settings.seed if isinstance(settings, Pretraining) else config.seed


def task_batches(
    config: Config,
    settings: Training,
    tokenizer: Tokenizer,
    world: World,
    written: Written | None = None,
) -> TaskBatches:
    """A stage's examples, shared by the devices of a run; and mixtures, or what was written."""
    task, length = config.task.resolve(), settings.max_length
    check_beginnings(task, _answers(task, tokenizer))
    examples = task_examples(config.task, config.seed)
    fresh: Fresh | None = written
    times = settings.mixtures if isinstance(settings, Distillation) else 0
    if times and task.kind == "label":
        fresh = Mixtures(task, examples, tokenizer, length, times, config.seed)
    return TaskBatches(
        encode_examples(examples, task, tokenizer, length),
        pad=tokenizer.pad_token_id or 0,
        batch_size=settings.batch_size,
        accumulate=world.share(settings.accumulate, "accumulate"),
        seed=config.seed,
        multiple=config.machine.pad_multiple,
        shard=Shard(world.rank, world.size),
        fresh=fresh,
    )


def corpus_batches(
    config: Config, settings: Training, tokenizer: Tokenizer, world: World
) -> PackedBatches:
    """Packed pre-training batches of this device's rows, from every source of `config.corpus`."""
    accumulate = world.share(settings.accumulate, "accumulate")
    rows, shard = settings.batch_size * accumulate, Shard(world.rank, world.size)
    seed = seed_of(config, settings)
    part, total = shard.part(rows), world.size * rows
    steps = corpus_steps(config, tokenizer, part, total, settings.max_length, seed)
    return PackedBatches(steps, settings.batch_size, accumulate, config.corpus.document_mask)


def calibration(config: Config, tokenizer: Tokenizer) -> Iterator[Batch]:
    """The first batches of what the student is trained on next, the same for any world."""
    batches: Batches
    if config.pretrain.enabled:
        batches = corpus_batches(config, config.pretrain, tokenizer, World())
    else:
        batches = task_batches(config, config.distill, tokenizer, World())
    with closing(batches):
        for step in range(config.student.calibration_batches):
            yield from batches.window(step)


def candidates(settings: Training, task: Task, tokenizer: Tokenizer) -> list[int] | None:
    """The token ids that answers compete among, or None for the vocabulary.

    ValueError unless every label is one token.
    """
    if settings.candidates == "vocabulary":
        return None
    ids = _answers(task, tokenizer)
    if not ids or any(len(tokens) != 1 for tokens in ids):
        raise ValueError(
            f"candidates=labels needs labels of one token each; task {task.name!r} has "
            f"{dict(zip(task.labels, ids, strict=True)) or 'none'}: use candidates=vocabulary"
        )
    return [tokens[0] for tokens in ids]


def _answers(task: Task, tokenizer: Tokenizer) -> list[list[int]]:
    """The token ids of a label task's answers."""
    return [tokenizer(label, add_special_tokens=False).input_ids for label in task.labels]
