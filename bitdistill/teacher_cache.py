"""What a teacher says of a task's examples, kept on the disk: it runs once, not in every epoch.

    CACHE/shard-00000.safetensors   KEY:top_logits, KEY:top_ids (A, k), KEY:top_total (A),
                                    KEY:teacher_q, KEY:teacher_k, KEY:teacher_v (T, D)

KEY is a hash of an example's tokens, so that any order, batch or number of devices finds it; what
the teacher was and what it was asked is in the directory's name. A shard is renamed into place when
it is whole: a run that was killed asks for the examples that are missing, and for no others. Then
the teacher is let go of, and batches bring what it said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from bitdistill.capture import ATTENTION, Capture, related_layers
from bitdistill.data import IGNORED, Batch, Batches, TaskBatches, collate
from bitdistill.distributed import World
from bitdistill.encoding import Encoded
from bitdistill.hardware import Hardware
from bitdistill.losses import chunk_tokens
from bitdistill.manifest import fingerprint
from bitdistill.prepare import REMEMBERED_STATES, Counts, prepare
from bitdistill.quantize import wide
from bitdistill.schema import Distillation
from bitdistill.student import cast

SHARD = 512  # examples of a file
TOGETHER = 32  # examples of a forward pass
ANSWERS = ("top_logits", "top_ids", "top_total")


def key_of(ids: Sequence[int], answer: int) -> str:
    """The name of an example: its tokens, and how many of the last are asked for."""
    return hashlib.sha256(f"{answer}:{','.join(map(str, ids))}".encode()).hexdigest()[:32]


class Questions:
    """A teacher on its device, and what it is asked of an example."""

    def __init__(
        self,
        teacher: PreTrainedModel,
        layer: int | None,
        settings: Distillation,
        candidates: list[int] | None,
        hardware: Hardware,
        rows: int,
    ) -> None:
        self.rows = rows  # of the student's head: a larger teacher's may be padded further
        self.teacher = cast(teacher, hardware.dtype).to(hardware.device).eval()
        self.settings, self.candidates, self.hardware = settings, candidates, hardware
        teacher.set_attn_implementation(ATTENTION)
        self.capture = None if layer is None else Capture(teacher, layer, settings.relations)

    def release(self) -> None:
        """Give the teacher back as it was, away from the device."""
        self.teacher.cpu()
        self.teacher.set_attn_implementation("sdpa")
        if self.capture is not None:
            self.capture.release()

    @torch.no_grad()
    def ask(self, rows: list[Encoded], pad: int) -> list[dict[str, Tensor]]:
        """What is remembered of each example, on the CPU."""
        batch = collate(rows, pad, multiple=8)
        ready = self.hardware.move(prepare(batch, Counts(*[1.0] * 5)))
        with self.hardware.autocast():
            output = self.teacher.model(input_ids=ready["input_ids"], use_cache=False)
        counts = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        hidden_AD = output.last_hidden_state.flatten(0, 1)[ready["rows"][: sum(counts)]]
        parts = {name: x.cpu().split(counts) for name, x in self._answers(hidden_AD).items()}
        said = [{name: part[i] for name, part in parts.items()} for i in range(len(rows))]
        for name, x_BTD in zip("qkv", self.capture.take() if self.capture else (), strict=False):
            for row, entry, x_TD in zip(rows, said, x_BTD.cpu(), strict=True):
                entry[f"teacher_{name}"] = x_TD[: len(row.ids)]
        return said

    def _answers(self, hidden_AD: Tensor) -> dict[str, Tensor]:
        """The largest logits of each row, their tokens, and log sum exp of all at temperature."""
        weight_VD = self.teacher.lm_head.weight[: self.rows]
        if self.candidates is not None:
            weight_VD = weight_VD[self.candidates]
        kept = min(self.settings.cache, len(weight_VD))
        said: list[tuple[Tensor, ...]] = []
        chunk = chunk_tokens(len(hidden_AD), len(weight_VD), fused=False)
        for hidden_CD in hidden_AD.to(weight_VD.dtype).split(chunk):
            logits_CV = wide(hidden_CD @ weight_VD.T)
            top = logits_CV.topk(kept)
            total_C = (logits_CV / self.settings.logits.temperature).logsumexp(-1)
            said.append((top.values, top.indices.int(), total_C))
        return dict(zip(ANSWERS, map(torch.cat, zip(*said, strict=True)), strict=True))


class TeacherCache:
    """The answers in a directory; `fill` adds those that are missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._where: dict[str, Any] = {}
        path.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        """Find the examples of every whole shard; a damaged one is asked for again."""
        self._where.clear()
        for file in sorted(self.path.glob("shard-*.safetensors")):
            try:
                shard: Any = safe_open(file, "pt").__enter__()  # mapped for as long as it is used
            except SafetensorError:
                continue
            self._where |= {name.partition(":")[0]: shard for name in shard.keys()}  # noqa: SIM118

    def fill(self, rows: list[Encoded], pad: int, questions: Questions, world: World) -> int:
        """Ask for the examples that are missing, each device for its shards; how many they were."""
        keyed = {key_of(row.ids, row.answer): row for row in rows}
        missing = [key for key in keyed if key not in self._where]
        missing.sort(key=lambda key: (len(keyed[key].ids), key))  # of a length together
        names = [file.stem for file in self.path.glob("shard-*.safetensors")]
        first = 1 + max((int(name.partition("-")[2]) for name in names), default=-1)
        world.gather(first)  # all have looked before any of them writes
        with world.phase():
            for number, start in enumerate(range(0, len(missing), SHARD)):
                if number % world.size == world.rank:
                    part = {key: keyed[key] for key in missing[start : start + SHARD]}
                    self._write(first + number, part, pad, questions)
        self._open()
        return len(missing)

    def _write(self, number: int, part: dict[str, Encoded], pad: int, questions: Questions) -> None:
        tensors: dict[str, Tensor] = {}
        keys = list(part)
        for start in range(0, len(keys), TOGETHER):
            some = keys[start : start + TOGETHER]
            for key, said in zip(some, questions.ask([part[k] for k in some], pad), strict=True):
                tensors |= {f"{key}:{name}": x.contiguous() for name, x in said.items()}
        file = self.path / f"shard-{number:05d}.safetensors"
        partial = file.with_name(file.name + ".partial")
        try:
            save_file(tensors, partial)
        except SafetensorError as error:  # which is no OSError
            raise OSError(f"{file} could not be written ({error}); make room there") from error
        partial.replace(file)

    def attach(self, batch: Batch) -> Batch:
        """The batch with what the teacher said of it; states are padded with zeros."""
        entries = list(self._entries(batch))
        names = entries[0].keys() - REMEMBERED_STATES
        more = {name: torch.cat([entry[name] for entry in entries]) for name in names}
        more["top_ids"] = more["top_ids"].long()
        for name in entries[0].keys() & REMEMBERED_STATES:
            width = entries[0][name].shape[1]
            more[name] = entries[0][name].new_zeros(*batch["input_ids"].shape, width)
            for row_TD, entry in zip(more[name], entries, strict=True):
                row_TD[: len(entry[name])] = entry[name]
        return batch | more

    def _entries(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        lengths = batch["attention_mask"].sum(1).tolist()
        answers = (batch["labels"] != IGNORED).sum(1).tolist()
        names = (*ANSWERS, *sorted(REMEMBERED_STATES))
        for ids, length, answer in zip(batch["input_ids"], lengths, answers, strict=True):
            key = key_of(ids[:length].tolist(), answer)
            shard = self._where[key]
            held = set(shard.keys())
            yield {n: shard.get_tensor(f"{key}:{n}") for n in names if f"{key}:{n}" in held}


class Remembering:
    """Batches that bring what a cache holds of them."""

    def __init__(self, batches: Batches, cache: TeacherCache) -> None:
        self.batches, self.cache = batches, cache

    def window(self, step: int) -> list[Batch]:
        return [self.cache.attach(batch) for batch in self.batches.window(step)]

    def steps_per_epoch(self) -> int | None:
        return self.batches.steps_per_epoch()

    def state(self) -> Any:
        return self.batches.state()

    def restore(self, state: Any) -> None:
        self.batches.restore(state)

    def close(self) -> None:
        self.batches.close()


def remember(
    root: Path,
    made_from: str,
    models: tuple[PreTrainedModel, PreTrainedModel],
    batches: Batches,
    settings: Distillation,
    candidates: list[int] | None,
    hardware: Hardware,
    world: World,
) -> tuple[Remembering, int | None]:
    """Batches that bring the teacher's answers, and the student's layer that its states belong to.

    `models`: student and teacher; `made_from` says what the teacher was.
    """
    assert isinstance(batches, TaskBatches)  # the settings allow no others
    student, teacher = models
    mine = theirs = None
    if settings.relations.active:
        mine, theirs = related_layers(settings.relations, student, teacher)
    asked = [settings.cache, settings.logits.temperature, settings.relations.states, theirs]
    rows = len(student.lm_head.weight)
    name = fingerprint([made_from, asked, candidates, str(hardware.dtype), rows])
    cache = TeacherCache(root / name)
    questions = Questions(teacher, theirs, settings, candidates, hardware, rows)
    cache.fill(batches.rows, batches.pad, questions, world)
    questions.release()
    return Remembering(batches, cache), mine
