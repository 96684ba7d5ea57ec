"""Opens a model file in ONNX Runtime, and says what went wrong in a sentence with a remedy."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from bitdistill.backends.kernels import library_path
from bitdistill.manifest import FormatError

ERRORS_ONLY = 3


class InstallationError(RuntimeError):
    """What is installed here cannot run the model; the message says what to install."""


def open_session(model: Path, threads: int | None, custom: bool = True) -> ort.InferenceSession:
    """A CPU session, with our operators if `custom`; FormatError or InstallationError."""
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    # A pattern for each length of prompt would take 2 MB more, and be kept.
    options.enable_mem_pattern = False
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, got {threads}")
        options.intra_op_num_threads = threads
    if custom:
        _register(options)
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _explain(model, error) from error


def _register(options: ort.SessionOptions) -> None:
    library = library_path()
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime raises its own classes, derived from Exception
        text = _first_line(error)
        asked = "BITDISTILL_ISA=" in text
        remedy = "change or unset that" if asked else "reinstall bitdistill on this machine"
        raise InstallationError(
            f"the custom operators in {library} cannot be loaded ({text}); {remedy}"
        ) from error


def _explain(model: Path, error: Exception) -> Exception:
    """What a failed load means, in one sentence with the remedy."""
    text = _first_line(error)
    if "is not a registered function/op" in text:
        return InstallationError(
            f"{model} uses an operator that this installation lacks ({text}); upgrade bitdistill "
            "and onnxruntime, or export the student again"
        )
    return FormatError(f"{model} cannot be loaded: damaged or altered ({text}); export it again")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
