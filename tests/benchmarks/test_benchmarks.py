"""The scripts whose figures are published still run, on one device and on two."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bitdistill.evals.run_plots import read_records
from bitdistill.quantize import bit_linears
from bitdistill.student import layers_of, make_student

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()
SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
Load = Callable[[Path], ModuleType]


def lines_of(*command: str, folder: Path | None = None) -> list[dict[str, object]]:
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_training_throughput(devices: int) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    script = [str(SCRIPTS / "training_throughput.py"), "--shape", "tiny", "--batch", "2"]
    more = ["--method", "distill", "--teacher", "tiny", "--teacher-bits", "8", "--relations"]
    sizes = ["--length", "16", "32", "--steps", "4", "--blocks", "1", "--accumulate", "2"]
    (record,) = lines_of(*(launch if devices > 1 else []), *script, *more, *sizes)
    assert record["devices"] == devices
    assert float(str(record["tokens_per_second"])) > 0
    seconds = float(str(record["ready_seconds"])), float(str(record["first_step_seconds"]))
    assert 0 < seconds[0] <= seconds[1]
    starting = record["starting"]
    assert isinstance(starting, dict)
    assert list(starting) == ["torch", "transformers", "device", "models", "fit"]
    assert sum(starting.values()) == pytest.approx(seconds[0], abs=0.1)
    assert record["relations"] is True
    assert record["commit"]


def test_a_model_that_is_the_student_but_for_its_roundings(load_script: Load) -> None:
    script = load_script(SCRIPTS / "training_throughput.py")
    model = script.make_model("tiny", torch.device("cpu"))
    student = make_student(model, "paper")
    ids = torch.arange(12).view(2, 6)
    for layer in bit_linears(student):
        layer.anneal.fill_(0.0)
    expected = student(ids).logits
    plain = script.unquantised(student)
    assert not bit_linears(plain)
    vectors = [sum(p.ndim == 1 for p in m.parameters()) for m in (plain, model)]
    assert vectors[0] == vectors[1] + 2 * len(layers_of(model))
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_compare_losses(tmp_path: Path, load_script: Load) -> None:
    for run, values in {"one": [2.0, 1.0], "two": [2.0, 1.1]}.items():
        (tmp_path / run).mkdir()
        records = [
            {"stage": "student", "step": i, "ce": x, "time": 0.0} for i, x in enumerate(values)
        ]
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / run / "log.jsonl").write_text(text)
    compare = load_script(SCRIPTS / "compare_losses.py").compare
    (row,) = compare(tmp_path / "one", tmp_path / "two")
    assert (row["stage"], row["term"], row["records"]) == ("student", "ce", 2)
    assert row["largest"] == pytest.approx(0.1)
    assert row["mean"] == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("methods", [["default", "paper"], ["paper"]])
def test_showcase(
    methods: list[str], make_teacher: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    """A unit with the paper's method: every row once, and nothing is done again."""
    make_teacher("qwen3").save_pretrained(tmp_path / "models/smollm2")
    tokenizer.save_pretrained(tmp_path / "models/smollm2")
    data = tmp_path / "data/sst2-movie"
    data.mkdir(parents=True)
    rows = [{"sentence": f"{WORDS[i]} {WORDS[-i]}", "label": i % 2} for i in range(12)]
    for name in ("train", "validation"):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{name}.jsonl").write_text(text)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": " ".join(WORDS)}) + "\n" for _ in range(40)))
    stages = ("teacher", "bitnet_sft", "pretrain", "distill")
    settings = [f"{s}.steps=2" for s in stages] + [f"{s}.batch_size=2" for s in stages]
    settings += [f"{s}.epochs=null" for s in stages] + [f"{s}.max_length=64" for s in stages]
    settings += [f"corpus.sources=[{corpus}]", "corpus.shuffle=0", "machine.device=cpu"]
    settings += ["distill.relations.split_heads=4", "student.calibration_batches=1"]
    settings += ["distill.batch_size=12"]
    options = ["--tasks", "sst2-movie", "--seeds", "3", "--methods", *methods]
    options += [word for setting in settings for word in ("--set", setting)]
    options += ["--device", "cpu", "--threads", "1"]
    results, of_artifacts = tmp_path / "showcase.jsonl", tmp_path / "artifacts.jsonl"
    options += ["--artifact-results", str(of_artifacts), "--artifact-examples", "8"]
    command = [str(SCRIPTS / "showcase.py"), *options, "--results", str(results)]
    for _ in range(2):
        lines_of(*command, folder=tmp_path)
        records = [json.loads(line) for line in results.read_text().splitlines()]
        accuracy = [r for r in records if r["metric"] == "accuracy"]
        students = (
            ["bitdistill", "bitdistill-paper"] if "default" in methods else ["bitdistill-paper"]
        )
        expected = ["fp16-sft", "bitnet-sft", *students, "bitnet-sft", *students]  # then in fp64
        assert [(r["method"], r["backend"], r["seed"], r["n"]) for r in accuracy] == [
            (method, "torch", 3, 12) for method in expected
        ]
        compared = [r["artifact"] for r in records if r["metric"] == "agreement"]
        runs = ["sst2-movie-seed3", "sst2-movie-seed3-paper"]  # where two are called student
        names = [f"{run}/student" for run in runs] if "default" in methods else ["student"]
        assert compared == [f"{row} (cpu) (float64)" for row in ("bitnet-sft", *names)]
        assert of_artifacts.exists() == ("default" in methods)
        if "default" in methods:
            records = [json.loads(line) for line in of_artifacts.read_text().splitlines()]
            agreed = [(r["artifact"], r["n"]) for r in records if r["metric"] == "agreement"]
            assert agreed == [("onnx", 8), ("mlx", 8), ("student (cpu) (float64)", 8)]
    kept = tmp_path / "docs/results/showcase-runs"
    stages = {
        run.name: [record["stage"] for record in read_records(run / "log.jsonl")]
        for run in sorted(kept.iterdir())
    }
    own = ["pretrained", "student"]
    assert {name: sorted(found) for name, found in stages.items()} == {
        "sst2-movie-seed3": ["bitnet-sft", *(own if "default" in methods else []), "teacher"],
        "sst2-movie-seed3-paper": own,
    }  # fmt: skip
    assert (kept / "sst2-movie-seed3-paper" / "weights.jsonl").is_file()


