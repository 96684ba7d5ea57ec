"""`bitdistill doctor`: what works on this machine, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from importlib import metadata

from bitdistill import __version__

REQUIRED = (
    "torch transformers datasets onnx onnxruntime onnx-ir mlx mlx-lm numpy click safetensors "
    "tokenizers pydantic pyyaml rich rouge-score sacrebleu"
).split()
EXTRAS = {
    "gguf": "pip install 'bitdistill[gguf]'",
    "matplotlib": "pip install 'bitdistill[plot]'",
    "lm-eval": "pip install 'bitdistill[lm-eval]'",
    "onnxruntime-genai": "pip install 'bitdistill[genai]'",
}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(lines: list[str]) -> bool:
    healthy = True
    for package in REQUIRED:
        version = _version(package)
        healthy &= version is not None
        lines.append(f"  {package:<20} {version or 'MISSING: pip install ' + package}")
    for package, remedy in EXTRAS.items():
        lines.append(
            f"  {package:<20} {_version(package) or 'not installed (optional): ' + remedy}"
        )
    return healthy


def _torch() -> str:
    import torch

    if torch.cuda.is_available():
        return (
            f"usable, on {torch.cuda.get_device_name()} and {torch.get_num_threads()} CPU threads"
        )
    return f"usable, on {torch.get_num_threads()} CPU threads (no CUDA device)"


def _onnx() -> str:
    import onnxruntime

    from bitdistill.backends.kernels import library_path
    from bitdistill.backends.kernels.binding import Kernels, available_isas

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    return f"usable; instruction sets {', '.join(available_isas())}, in use: {Kernels().isa}"


def _mlx() -> str:
    import mlx.core as mx

    total = mx.sum(mx.ones(8)).item()
    if total != 8.0:
        raise RuntimeError(f"MLX summed 8 ones to {total}")
    device = "Metal" if mx.metal.is_available() else "CPU only (for checking; slow)"
    return f"usable, {device}"


CHECKS = {"torch": _torch, "onnx": _onnx, "mlx": _mlx}
REMEDIES = {
    "torch": "pip install torch",
    "onnx": "pip install onnxruntime, then install bitdistill again with a C++17 compiler",
    "mlx": "pip install 'mlx[cpu]' on Linux, mlx on macOS",
}


def examine() -> tuple[str, bool]:
    """A report for a person, and whether everything that is required works."""
    lines = [
        f"bitdistill {__version__}, Python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        "packages:",
    ]
    healthy = _packages(lines)
    lines.append("runtimes:")
    for name, check in CHECKS.items():
        if importlib.util.find_spec({"onnx": "onnxruntime"}.get(name, name)) is None:
            lines.append(f"  {name:<20} MISSING: {REMEDIES[name]}")
            healthy = False
            continue
        try:
            lines.append(f"  {name:<20} {check()}")
        except Exception as error:  # whatever is wrong with a runtime is what a doctor reports
            lines.append(f"  {name:<20} BROKEN: {error}; {REMEDIES[name]}")
            healthy = False
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    lines.append(f"C++ compiler: {compiler or 'none (only needed to build from source)'}")
    return "\n".join(lines), healthy
