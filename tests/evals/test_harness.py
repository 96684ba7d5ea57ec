"""lm-evaluation-harness: the adapter's scores are those of the harness's own `hf` model."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitdistill import backends  # and students load through transformers' Auto classes
from bitdistill.exporters.base import export

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval comes with the extra `lm-eval`")
pytestmark = pytest.mark.slow
TEXTS = ["the film is not good", "very dull and bright but we liked it", "a plot", "it is bad and"]
WORDS = " ".join(TEXTS).split()
TASKS = {
    "mood": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}\nMood:",
        "doc_to_target": "label",
        "doc_to_choice": ["not good", "dull", "bright film"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "brier_score"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{long}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "said": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["good", "z"], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of task files over local data, as a user would write them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    # not periodic: `hf` takes windows that are fed the same tokens for one, wherever they are split
    draw = random.Random(0)
    rows = [
        {"text": f"{a} {b}", "long": " ".join(draw.choices(WORDS, k=80)), "label": (i + j) % 3}
        for i, a in enumerate(TEXTS)
        for j, b in enumerate(TEXTS)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task in TASKS.items():
        common = {
            "task": name, "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def scores(model: str, arguments: dict[str, Any], tasks: Path) -> Any:
    """Metrics by task, and every response with its log-likelihoods."""
    from lm_eval.tasks import TaskManager

    import bitdistill.evals.harness  # noqa: F401  (registers the model)

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=list(TASKS), task_manager=manager, batch_size=3,
        device="cpu", bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    metrics = {
        (task, name): value
        for task, values in found["results"].items()
        for name, value in values.items()
        if isinstance(value, float) and "stderr" not in name
    }
    responses = {
        task: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for task, samples in found["samples"].items()
    }
    return metrics, responses


def flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [item for part in value for item in flat(part)]
    return [value]


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_torch_equals_the_harness_own_model(
    student_dir: Callable[..., Path], make_teacher: Callable[..., Any], tokenizer: Any,
    tasks: Path, tmp_path: Path, kind: str,
) -> None:  # fmt: skip
    path = student_dir("qwen3")
    if kind == "teacher":
        path = tmp_path / "teacher"
        make_teacher("llama").save_pretrained(path)
        tokenizer.save_pretrained(path)
    ours, answers = scores("bitdistill", {"path": str(path)}, tasks)
    theirs, expected = scores("hf", {"pretrained": str(path), "dtype": "float32"}, tasks)
    assert set(ours) == set(theirs)
    assert len(ours) >= 6
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, abs=1e-4), key
    assert answers["said"] == expected["said"]
    for mine, other in zip(flat(answers["mood"]), flat(expected["mood"]), strict=True):
        assert float(mine) == pytest.approx(float(other), abs=1e-4)


@pytest.mark.parametrize("target", ["onnx", "mlx"])
def test_artifacts_say_what_their_student_says(
    student_dir: Callable[..., Path], tasks: Path, tmp_path: Path, target: str
) -> None:
    student = student_dir("qwen3")
    artifact = export(student, target, tmp_path / target)
    ours, answers = scores("bitdistill", {"path": str(artifact)}, tasks)
    theirs, _ = scores("bitdistill", {"path": str(student)}, tasks)
    assert ours["mood", "acc,none"] == theirs["mood", "acc,none"]
    assert ours["whole", "bits_per_byte,none"] == pytest.approx(
        theirs["whole", "bits_per_byte,none"], rel=0.02
    )
    model = backends.load(artifact)
    for text, said in zip(prompts(tasks), answers["said"], strict=True):
        ids = model.tokenizer.encode(text)
        free = model.tokenizer.decode(list(model.generate(ids, max_new_tokens=9)))
        assert said == [[re.split("good|z", free)[0]]]


def prompts(tasks: Path) -> list[str]:
    lines = (tasks.parent / "data.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_the_command(student_dir: Callable[..., Path], tasks: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "bitdistill.evals.harness", "run", "--model", "bitdistill",
        "--model_args", f"path={student_dir('qwen3')},max_length=64", "--tasks", "mood",
        "--include_path", str(tasks), "--limit", "4", "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|mood" in done.stdout
    assert "acc_norm" in done.stdout


def test_what_does_not_fit_is_refused(student_dir: Callable[..., Path]) -> None:
    from bitdistill.evals.harness import BitdistillLM

    model = BitdistillLM(str(student_dir("qwen3")), max_length=16, batch_size="auto")
    with pytest.raises(ValueError, match="a continuation of 17 tokens is longer than max_length"):
        model._loglikelihood_tokens([(None, [1], [3] * 17)])
    with pytest.raises(ValueError, match="16 new tokens leave no room for a prompt in 16"):
        model._generate(["the film"], {"max_gen_toks": 16})
    sampled = [model._generate(["the film"], {"max_gen_toks": 8, "do_sample": True,
                                              "temperature": 2.0}) for _ in range(2)]  # fmt: skip
    assert sampled[0] == sampled[1]
