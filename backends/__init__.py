"""Runtimes: model directory -> logits and tokens, behind one protocol (see base.py).

`load` answers with the runtime that a directory is made for. Importing this package imports none of
them, nor NumPy: a runtime is a row in BACKENDS and one file with a subclass of `Runtime`.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitdistill import manifest as manifests
from bitdistill.backends.registry import resolve

if TYPE_CHECKING:
    from bitdistill.backends.base import Cache, Runtime

__all__ = ["BACKENDS", "Cache", "Runtime", "load"]

BACKENDS = {
    "torch": "bitdistill.backends.torch_runtime:TorchRuntime",
    "onnx": "bitdistill.backends.onnx_runtime:OnnxRuntime",
    "mlx": "bitdistill.backends.mlx_runtime:MlxRuntime",
}


def load(
    path: str | Path,
    backend: str | None = None,
    threads: int | None = None,
    verify: bool = True,
    **options: Any,
) -> Runtime:
    """Load a teacher, student or artifact directory; a plain Hugging Face directory is a teacher.

    `backend` is found from the directory; naming one only checks it. `threads` limits CPU threads
    (None: the runtime's own choice). `verify` compares every file with the hash in the manifest;
    sizes are compared always. `options` go to the runtime (torch: `dtype`, `storage`; onnx:
    `warm`).

    Raises FormatError for a directory that is incomplete, altered or of another format version,
    ValueError for an unknown backend or one that cannot run the directory.
    """
    path = Path(path).absolute()  # files are read later too, wherever the process is then
    manifest = _read(path)
    found = manifest["target"] if manifest.get("kind") == "artifact" else "torch"
    if verify:
        from concurrent.futures import ThreadPoolExecutor  # with what it imports, 0.5 MB

        with ThreadPoolExecutor(1) as pool:  # files are hashed while a runtime is imported
            checked = pool.submit(manifests.verify_files, path, manifest)
            runtime = _runtime(path, found, backend)
            checked.result()
    else:
        manifests.check_sizes(path, manifest)
        runtime = _runtime(path, found, backend)
    loaded: Runtime = runtime(path, manifest, threads=threads, **options)
    return loaded


def _runtime(path: Path, found: str, asked: str | None) -> Any:
    """The class of the runtime that a directory is made for, which may also be asked for."""
    runtime = resolve(BACKENDS, asked or found, "backend")
    if asked not in (None, found):
        raise ValueError(
            f"{path} is made for {found}, not {asked}; leave the backend out, or export the "
            f"student with --target {asked}"
        )
    return runtime


def _read(path: Path) -> dict[str, Any]:
    """The manifest, or {} for a Hugging Face directory that has none."""
    if not (path / manifests.MANIFEST).is_file() and (path / "config.json").is_file():
        return {}
    manifest = manifests.read_manifest(path)
    if manifest["kind"] == "artifact" and "target" not in manifest:
        raise manifests.FormatError(f"{path / manifests.MANIFEST} names no target; export it again")
    return manifest


def __getattr__(name: str) -> Any:
    if name not in ("Cache", "Runtime"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.base"), name)