class Unit:
    """A unit of the showcase whose steps only say when they began and ended, and where."""

    def __init__(self, name: str, said: list[tuple[str, str]], fails: type[Exception]) -> None:
        self.name, self.said, self.fails = name, said, fails

    def _step(self, name: str, gpu: str) -> None:
        self.said.append((f"begin {name}", gpu))
        time.sleep(0.02)
        if name == "prepare b":
            raise self.fails(name)
        self.said.append((f"end {name}", gpu))

    def __getattr__(self, step: str) -> Callable[[Any, str], None]:
        return lambda shell, gpu: self._step(f"{step} {self.name}", gpu)


@pytest.mark.parametrize(("gpus", "jobs"), [(["0"], 1), (["0"], 3), (["0", "1"], 4)])
def test_order_of_the_showcase(gpus: list[str], jobs: int, load_script: Load) -> None:
    """Stage 2 first, on a GPU of its own if there are two; what depends on a failure is left out,
    and all else is done."""
    script = load_script(SCRIPTS / "showcase.py")
    said: list[tuple[str, str]] = []
    units = [Unit(name, said, script.Failed) for name in "abcd"]
    assert script.fill(units, None, jobs, gpus) == ["prepare b"]
    order = [text for text, _ in said]
    rest = {f"{step} {u}" for step in ("train", "score", "score_artifacts") for u in "acd"}
    ended = {text.removeprefix("end ") for text in order if text.startswith("end ")}
    assert ended == rest | {"pretrain a", *(f"prepare {u}" for u in "acd")}
    assert said[0] == ("begin pretrain a", "0")
    alone = [gpu for text, gpu in said[1 : order.index("end pretrain a")] if "begin" in text]
    assert len(gpus) == 1 or "0" not in alone
    for unit in "acd":
        begun = order.index(f"begin train {unit}")
        assert begun > order.index("end pretrain a")
        assert begun > order.index(f"end prepare {unit}")
        assert order.index(f"begin score {unit}") > order.index(f"end train {unit}")
    assert {gpu for _, gpu in said} == set(gpus)


