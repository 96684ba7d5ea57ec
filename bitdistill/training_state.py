"""What a resumed run needs, on disk: numbered states of which the last few are kept.

    STAGE.training/step-00000500/   {model,optimizer}.safetensors, position.json, manifest
    STAGE.training/step-00001000/

A state is built beside its place, flushed to the disk and renamed, and nothing is ever replaced in
place: whenever a run dies, the states before are whole. Reading checks every hash. A damaged newest
state is reported and set aside (`step-N.damaged`), and the one before it is used.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitdistill import manifest
from bitdistill.distributed import ALONE, World
from bitdistill.hardware import TrainingError

PREFIX = "step-"
WEIGHTS, OPTIMIZER = "model", "optimizer"  # stems of the files
DAMAGED = ".damaged"
SHARE = 0.05  # of the time, that saving on a schedule of minutes may take


class Budget:
    """What may be lost: so many minutes or so many steps, whichever comes first.

    Training waits while a state is written, a large one for minutes. Minutes are therefore at least
    those in which the last save was SHARE of the time; steps are taken at their word. `clock` gives
    seconds.
    """

    def __init__(
        self,
        minutes: float,
        steps: int | None,
        start: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self.steps = 60 * minutes, steps
        self._clock, self._step, self._since = clock, start, clock()
        self._took = 0.0

    def due(self, step: int, recorded: bool) -> bool:
        """Whether the state after `step` steps is to be saved.

        Minutes count only where a record was just written: the records of a resumed run then
        average the same steps.
        """
        if self.steps is not None and step - self._step >= self.steps:
            return True
        return recorded and self._clock() - self._since > max(self.seconds, self._took / SHARE)

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Within it the state after `step` steps is saved; minutes and steps count from its end."""
        began = self._clock()
        yield
        self._step, self._since = step, self._clock()
        self._took = self._since - began


