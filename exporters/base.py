"""Student directory -> artifact directory: what is the same for every target.

An exporter is a function `write(student, out, options, progress) -> dict`: it writes the runtime's
own files into `out` and answers with its part of the manifest (`parts` in bytes, `storage`,
`context`, ...). Its module says in EMBED_BITS and WEIGHT_BITS what it can store an embedding and
a ternary weight in. A target is a row in EXPORTERS and one file. `export` opens the student, builds
the directory beside its destination, adds tokenizer, config and card, and seals it last, so that an
interrupted export leaves nothing behind.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from bitdistill import manifest
from bitdistill.backends.registry import resolve
from bitdistill.exporters.card import card
from bitdistill.names import suggest

if TYPE_CHECKING:
    from bitdistill.checkpoint import StudentFiles

EXPORTERS = {
    "onnx": "bitdistill.exporters.to_onnx:write",
    "mlx": "bitdistill.exporters.to_mlx:write",
}
DEFAULT_CONTEXT = 8192
Dtype = Literal["float16", "bfloat16", "float32"]
# fields of Options that few targets have
OPTIONAL = ("activation_bits", "dtype", "model_file", "ops", "with_library", "task", "kv_bits")
INHERITED = ("family", "method", "task", "base_model", "licence", "seed")

Progress = Callable[[str, int, int], None]  # name of a tensor, tensors done, tensors in all


@dataclass(frozen=True)
class Options:
    """What an exporter may be asked for.

    `embed_bits`: bits of an element of the embedding and head, one of the target's EMBED_BITS.
    `context`: the most tokens a sequence may have (None: the model's own, at most 8192).
    `weight_bits`: bits of a ternary weight, one of the target's WEIGHT_BITS. A target takes those
    of the others that its OPTIONS name: `activation_bits`, 8 or None for unquantised activations,
    whatever the student was trained with; `dtype`, the type that other values are stored and
    computed in (None: the target's choice); `model_file`, whether to add the architecture as a
    Python file for loaders that trust it; `ops`, which operators the artifact uses, one of the
    target's OPS (None: its default); `with_library`, whether to copy the custom operators' library
    in; `task`, to make a classifier for this label task: a head of its answers alone; `kv_bits`,
    bits of an element of the cache of keys and values, one of the target's KV_BITS (None: its
    default).
    """

    embed_bits: int = 16
    context: int | None = None
    weight_bits: float = 2.0
    activation_bits: int | Literal["trained"] | None = "trained"
    dtype: Dtype | None = None
    model_file: bool = False
    ops: str | None = None
    with_library: bool = False
    task: str | None = None
    kv_bits: int | None = None

    def resolve_context(self, model_context: int) -> int:
        """The context of the artifact; ValueError unless it is between 1 and the model's."""
        context = min(model_context, DEFAULT_CONTEXT) if self.context is None else self.context
        if not 0 < context <= model_context:
            raise ValueError(f"context {context} is not between 1 and the model's {model_context}")
        return context


class ExportError(RuntimeError):
    """What was written is not what was to be written; the message says what to do."""


class Exporter(Protocol):
    """Write a runtime's own files into `out`; the result is merged into the manifest."""

    def __call__(
        self, student: StudentFiles, out: Path, options: Options, progress: Progress
    ) -> dict[str, Any]: ...


def export(
    student: str | Path,
    target: str,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    check: Callable[[Path], dict[str, Any]] | None = None,
    **options: Any,
) -> Path:
    """Export a student directory for `target` ("onnx", "mlx") to the directory `out`.

    `options` are fields of `Options`. `check`, if given, is called on the complete directory before
    it takes its place; its result is stored in the manifest as `parity`. Raises FormatError when
    `student` is not a complete student, FileExistsError when `out` exists (with `force`: unless it
    is an artifact), ValueError for an unknown target or option.
    """
    write: Exporter = resolve(EXPORTERS, target, "target")
    chosen = _checked(target, sys.modules[write.__module__], options)
    files = _open(Path(student))
    out = Path(out)
    _guard(out, force)
    with manifest.new_directory(out, force=force) as partial:
        part = write(files, partial, chosen, progress or _silent)
        content = _describe(files, target) | part
        _complete(files, partial, content)
        manifest.write_manifest(partial, "artifact", content)
        if check is not None:
            content["parity"] = check(partial)
            manifest.write_manifest(partial, "artifact", content)
    return out


def _checked(target: str, exporter: Any, given: dict[str, Any]) -> Options:
    """Options that the target has; ValueError for another, TypeError for one that nothing has."""
    options, default = Options(**given), Options()
    _check_bits(target, "embed_bits", options.embed_bits, exporter.EMBED_BITS)
    _check_bits(target, "weight_bits", options.weight_bits, exporter.WEIGHT_BITS)
    for name in OPTIONAL:
        if getattr(options, name) != getattr(default, name) and name not in exporter.OPTIONS:
            raise ValueError(
                f"{target} has no option {name}; leave it out, or choose another target"
            )
    if options.activation_bits not in ("trained", 8, None):
        raise ValueError(f"activation_bits must be 8 or None, got {options.activation_bits!r}")
    dtypes = get_args(Dtype)
    if options.dtype is not None and options.dtype not in dtypes:
        raise ValueError(f"unknown dtype {options.dtype!r}{suggest(options.dtype, dtypes)}")
    if options.kv_bits is not None:
        _check_bits(target, "kv_bits", options.kv_bits, exporter.KV_BITS)
    if options.ops is not None and options.ops not in exporter.OPS:
        raise ValueError(f"unknown ops {options.ops!r}{suggest(options.ops, exporter.OPS)}")
    return options


def _check_bits(target: str, option: str, bits: float, allowed: tuple[float, ...]) -> None:
    """ValueError unless `bits` is allowed for the option."""
    if bits not in allowed:
        nearest = min(allowed, key=lambda known: abs(known - bits))
        choices = ", ".join(f"{known:g}" for known in allowed)
        raise ValueError(
            f"{option} must be one of {choices} for {target}, got {bits:g}; "
            f"did you mean {nearest:g}?"
        )


def _silent(name: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def _open(path: Path) -> StudentFiles:
    kind = manifest.read_manifest(path)["kind"]
    if kind != "student":
        raise manifest.FormatError(
            f"{path} holds {manifest.an(kind)}, only a student can be exported; give the student "
            "directory that `bitdistill train` wrote"
        )
    from bitdistill.checkpoint import open_student  # imports torch

    student = open_student(path)
    manifest.check_sizes(path, student.manifest)
    return student


def _guard(out: Path, force: bool) -> None:
    """With `force`, only an artifact may be replaced: a student or teacher is hours of work."""
    if force and (out / manifest.MANIFEST).is_file():
        kind = manifest.read_manifest(out)["kind"]
        if kind != "artifact":
            raise FileExistsError(
                f"{out} holds {manifest.an(kind)} and is not replaced; choose another --out"
            )


def _describe(student: StudentFiles, target: str) -> dict[str, Any]:
    """The part of the manifest that no target changes."""
    from bitdistill import __version__

    return {
        "target": target,
        **{key: student.manifest.get(key) for key in INHERITED},
        "student_fingerprint": student.fingerprint,
        "decoder": student.spec.to_json(),
        "context": student.spec.context,
        "stop_tokens": student.stop_tokens,
        "created_by": f"bitdistill {__version__}",
    }


def _complete(student: StudentFiles, out: Path, content: dict[str, Any]) -> None:
    """Add tokenizer, config and card, where the exporter has not written its own."""
    for file in (*student.tokenizer_files(), student.path / "config.json"):
        if not (out / file.name).exists():
            shutil.copyfile(file, out / file.name)
    if not (out / "README.md").exists():
        (out / "README.md").write_text(card(content), encoding="utf-8")


def bits_per_weight(artifact: Path) -> str:
    """Bits per weight of an artifact's parts, scales included: "body 2.250, embedding 16.000"."""
    parts = manifest.read_manifest(artifact, "artifact")["parts"]
    ending = "_bits_per_weight"
    bits = {k.removesuffix(ending): v for k, v in parts.items() if k.endswith(ending)}
    return ", ".join(f"{part} {value:.3f}" for part, value in bits.items())
