"""bitdistill: turn a language model into a 1.58-bit ternary student, and run it in stock runtimes.

    bitdistill.train(config, out)        all stages of a recipe -> student directory
    bitdistill.load(directory)           a teacher or student as a PyTorch model
    bitdistill.load_config(recipe, ...)  a validated configuration
    bitdistill.exporters.export(...)     student directory -> ONNX or MLX artifact
    bitdistill.backends.load(directory)  an artifact, to score and generate with
    bitdistill.evals.run(...)            a table of results
    bitdistill.onnx_library_path()       the custom operators, for onnxruntime in any language

Importing this package loads neither torch nor a runtime; each name is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bitdistill import autoclasses, mlx_models

__version__ = "0.1.0"

_LAZY = {
    "train": "bitdistill.recipe:train",
    "load": "bitdistill.checkpoint:load",
    "load_config": "bitdistill.config:load_config",
    "onnx_library_path": "bitdistill.backends.kernels:library_path",
}
_SUBPACKAGES = ("backends", "evals", "exporters")

__all__ = [
    "__version__",
    "backends",
    "evals",
    "exporters",
    "load",
    "load_config",
    "onnx_library_path",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name].split(":")
        return getattr(import_module(module), attribute)
    if name in _SUBPACKAGES:
        return import_module(f"bitdistill.{name}")
    raise AttributeError(f"module 'bitdistill' has no attribute {name!r}")


autoclasses.watch()
mlx_models.register()
