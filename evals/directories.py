"""What is to be evaluated, checked before any model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitdistill import manifest
from bitdistill.names import suggest
from bitdistill.tasks import Task, get_task

RUNTIME_PACKAGES = {
    "torch": ("torch", "transformers"),
    "onnx": ("onnxruntime",),
    "mlx": ("mlx",),
}
METRIC_PACKAGES = {"label": (), "summary": ("rouge_score", "sacrebleu")}


@dataclass(frozen=True)
class Directory:
    """A directory to evaluate: its path and its manifest."""

    path: Path
    manifest: dict[str, Any]

    @property
    def is_artifact(self) -> bool:
        return self.manifest["kind"] == "artifact"

    @property
    def backend(self) -> str:
        """torch, or the target an artifact was exported for."""
        return self.manifest["target"] if self.is_artifact else "torch"

    @property
    def task(self) -> Task | None:
        """The task it was trained for, if its manifest records one."""
        record = self.manifest.get("task")
        return Task.from_json(record) if record else None

    @property
    def student(self) -> str | None:
        """Fingerprint of the student's weights; None for a teacher."""
        if self.is_artifact:
            return self.manifest["student_fingerprint"]
        return weights_fingerprint(self.manifest) if self.manifest["kind"] == "student" else None

    @property
    def context(self) -> int | None:
        """The longest sequence of an artifact; None where the model's own config says."""
        return self.manifest.get("context")

    @property
    def bytes(self) -> int:
        """Size on disk, the manifest included."""
        listed = sum(entry["bytes"] for entry in self.manifest["files"].values())
        return listed + (self.path / manifest.MANIFEST).stat().st_size


def weights_fingerprint(content: dict[str, Any]) -> str:
    """A student's weights in one hash, as `StudentFiles.fingerprint` has it, but without torch."""
    weights = {n: f["sha256"] for n, f in content["files"].items() if n.endswith(".safetensors")}
    return manifest.fingerprint(weights)


def open_directories(paths: Sequence[str | Path]) -> list[Directory]:
    """Read every manifest; FormatError, ValueError or ImportError for what cannot be evaluated."""
    if not paths:
        raise ValueError("nothing to evaluate; give at least one teacher, student or artifact")
    directories = [_open(Path(path)) for path in paths]
    if len({directory.path.resolve() for directory in directories}) < len(directories):
        raise ValueError("a directory is given twice; give each once")
    return directories


def _open(path: Path) -> Directory:
    content = manifest.read_manifest(path)
    if content["kind"] not in ("teacher", "student", "artifact"):
        raise manifest.FormatError(
            f"{path} holds a {content['kind']}; give a teacher, a student or an artifact"
        )
    manifest.check_sizes(path, content)
    directory = Directory(path, content)
    backend = directory.backend
    if backend not in RUNTIME_PACKAGES:
        raise ValueError(f"{path} is for backend {backend!r}{suggest(backend, RUNTIME_PACKAGES)}")
    _require(RUNTIME_PACKAGES[backend], f"{path} runs on {backend}")
    return directory


def _require(packages: Sequence[str], why: str) -> None:
    """Find a missing package before the long work."""
    missing = [name.replace("_", "-") for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{why}, which needs {' and '.join(missing)}; run: pip install {' '.join(missing)}"
        )


def choose_task(directories: Sequence[Directory], task: Task | str | None) -> Task:
    """The one task of a run; the prompt that a directory was trained with is never replaced.

    A name means the recorded task of that name, else the built-in one. None is the first
    directory's. Raises ValueError where a directory records the same task with another prompt, and
    ImportError where a metric's package is missing.
    """
    if isinstance(task, Task):
        chosen = task
    elif task is not None:
        named = [d.task for d in directories if d.task is not None and d.task.name == task]
        chosen = named[0] if named else get_task(task)
    elif (recorded := directories[0].task) is not None:
        chosen = recorded
    else:
        raise ValueError(f"{directories[0].path} records no task; name one with --task")
    for directory in directories:
        _check_same(directory, chosen)
    _require(METRIC_PACKAGES[chosen.kind], f"task {chosen.name} is scored by ROUGE and BLEU")
    return chosen


def _check_same(directory: Directory, chosen: Task) -> None:
    own = directory.task
    if own is None or own.name != chosen.name:
        return
    if (own.prompt, own.labels) != (chosen.prompt, chosen.labels):
        raise ValueError(
            f"{directory.path} was trained for task {chosen.name!r} with another prompt or other "
            "answers; evaluate it in a run of its own"
        )


def recorded_data(
    directories: Sequence[Directory], task: Task
) -> tuple[str | None, dict[str, str] | None]:
    """The validation file and column mapping that training recorded for this task, if any."""
    for directory in directories:
        own = directory.task
        if own is not None and own.name == task.name and directory.manifest.get("validation"):
            return directory.manifest["validation"], directory.manifest.get("columns")
    return None, None
