"""What is to be evaluated, checked before any model is loaded.

A row of the table is a directory: a teacher, a student, an artifact, or any Hugging Face model; a
`Variant` of one, loaded in another way; or a GGUF file, which is timed and not scored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bitdistill import manifest
from bitdistill.evals.sizes import tensor_parts
from bitdistill.names import suggest
from bitdistill.tasks import Task, get_task

RUNTIME_PACKAGES = {
    "torch": ("torch", "transformers"),
    "onnx": ("onnxruntime",),
    "mlx": ("mlx",),
}
METRICS = {
    "label": ("accuracy", "ece", "perplexity"),
    "summary": ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "perplexity"),
}
METRIC_PACKAGES = {"label": (), "summary": ("rouge_score", "sacrebleu")}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float64": "fp64"}
TERNARY = "1.58-bit"


@dataclass(frozen=True)
class Variant:
    """A directory with options for its runtime, such as `{"dtype": "bfloat16"}` for PyTorch."""

    path: str | Path
    load: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Directory:
    """One row: its path, its manifest, and options for its runtime."""

    path: Path
    manifest: dict[str, Any]
    load: dict[str, Any] = field(default_factory=dict)
    told_apart: str = ""  # the end of its path, where another row's directory has the same name

    @property
    def is_artifact(self) -> bool:
        return self.manifest["kind"] == "artifact"

    @property
    def is_scored(self) -> bool:
        """Whether it predicts; a GGUF file is timed only."""
        return self.manifest["kind"] != "gguf"

    @property
    def backend(self) -> str:
        """torch, or the target an artifact was exported for."""
        if not self.is_scored:
            return "llama.cpp"
        return self.manifest["target"] if self.is_artifact else "torch"

    @property
    def precision(self) -> str:
        """How weights are held: 1.58-bit, fp32, bf16, int4, int2, or a GGUF file's name.

        A student that computes in another type than fp32 adds it: "1.58-bit in fp64".
        """
        if self.manifest["kind"] == "student" or self.is_artifact:
            held = str(self.manifest.get("precision", TERNARY))
            return f"{held} in {PRECISIONS[self.load['dtype']]}" if "dtype" in self.load else held
        if not self.is_scored:
            return self.path.stem
        return PRECISIONS[self.load.get("dtype", "float32")]

    @property
    def name(self) -> str:
        """Its name in progress messages and reports."""
        options = "".join(f" ({value})" for value in self.load.values())
        return f"{self.told_apart or self.path.name}{options}"

    @cached_property
    def hash(self) -> str:
        """A hash of its files' hashes, and of its options."""
        files = self.manifest["files"]
        return manifest.fingerprint([files, self.load] if self.load else files)

    @property
    def task(self) -> Task | None:
        """The task it was trained for, if its manifest records one."""
        record = self.manifest.get("task")
        return Task.from_json(record) if record else None

    @property
    def student(self) -> str | None:
        """Fingerprint of the student's weights; None for a teacher."""
        if self.is_artifact:
            return self.manifest.get("student_fingerprint")
        return weights_fingerprint(self.manifest) if self.manifest["kind"] == "student" else None

    @property
    def context(self) -> int | None:
        """The longest sequence of an artifact; None where the model's own config says."""
        return self.manifest.get("context")

    @property
    def bytes(self) -> int:
        """Size on disk, the manifest included."""
        listed = sum(entry["bytes"] for entry in self.manifest["files"].values())
        own = self.path / manifest.MANIFEST
        return listed + (own.stat().st_size if own.is_file() else 0)

    @cached_property
    def parts(self) -> dict[str, Any] | None:
        """Bytes of each part of the model, where its files say."""
        if not self.is_scored:
            return None
        return self.manifest.get("parts") or tensor_parts(self.path)


def weights_fingerprint(content: dict[str, Any]) -> str:
    """A student's weights in one hash, as `StudentFiles.fingerprint` has it, but without torch."""
    weights = {n: f["sha256"] for n, f in content["files"].items() if n.endswith(".safetensors")}
    return manifest.fingerprint(weights)


