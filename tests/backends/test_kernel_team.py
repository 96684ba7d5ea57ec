"""Threads that stay together for the loops of a call, and pieces of a product, on their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_kernel_builds import COMPILERS, KERNELS, STRICT, run

DRIVER = Path(__file__).with_name("team_driver.cpp")
SANITIZERS = ("thread", "address,undefined", "")
# One of them every time, the one that sees races; a compilation takes two seconds.
BUILDS = [
    pytest.param(compiler, sanitizers, marks=[] if (i, j) == (0, 0) else [pytest.mark.slow])
    for i, compiler in enumerate(COMPILERS)
    for j, sanitizers in enumerate(SANITIZERS)
]


@pytest.mark.parametrize(("compiler", "sanitizers"), BUILDS)
def test_every_index_runs_once(compiler: str, sanitizers: str, tmp_path: Path) -> None:
    flags = ["-O3"]
    if sanitizers:
        flags = ["-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    program = tmp_path / "driver"
    sources = (DRIVER, KERNELS / "team.cpp")
    built = run(
        compiler, *STRICT, "-Wconversion", *flags, "-I", KERNELS, *sources, "-pthread",
        "-o", program,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    result = run(program)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip() == "good"
