"""The stock forms in onnxruntime-web, whose WebAssembly kernels are not those of the desktop.

Needs node and the npm package, found by NODE_PATH: `npm install --prefix DIR onnxruntime-web`, then
NODE_PATH=DIR/node_modules.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitdistill import backends, exporters

Students = Callable[..., Path]
TOKENS = [5, 6, 7, 40, 41, 90, 120, 8, 33, 60, 61, 200]
CLOSE, APART = 1e-5, 1e-3  # of the spread of logits
SCRIPT = """
const fs = require("fs");
const ort = require("onnxruntime-web");
const [model, tokens, layers, heads, size] = JSON.parse(process.argv[2]);
(async () => {
  ort.env.wasm.numThreads = 1;
  const data = {path: "model.onnx.data", data: fs.readFileSync(model + ".data")};
  const session = await ort.InferenceSession.create(fs.readFileSync(model), {externalData: [data]});
  const count = tokens.length;
  const feed = {
    input_ids: new ort.Tensor("int64", BigInt64Array.from(tokens.map(BigInt)), [1, count]),
    seqlens_k: new ort.Tensor("int32", Int32Array.of(count - 1), [1]),
    total_sequence_length: new ort.Tensor("int32", Int32Array.of(count), []),
    logit_rows: new ort.Tensor("int64", BigInt64Array.from(tokens.keys(), BigInt), [count]),
  };
  for (let i = 0; i < layers; i++) for (const part of ["key", "value"])
    feed[`past_key_values.${i}.${part}`] =
      new ort.Tensor("float32", new Float32Array(0), [1, heads, 0, size]);
  const {logits} = await session.run(feed, ["logits"]);
  console.log(JSON.stringify(Array.from(logits.data)));
})().catch((error) => { console.error(error); process.exit(1); });
"""


def in_node(artifact: Path, spec: dict[str, Any]) -> np.ndarray:
    """Logits (T, V) of TOKENS by onnxruntime-web."""
    sizes = [len(spec["layers"]), spec["kv_heads"], spec["head_dim"]]
    argument = json.dumps([str(artifact / "model.onnx"), TOKENS, *sizes])
    done = subprocess.run(
        ["node", "-e", SCRIPT, "node", argument], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    logits = json.loads(done.stdout.splitlines()[-1])
    return np.array(logits, np.float32).reshape(len(TOKENS), -1)


@pytest.fixture(scope="module")
def _web() -> None:
    folders = os.environ.get("NODE_PATH", "").split(os.pathsep)
    if not shutil.which("node") or not any(Path(f, "onnxruntime-web").is_dir() for f in folders):
        pytest.skip("needs node, and onnxruntime-web under NODE_PATH")


@pytest.mark.slow
@pytest.mark.usefixtures("_web")
@pytest.mark.parametrize("ops", ["portable", "integer"])
def test_what_a_browser_computes(student_dir: Students, tmp_path: Path, ops: str) -> None:
    """`integer` is what the desktop computes; `portable` leaves activations unrounded."""
    student = student_dir("qwen3", "paper", 8)
    model = backends.load(exporters.export(student, "onnx", tmp_path / "out", ops=ops))
    web, [desktop] = in_node(tmp_path / "out", model.manifest["decoder"]), model.logits([TOKENS])
    storage = {"embedding": "float16"}
    unrounded = backends.load(student, storage=storage, activation_bits=None)

    def error(reference: np.ndarray) -> float:
        return float(np.median(np.abs(web - reference).max(-1) / reference.std()))

    errors = {"desktop": error(desktop), "unrounded": error(unrounded.logits([TOKENS])[0])}
    near, far = ("desktop", "unrounded") if ops == "integer" else ("unrounded", "desktop")
    assert errors[near] < CLOSE
    assert errors[far] > APART
