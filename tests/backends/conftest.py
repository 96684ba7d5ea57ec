"""Artifacts of tiny random students, exported once each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitdistill import exporters


@pytest.fixture(scope="session")
def onnx_pair(
    student_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """`onnx_pair(family, norm_style, bits, options={}, **config)`: (student, artifact)."""
    root = tmp_path_factory.mktemp("onnx")
    made: dict[str, Path] = {}

    def make(
        *args: Any, options: dict[str, Any] | None = None, **overrides: Any
    ) -> tuple[Path, Path]:
        student = student_dir(*args, **overrides)
        key = f"{student.name}{options}"
        if key not in made:
            out = root / str(len(made))
            made[key] = exporters.export(student, "onnx", out, **(options or {}))
        return student, made[key]

    return make


@pytest.fixture(scope="session")
def mlx_artifact(
    student_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Path]]:
    """`mlx_artifact(family, norm_style, bits, options={}, **config)`: (student, artifact)."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(
        *arguments: Any, options: dict[str, Any] | None = None, **overrides: Any
    ) -> tuple[Path, Path]:
        key = f"{arguments}{options}{overrides}"
        if key not in made:
            student = student_dir(*arguments, **overrides)
            out = tmp_path_factory.mktemp("mlx") / "artifact"
            made[key] = (student, exporters.export(student, "mlx", out, **(options or {})))
        return made[key]

    return make