def open_directories(
    paths: Sequence[str | Path | Variant], device: str | None = None, floor: bool = False
) -> list[Directory]:
    """Read every manifest; FormatError, ValueError or ImportError for what cannot be evaluated.

    `device` is for what runs in PyTorch. `floor` adds a row in fp64 for each student there.
    """
    variants = [path if isinstance(path, Variant) else Variant(path) for path in paths]
    directories = [_open(Path(variant.path), variant.load) for variant in variants]
    directories = _tell_apart(directories)
    if device is not None:
        moved = {"device": device}
        directories = [
            replace(d, load=d.load | moved) if d.backend == "torch" else d for d in directories
        ]
    if floor:
        students = [d for d in directories if d.manifest["kind"] == "student"]
        directories += [replace(d, load=d.load | {"dtype": "float64"}) for d in students]
    if not any(directory.is_scored for directory in directories):
        raise ValueError("nothing to evaluate; give at least one teacher, student or artifact")
    if len({(d.path.resolve(), str(d.load)) for d in directories}) < len(directories):
        raise ValueError("a directory is given twice; give each once")
    return directories


def _tell_apart(directories: Sequence[Directory]) -> list[Directory]:
    """Equal names lengthened by their parents until they differ: tiny/student, mine/student."""
    paths = [Path(os.path.abspath(directory.path)) for directory in directories]
    found = []
    for directory, own in zip(directories, paths, strict=True):
        others = [path for path in paths if path != own]
        count = 1
        while any(path.parts[-count:] == own.parts[-count:] for path in others):
            count += 1
        name = "/".join(own.parts[-count:]) if count > 1 else ""
        found.append(replace(directory, told_apart=name))
    return found


def _open(path: Path, load: dict[str, Any]) -> Directory:
    if path.suffix == ".gguf":
        return _open_gguf(path)
    if not (path / manifest.MANIFEST).is_file() and (path / "config.json").is_file():
        return Directory(path, _of_hugging_face(path), load)
    content = manifest.read_manifest(path)
    if content["kind"] not in ("teacher", "student", "artifact"):
        raise manifest.FormatError(
            f"{path} holds a {content['kind']}; give a teacher, a student or an artifact"
        )
    manifest.check_sizes(path, content)
    directory = Directory(path, content, load)
    backend = directory.backend
    if backend not in RUNTIME_PACKAGES:
        raise ValueError(f"{path} is for backend {backend!r}{suggest(backend, RUNTIME_PACKAGES)}")
    _require(RUNTIME_PACKAGES[backend], f"{path} runs on {backend}")
    return directory


def _open_gguf(path: Path) -> Directory:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check the path")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": manifest.hash_file(path)}}
    return Directory(path, {"kind": "gguf", "method": "gguf", "base_model": "", "files": files})


def _of_hugging_face(path: Path) -> dict[str, Any]:
    """A manifest for a model directory that is not of our making."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return {
        "kind": "teacher",
        "method": "base",
        "base_model": config.get("_name_or_path") or path.resolve().name,
        "files": manifest.list_files(path),
    }


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
        _check_classifier(directory, chosen)
    for metric in chosen.metrics:
        if metric not in METRICS[chosen.kind]:
            raise ValueError(
                f"a {chosen.kind} task has no metric {metric!r}"
                f"{suggest(metric, METRICS[chosen.kind])}"
            )
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


def _check_classifier(directory: Directory, chosen: Task) -> None:
    """ValueError where an artifact's head has the answers of another task alone."""
    known = directory.manifest.get("label_tokens")
    if known is None:
        return
    from bitdistill.backends.tokenizer import Tokenizer

    tokenizer = Tokenizer(directory.path)
    wanted = [tokenizer.encode(label, special=False) for label in chosen.labels]
    if not wanted or not {token for answer in wanted for token in answer} <= set(known):
        labels = ", ".join(repr(tokenizer.decode([token])) for token in known)
        answers = ", ".join(map(repr, chosen.labels)) or "summaries"
        raise ValueError(
            f"{directory.path} is a classifier of {labels}, task {chosen.name!r} asks for {answers}"
            "; evaluate it on its own task, or export the student without --task"
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


def find_teacher(paths: Sequence[str | Path]) -> Directory:
    """The first teacher among them; ValueError where there is none."""
    for directory in open_directories(paths):
        if directory.manifest["kind"] == "teacher":
            return directory
    raise ValueError("baselines are made of the teacher; give its directory as well")
