"""`bitdistill mlx`: mlx-lm's own programs, with our architectures known to them.

The arguments are mlx-lm's. Two things differ from running mlx-lm after `import bitdistill`: a
`model_file` in a student's directory is ignored, because the architecture is installed here and no
code from a directory is run; and a stock artifact in 16 bits on a machine without Metal is warned
about.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bitdistill import manifest

COMMANDS = ("generate", "server", "chat", "lora", "convert")
TRUST = "--trust-remote-code"


def run(command: str, arguments: Sequence[str]) -> None:
    """Run one of mlx-lm's COMMANDS. ValueError for the flag that runs code from a directory."""
    if any(_trusts(argument) for argument in arguments):
        raise ValueError(
            f"bitdistill runs no code from a model's directory; leave out {TRUST}, which our "
            f"models do not need here, or run mlx_lm.{command} itself"
        )
    from mlx_lm import utils

    utils.load_config = without_model_file(utils.load_config)  # type: ignore[assignment]
    sys.argv = [f"bitdistill mlx {command}", *arguments]
    importlib.import_module(f"mlx_lm.{command}").main()


def _trusts(argument: str) -> bool:
    """Whether argparse may take an argument for TRUST: an unambiguous beginning is enough."""
    name = argument.partition("=")[0]
    return name.startswith("--trust") or (len(name) > len("--") and TRUST.startswith(name))


def without_model_file(load_config: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """mlx-lm's reader of config.json, less the `model_file` of our students.

    It raises ValueError for a directory of ours that is not made for MLX; a teacher is any model.
    """

    def load(path: Path) -> Any:
        config = load_config(path)
        ours = (path / manifest.MANIFEST).is_file()
        content = manifest.read_manifest(path) if ours else {}
        if content.get("kind") == "student":
            raise ValueError(
                f"{path} is a training directory; export it first: bitdistill export {path} "
                "--target mlx --out OUT"
            )
        if content.get("target", "mlx") != "mlx":
            raise ValueError(
                f"{path} is made for {content['target']}, not mlx; export the student with "
                "--target mlx"
            )
        if "bitdistill" in config:
            config.pop("model_file", None)
        elif "target" in content:
            _warn_half(content)
        return config

    return load


def _warn_half(content: dict[str, Any]) -> None:
    import mlx.core as mx

    dtype = content["storage"]["norms"]
    if dtype != "float32" and not mx.metal.is_available():
        warnings.warn(
            f"this artifact computes in {dtype}, which MLX sums in half precision without Metal: "
            "expect wrong text; run `bitdistill mlx convert` with --dtype float32 first",
            stacklevel=4,
        )
