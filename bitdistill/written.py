"""Summaries that the teacher writes, for a student to learn from: of the task's documents and more.

A student that only sees references learns what its teacher says along texts that neither of them
would write. What the teacher itself writes, greedily, is an easier target (sequence-level
distillation, Kim and Rush, arXiv 1606.07947). The first of an example's `mixtures` is its own
document, the others are spliced from two (mixtures.py).

    RUN/teacher-written/KEY/shard-00000.json    what it wrote of each document, as tokens

A shard is renamed into place when it is whole: a run that was killed writes those that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.checkpoint import ends_of
from bitdistill.data import task_examples
from bitdistill.decoder import head_width
from bitdistill.distributed import World
from bitdistill.encoding import Encoded, encode_prompts
from bitdistill.hardware import Hardware
from bitdistill.manifest import fingerprint
from bitdistill.mixtures import splices
from bitdistill.schema import Config

SHARD = 1024  # documents of a file
CACHE_BYTES = {"cuda": 2**33, "cpu": 2**30}  # keys and values of one batch
MAX_ROWS = 1024


class Written:
    """The rows of every epoch: prompts, and the teacher's answers to them."""

    def __init__(self, rows: list[Encoded]) -> None:
        self._rows, self.count = rows, len(rows)

    def rows(self, epoch: int) -> list[Encoded]:
        """The same in all."""
        return self._rows

    def close(self) -> None:
        """They hold nothing."""


def summaries(
    config: Config,
    teacher: PreTrainedModel,
    mark: str,
    tokenizer: Tokenizer,
    run: Path,
    world: World,
) -> Written | None:
    """What the teacher writes for stage 3 of a summary task, kept in `run`; None for labels.

    `mark` says what the teacher is. Each device writes its shards; the teacher returns to the CPU.
    """
    task, settings = config.task.resolve(), config.distill
    if task.kind != "summary":
        return None
    hardware = Hardware.resolve(config.machine)
    examples = task_examples(config.task, config.seed)
    prompts = [example.prompt for example in examples]
    for copy in range(1, settings.mixtures):
        prompts += [task.fill(inputs) for inputs in splices(examples, f"{config.seed}-{copy}")]
    room = settings.max_length - task.max_new_tokens
    if room < 1:
        raise ValueError(
            f"max_length {settings.max_length} leaves no room for a document beside a summary of "
            f"{task.max_new_tokens} tokens; raise distill.max_length"
        )
    encoded = encode_prompts(prompts, task, tokenizer, [room] * len(prompts))
    stop = ends_of(teacher, tokenizer)
    made_from = [mark, encoded, task.max_new_tokens, stop, str(hardware.dtype), "greedy"]
    folder = run / "teacher-written" / fingerprint(made_from)
    folder.mkdir(parents=True, exist_ok=True)
    limits = GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    files = [folder / f"shard-{i:05d}.json" for i in range(-(-len(encoded) // SHARD))]
    own, teacher.generation_config = teacher.generation_config, GenerationConfig()
    with world.phase():  # greedy, whatever penalties the model brings
        for number, file in enumerate(files):
            if number % world.size == world.rank and not file.exists():
                part = encoded[number * SHARD : (number + 1) * SHARD]
                _save(file, _write(teacher, part, limits, hardware))
    teacher.generation_config = own
    teacher.cpu()
    answers = [said for file in files for said in json.loads(file.read_text(encoding="utf-8"))]
    pairs = zip(encoded, answers, strict=True)
    return Written([Encoded(prompt + said, len(said), labelled=False) for prompt, said in pairs])


def _save(file: Path, answers: list[list[int]]) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(answers), encoding="utf-8")
    partial.replace(file)


def batch_rows(config: Any, length: int, hardware: Hardware) -> int:
    """How many texts of `length` tokens, padding included, a model writes at a time."""
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config)
    room = CACHE_BYTES["cuda" if hardware.cuda else "cpu"]
    return max(1, min(MAX_ROWS, room // (values * hardware.dtype.itemsize * length)))


@torch.no_grad()
def _write(
    teacher: PreTrainedModel,
    prompts: Sequence[list[int]],
    limits: GenerationConfig,
    hardware: Hardware,
) -> list[list[int]]:
    """The teacher's greedy answers, each with the token that ended it, if one did."""
    teacher.to(hardware.device).eval()
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        width = len(prompts[order[0]])
        rows = batch_rows(teacher.config, width + int(limits.max_new_tokens or 0), hardware)
        chosen, order = order[:rows], order[rows:]
        ids_BT = torch.full((len(chosen), width), int(limits.pad_token_id or 0))
        mask_BT = torch.zeros_like(ids_BT)
        for row, index in enumerate(chosen):
            prompt = torch.tensor(prompts[index])
            ids_BT[row, width - len(prompt) :] = prompt  # on the right, where generation goes on
            mask_BT[row, width - len(prompt) :] = 1
        moved = hardware.move({"input_ids": ids_BT, "attention_mask": mask_BT})
        with hardware.autocast():
            found: Tensor = teacher.generate(**moved, generation_config=limits)
        for index, said in zip(chosen, found[:, width:].tolist(), strict=True):
            ends = [i for i, token in enumerate(said) if token in limits.eos_token_id]
            answers[index] = said[: ends[0] + 1] if ends else said
    return answers
