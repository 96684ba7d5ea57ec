"""The script for Mac owners: its arguments, its table, and a whole run on this machine's CPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitdistill import exporters
from bitdistill.backends.mlx_runtime import MlxRuntime

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "mac_benchmark.py"


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> ModuleType:
    return load_script(SCRIPT)


def test_it_says_that_nobody_ran_it(script: ModuleType) -> None:
    assert "NOT RUN BY THE MAINTAINERS" in (script.__doc__ or "")


def test_arguments(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    options = script.parse(["runs/mlx", "--base", "models/base", "--decode", "7"])
    assert (options.artifact, options.base) == ("runs/mlx", "models/base")
    assert (options.prompt, options.decode, options.repeats) == (512, 7, 3)
    with pytest.raises(SystemExit):
        script.parse([])
    assert "artifact" in capsys.readouterr().err


def test_the_table(script: ModuleType) -> None:
    row = {"prefill": 1234.56, "decode": 78.9, "memory": 10.0, "size": 2.25}
    text = script.render({"bitdistill": row}, {"agreement": 99.5, "error": 1.2e-3}, "a machine")
    lines = text.splitlines()
    assert lines[2] == "| bitdistill | 1,234.6 | 78.9 | 10.0 | 2.2 |"
    assert len({line.count("|") for line in lines[:3]}) == 1
    assert "agrees at 99.5 % of positions, median error 1.2e-03" in text
    assert lines[-1] == "a machine"


def test_what_stopped_a_measurement_is_shown(
    script: ModuleType, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="could not be measured; the error is above"):
        script.in_fresh_process(script.parse([str(tmp_path)]), str(tmp_path))
    assert str(tmp_path / "config.json") in capfd.readouterr().err


def test_parity_is_measured_on_text(
    script: ModuleType, student_dir: Callable[..., Path], tmp_path: Path
) -> None:
    """MLX's own product against our kernels: the same integers, so the same logits."""
    artifact = exporters.export(student_dir("qwen3"), "mlx", tmp_path / "artifact")
    seen = []
    logits = MlxRuntime.logits

    def noted(self: MlxRuntime, tokens: Any) -> Any:
        seen.append([self.tokenizer.decode(sequence) for sequence in tokens])
        return logits(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MlxRuntime, "logits", noted)
        check = script.parity(str(artifact))
    assert len(seen) == 2
    for text, passage in zip(seen[0], script.PASSAGES, strict=True):
        assert len(text) > 20
        assert passage.startswith(text)
    assert check["agreement"] > 95
    assert check["error"] < 1e-2


@pytest.mark.slow
def test_a_whole_run(
    student_dir: Callable[..., Path],
    make_teacher: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    options = {"model_file": True}
    artifact = exporters.export(student_dir("qwen3"), "mlx", tmp_path / "artifact", **options)
    make_teacher("qwen3").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    command = [sys.executable, SCRIPT, artifact, "--base", tmp_path / "base", "--prompt", "16"]
    done = subprocess.run(
        [*map(str, command), "--decode", "4", "--repeats", "1"],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line[:1] == "|"]
    assert rows == ["Model", "---", "bitdistill", "bf16", "4-bit"]
    assert "Parity with exact fp32: top token agrees at" in done.stdout
    assert "mlx-lm" in done.stdout.splitlines()[-1]
