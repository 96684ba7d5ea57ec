"""The ONNX and MLX backends run where neither torch nor transformers can be imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill import exporters

RUN = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "mlx_lm"):
            raise ImportError(f"{name} is blocked in this test")

sys.meta_path.insert(0, Blocker())
from bitdistill import backends

model = backends.load(sys.argv[1], threads=1)
prompt = model.tokenizer.encode("the film is good")
tokens = list(model.generate(prompt, max_new_tokens=4, stop=()))
assert len(tokens) == 4 and model.tokenizer.decode(tokens)
assert model.score([(prompt, tokens)])[0] < 0
assert not {"torch", "transformers", "mlx_lm"} & set(sys.modules)
print(model.name)
"""


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_runs_without_torch(target: str, student_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Export with torch, then load, generate and score in a process that blocks it."""
    artifact = exporters.export(student_dir("llama"), target, tmp_path / "artifact")
    result = subprocess.run(
        [sys.executable, "-c", RUN, str(artifact)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == target