PROBE = """
#include <cpuid.h>
unsigned newer(void) {  // AVX-512F and AVX-VNNI; AVX2 must stay
  unsigned a, b, c, d, e;
  __cpuid_count(7, 0, a, b, c, d);
  e = b;
  if (a > 0) __cpuid_count(7, 1, a, b, c, d); else a = 0;
  return (e >> 16 & 1) + (a >> 4 & 1) + 2 * (~e >> 5 & 1);
}
"""
LOAD = """
import ctypes, os, sys
assert os.environ["BITDISTILL_ISA"] == "avx2"
print(ctypes.CDLL(sys.argv[1]).newer())
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not (shutil.which("cc") and shutil.which("objdump")),
    reason="answers the CPUID of x86-64, with cc and objdump",
)
@pytest.mark.skipif(sys.platform != "linux", reason="rtld-audit")
def test_a_library_sees_avx2_and_nothing_newer(tmp_path: Path, load_script: Load) -> None:
    probe = tmp_path / "probe.so"
    (tmp_path / "probe.c").write_text(PROBE)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", probe, tmp_path / "probe.c"], check=True)
    found = load_script(SCRIPTS / "avx2_only.py")
    variables = found.environment(tmp_path, probe)
    assert len(variables["AVX2_ONLY_CPUID"].split(",")) >= 2
    command = [sys.executable, "-c", LOAD, str(probe)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def peer_line(row: str, *rounds: list[float], **other: Any) -> dict[str, Any]:
    return {
        "row": row, "isa": "avx2", "threads": 2, "prompt": 128, "decode": 64,
        "rounds": list(rounds), "memory_mib": 300.0, "streamed_bytes": None,
        "read_gbytes_per_s": 10.0,
    } | other  # fmt: skip


def test_peers_are_grouped_by_instruction_set(load_script: Load) -> None:
    show = load_script(SCRIPTS / "cpu_peers.py").show
    line = peer_line("ours", [200.0, 50.0], streamed_bytes=10**8)
    peer = peer_line("peer", [100.0, 40.0])
    text = show([line, peer, line | {"isa": "avx512-vnni"}])
    assert "| peer | 100.0 | 40.0 | – | 300 | 2.00 / 1.25 |" in text
    assert "| ours | 200.0 | 50.0 | 50 % | 300 | 1.00 / 1.00 |" in text
    assert text.count("| row |") == 2


@pytest.mark.parametrize("second", [{}, {"read_gbytes_per_s": 20.0}])
def test_peers_are_compared_within_a_call(second: dict[str, float], load_script: Load) -> None:
    """The machine is half as fast in the second call, where one row is absent and one is new."""
    lines = [
        peer_line("ours", [200.0, 50.0], [180.0, 60.0]),
        peer_line("absent", [100.0, 25.0], [90.0, 30.0]),
        peer_line("ours", [100.0, 25.0], **second),
        peer_line("new", [25.0, 5.0], **second),
        peer_line("ours-new", [75.0, 20.0], **second),
    ]
    text = load_script(SCRIPTS / "cpu_peers.py").show(lines)
    assert "| absent | 95.0 | 27.5 | – | 300 | 2.00 / 2.00 | – |" in text
    assert "| new | 25.0 | 5.0 | – | 300 | 4.00 / 5.00 | 3.00 / 4.00 |" in text
    assert "| ours | 180.0 | 50.0 | – | 300 | 1.00 / 1.00 | 0.75 / 0.80 |" in text