class States:
    """The saved states of one stage; at most `keep` of them.

    `identity` is what must be equal for a state to be continued; `say` tells the person of damage.
    Of several processes each writes and reads its own shards; the first does the rest.
    """

    def __init__(
        self,
        path: Path,
        identity: dict[str, Any],
        keep: int,
        say: Callable[[str], None],
        world: World = ALONE,
    ) -> None:
        self.path, self.identity, self.keep, self.say = path, identity, keep, say
        self.world = world

    def save(
        self,
        step: int,
        parts: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        position: dict[str, Any],
    ) -> None:
        """Write a state, whole or not at all, then forget the oldest beyond `keep`.

        `parts` is what this process trains, by name: the tensors that the optimizer moves.
        TrainingError where it cannot be written, as on a full disk; the states before stay.
        """
        path = self.path / f"{PREFIX}{step:08d}"
        if (path / manifest.MANIFEST).is_file():
            return  # a signal after a save on schedule: the state of this step is there
        world, identity = self.world, self.identity
        try:
            with ExitStack() as stack:
                with world.phase():
                    if world.main:
                        self._clear_unfinished()
                        stack.enter_context(manifest.new_directory(path))
                partial = manifest.partial_of(path)
                with world.phase():
                    _write_tensors(partial, parts, optimizer, world)
                with world.phase():
                    if world.main:
                        manifest.write_json(partial / "position.json", {"step": step, **position})
                        manifest.write_manifest(partial, "training-state", identity)
                        stack.pop_all().close()
        except (OSError, SafetensorError) as error:
            raise TrainingError(self._unwritten(step, error)) from error
        if world.main:
            for old in saved_states(self.path)[: -self.keep]:
                _remove(old)

    def _clear_unfinished(self) -> None:
        """Remove what a run that was killed had begun to write or to remove."""
        for unfinished in self.path.glob(f"{PREFIX}*.partial"):
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink()  # its lock

    def _unwritten(self, step: int, error: Exception) -> str:
        states = saved_states(self.path)
        rest = f"; the state of {states[-1].name} is kept, and --resume continues it"
        return (
            f"the training state of step {step} could not be written to {self.path} ({error}); "
            f"free space there{rest if states else ''}"
        )

    def restore(self, parts: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return to the newest whole state and give its position.

        Raises FormatError if none is whole, TrainingError if it belongs to another run. Every hash
        is checked before anything is changed.
        """
        with self.world.phase():
            path = self._newest_whole() if self.world.main else self.path
        path = self.path / self.world.gather(path.name)[0]
        _read_tensors(path, parts, optimizer, self.world)
        return json.loads((path / "position.json").read_text("utf-8"))

    def _newest_whole(self) -> Path:
        """The state to continue; damaged newer ones are reported and set aside."""
        states = saved_states(self.path)
        damage: list[str] = []
        while states:
            path = states.pop()
            try:
                content = manifest.read_manifest(path, "training-state")
                manifest.verify_files(path, content)
            except manifest.FormatError as error:
                damage.append(str(error))
                continue
            self._check_identity(path, content)
            self._set_aside(path, damage)
            return path
        raise manifest.FormatError(
            f"{self.path} holds no whole training state ({damage[0] if damage else 'it is empty'});"
            " remove it to start the stage again"
        )

    def _set_aside(self, path: Path, damage: list[str]) -> None:
        """`path` was found whole; newer states were not."""
        for state in saved_states(self.path):
            if state.name > path.name:
                aside = state.with_name(state.name + DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                state.rename(aside)
        for reason in damage:
            self.say(f"a saved state is damaged ({reason}); the one before it, {path}, is used")

    def _check_identity(self, path: Path, content: dict[str, Any]) -> None:
        if differing := [k for k, v in self.identity.items() if content.get(k) != v]:
            raise TrainingError(
                f"{path} is the state of another run ({', '.join(differing)} differ); continue "
                f"with the configuration it began with, or remove {self.path} to start stage "
                f"{self.identity['stage']} again"
            )


def saved_states(path: Path) -> list[Path]:
    """The states below a stage's state directory, oldest first; some may turn out damaged."""
    return sorted(p for p in path.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit())


def discard(path: Path) -> None:
    """Remove all states of a stage, once its directory is complete."""
    if path.exists():
        shutil.rmtree(path)


def _remove(state: Path) -> None:
    """Take the manifest first: a state half removed is not taken for a whole one."""
    aside = state.with_name(state.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    state.rename(aside)
    shutil.rmtree(aside)


def _write_tensors(
    folder: Path, parts: dict[str, Tensor], optimizer: torch.optim.Optimizer, world: World
) -> None:
    """This process' shards; several processes' files differ in a number."""
    suffix = "" if world.size == 1 else f"-{world.rank:05d}-of-{world.size:05d}"
    names = {id(part): name for name, part in parts.items()}
    tensors = _random_states()
    for part, values in optimizer.state.items():
        for key, value in values.items():
            tensors[f"{names[id(part)]}:{key}"] = torch.as_tensor(value).contiguous()
    weights = {name: part.detach().contiguous() for name, part in parts.items()}
    save_file(weights, folder / f"{WEIGHTS}{suffix}.safetensors")
    save_file(tensors, folder / f"{OPTIMIZER}{suffix}.safetensors")


class _Shards:
    """The tensors of one state, put together from the files of however many processes wrote it."""

    def __init__(self, stack: ExitStack, folder: Path, stem: str) -> None:
        files = sorted(folder.glob(f"{stem}*.safetensors"))
        self._files = [stack.enter_context(safe_open(file, "pt")) for file in files]

    def names(self) -> list[str]:
        return sorted(self._files[0].keys())

    def whole(self, name: str) -> Tensor:
        """One tensor, a copy: a mapped file could not be removed from the disk."""
        parts = [file.get_tensor(name) for file in self._files]
        return parts[0].clone() if parts[0].ndim == 0 else torch.cat(parts)

    def first(self, name: str) -> Tensor:
        """The first process' own tensor."""
        return self._files[0].get_tensor(name).clone()


@torch.no_grad()
def _read_tensors(
    folder: Path, parts: dict[str, Tensor], optimizer: torch.optim.Optimizer, world: World
) -> None:
    """One tensor at a time; this process keeps the part that it has of it."""
    random_states = {}
    with ExitStack() as stack:
        weights = _Shards(stack, folder, WEIGHTS)
        for name, part in parts.items():
            part.copy_(world.part(weights.whole(name)))
        tensors = _Shards(stack, folder, OPTIMIZER)
        for key in tensors.names():
            name, _, field = key.rpartition(":")
            if name in parts:
                value = world.part(tensors.whole(key)).to(parts[name].device, copy=True)
                optimizer.state[parts[name]][field] = value
            else:
                random_states[field] = tensors.first(key)
    _set_random_states(random_states)


def _random_states() -> dict[str, Tensor]:
    """PyTorch's generators, CPU and GPUs; no run draws on Python's or NumPy's global ones."""
    states = {"random:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states[f"random:cuda{index}"] = state
    return states


def _set_random_states(states: dict[str, Tensor]) -> None:
    """Set the generators, as far as there are such GPUs."""
    torch.set_rng_state(states["cpu"])
    for index in range(torch.cuda.device_count()):
        if (state := states.get(f"cuda{index}")) is not None:
            torch.cuda.set_rng_state(state, index)
