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
from pathlib import Path, PureWindowsPath
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
    for key, form in (("kind", str), ("files", dict)):  # without files nothing would be compared
        if not isinstance(manifest.get(key), form):
            raise FormatError(f"{path} has no {key}: altered; make or copy the directory again")
    if kind is not None and manifest["kind"] != kind:
        raise FormatError(f"{directory} holds {an(manifest['kind'])}, expected {an(kind)}")
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
    for name, entry in manifest.get("files", {}).items():
        path = directory / name
        if _leaves(name):
            raise FormatError(
                f"{directory / MANIFEST} lists {name!r}, outside the directory; make it again"
            )
        if not path.is_file():
            raise FormatError(f"{path} is missing; make or copy the directory again")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise FormatError(
                f"{path} has {size} bytes, its manifest says {entry['bytes']}: truncated or "
                "altered; make or copy the directory again"
            )


def _leaves(name: str) -> bool:
    """Whether a name leads out of its directory, on any system.

    Links are followed: every file in a Hugging Face cache is one, to where its content is kept.
    """
    path = PureWindowsPath(name)  # which knows both separators
    return bool(path.anchor) or ".." in path.parts


def weight_files(directory: Path, manifest: dict[str, Any]) -> list[Path]:
    """The safetensors files that a manifest lists: another beside them is of no known origin."""
    names = sorted(name for name in manifest.get("files", {}) if name.endswith(".safetensors"))
    return [directory / name for name in names]


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

    Raises FileExistsError when `path` exists and `force` is false, or while another process writes
    to it. With `force`, the old directory stays until the new one is complete, and only a directory
    that carries a manifest is replaced. A link stays, what it leads to is replaced. Everything is
    on the disk before the name changes, so a power cut leaves no half-written file under a name
    that promises a whole one.
    """
    import shutil

    path = path.resolve()
    _check_free(path, force)  # first, so that a refusal touches nothing
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        _finish_replacement(path)
        _check_free(path, force)
        partial = partial_of(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
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


def _check_free(path: Path, force: bool) -> None:
    """FileExistsError unless a directory may take that place."""
    if not path.name or any(p.exists() and not p.is_dir() for p in (path, *path.parents)):
        raise FileExistsError(f"{path} cannot be a directory there; choose another --out")
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; pass --force to replace it, or another --out")
    if path.exists() and not (path / MANIFEST).is_file() and any(path.iterdir()):
        raise FileExistsError(f"{path} was not written by bitdistill and will not be replaced")


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Within it no other process writes to `path`; FileExistsError where one does.

    The lock is a file that is gone afterwards, beside the directory: what is inside gets renamed.
    Windows needs none, where files that another process has open can be neither removed nor moved.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    file = path.with_name(path.name + ".lock.partial")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        busy = False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = True
        except OSError:
            pass  # a file system without locks
        if busy or not _is_at(descriptor, file):
            raise FileExistsError(
                f"{path} is being written by another process; wait until it ends, or choose "
                "another --out"
            )
        try:
            yield
        finally:
            file.unlink(missing_ok=True)  # while it is held: a later one is another file
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file still has its name: who held the lock before has removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


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
