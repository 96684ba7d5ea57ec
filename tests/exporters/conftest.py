"""A student of the usual kind and its ONNX artifact, for reading and for altering."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill import exporters


@pytest.fixture(scope="module")
def student(student_dir: Callable[..., Path]) -> Path:
    return student_dir("qwen3", "paper", 8)


@pytest.fixture(scope="module")
def artifact(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporters.export(student, "onnx", tmp_path_factory.mktemp("onnx") / "artifact")


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """An artifact to be altered."""
    return shutil.copytree(artifact, tmp_path / "copy")
