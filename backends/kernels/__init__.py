"""The C++ kernels of the ONNX artifact: where their library is, and a ctypes binding to it.

`library_path()` is what ONNX Runtime's `register_custom_ops_library` wants. `binding.Kernels` calls
the same functions without a runtime; tests and benchmarks use it. NumPy only.
"""

from __future__ import annotations

import os
from pathlib import Path

NAMES = ("libbitdistill_ops.so", "libbitdistill_ops.dylib", "bitdistill_ops.dll")


def library_path() -> Path:
    """The custom-op library of this installation.

    In an editable install it lies beside the installed package, not beside this file, so every
    directory of the package is searched. Raises FileNotFoundError when it was not built.
    """
    for folder in map(Path, __path__):
        for name in NAMES:
            path = folder / name
            if path.is_file():
                return path
    searched = os.pathsep.join(__path__)
    raise FileNotFoundError(
        f"the kernel library (libbitdistill_ops) is not in {searched}: this bitdistill was not "
        "built here. Install it with `pip install .`, which needs a C++17 compiler, or from a wheel"
    )
