"""Directories that are either complete or absent, and the manifest that proves it.

Every hand-over between steps is a directory with a `bitdistill.json`, written last. A directory is
built beside its destination (`NAME.partial`) and renamed when it is complete, so an interrupted run
leaves nothing that looks finished. Nothing here needs more than the standard library, because the
runtimes read manifests without torch or transformers. `hashlib` and `shutil` are imported where
they are used: their libraries take 4 MB, which a runtime that only reads a manifest does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "bitdistill.json"


class FormatError(ValueError):
    """A directory that is not what its manifest says, or has no manifest."""


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    import hashlib

    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint(value: Any) -> str:
    """A short stable hash of any JSON value."""
    import hashlib

    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path` and rename it into place."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def list_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below a directory, the manifest excepted."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {
        p.relative_to(directory).as_posix(): {"bytes": p.stat().st_size, "sha256": hash_file(p)}
        for p in paths
    }


def write_manifest(directory: Path, kind: str, content: dict[str, Any]) -> None:
    """Seal a directory: `content` plus format version, kind and the hash of every file."""
    head = {"format_version": FORMAT_VERSION, "kind": kind}
    write_json(directory / MANIFEST, head | content | {"files": list_files(directory)})


def read_manifest(directory: Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a complete directory; FormatError with the remedy otherwise."""
    path = directory / MANIFEST
    if not path.is_file():
        raise FormatError(_missing(directory))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path} is not valid JSON ({error}); make the directory again") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise FormatError(
            f"{directory} has format version {version}, this bitdistill reads {FORMAT_VERSION}; "
            "make it again, or install the version that wrote it"
        )
    if kind is not None and manifest.get("kind") != kind:
        raise FormatError(f"{directory} holds {an(manifest.get('kind'))}, expected {an(kind)}")
    return manifest


def an(kind: Any) -> str:
    """`a student`, `an artifact`."""
    return f"an {kind}" if str(kind)[:1] in tuple("aeio") else f"a {kind}"


def _missing(directory: Path) -> str:
    if not directory.exists() and _replaced(directory).exists():
        return (
            f"{directory} was being replaced when the process died; rename "
            f"{_replaced(directory)} to it, or make it again"
        )
    if not directory.exists():
        return f"{directory} does not exist; check the path"
    inside = sorted(p.parent.name for p in directory.glob(f"*/{MANIFEST}"))
    hint = (
        f"; did you mean {directory / ('student' if 'student' in inside else inside[-1])}?"
        if (inside)
        else "; give a directory written by `bitdistill train` or `bitdistill export`"
    )
    return f"{directory} has no {MANIFEST}{hint}"


def check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    """Check that every file the manifest lists is there, inside, and of the size it had."""
    root = directory.resolve()
    for name, entry in manifest.get("files", {}).items():
        path = directory / name
        if not path.resolve().is_relative_to(root):
            raise FormatError(f"{directory / MANIFEST} lists {name!r}, outside the directory")
        if not path.is_file():
            raise FormatError(f"{path} is missing; make or copy the directory again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise FormatError(
                f"{path} has {size} bytes, its manifest says {entry['bytes']}: truncated or "
                "altered; make or copy the directory again"
            )


def verify_files(directory: Path, manifest: dict[str, Any]) -> None:
    """Check sizes, then hashes, of every file the manifest lists; FormatError names the first."""
    check_sizes(directory, manifest)
    for name, entry in manifest.get("files", {}).items():
        path = directory / name
        if hash_file(path) != entry["sha256"]:
            raise FormatError(
                f"{path} does not match the hash in its manifest: altered; make or copy it again"
            )


@contextlib.contextmanager
def new_directory(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Build a directory beside `path`; rename it into place only if the body succeeds.

    Raises FileExistsError when `path` exists and `force` is false. With `force`, the old directory
    stays until the new one is complete, and only a directory that carries a manifest is replaced.
    Everything is on the disk before the name changes, so a power cut leaves no half-written file
    under a name that promises a whole one.
    """
    import shutil

    if any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
        raise FileExistsError(f"{path} cannot be a directory there; choose another --out")
    _finish_replacement(path)
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; pass --force to replace it, or another --out")
    if path.exists() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        raise FileExistsError(f"{path} was not written by bitdistill and will not be replaced")
    partial = partial_of(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _flush(partial)
        if not path.exists():
            partial.rename(path)
        elif not _exchange(partial, path):
            path.rename(_replaced(path))
            partial.rename(path)
            _finish_replacement(path)
        _flush_file(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """Where `new_directory` builds what becomes `path`."""
    return path.with_name(path.name + ".partial")


def _replaced(path: Path) -> Path:
    """Where a directory waits between the two renames that replace it."""
    return path.with_name(path.name + ".old.partial")


def _finish_replacement(path: Path) -> None:
    """After a crash between those two renames the old directory takes its name back."""
    old = _replaced(path)
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        import shutil

        shutil.rmtree(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that the name is never without one; false if it cannot.

    Linux and macOS have a call for it, some file systems refuse it.
    """
    if sys.platform == "win32":
        return False
    library, paths = ctypes.CDLL(None), (os.fsencode(one), os.fsencode(other))
    if hasattr(library, "renameat2"):
        here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return library.renameat2(here, paths[0], here, paths[1], swap) == 0
    if hasattr(library, "renamex_np"):
        return library.renamex_np(*paths, 2) == 0  # RENAME_SWAP
    return False


def _flush(directory: Path) -> None:
    """Have every file and folder of a tree on the disk."""
    for path in directory.rglob("*"):
        _flush_file(path)
    _flush_file(directory)


def _flush_file(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return  # only there can a folder be opened
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
