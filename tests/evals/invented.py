"""Invented rows of an evaluation: what a worker and a timer would bring back of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitdistill.evals.bench import Repeat, speed_of, to_json
from bitdistill.tasks import Task

TASK = Task("mood", "label", "{text}\nMood:", ("text",), "label", (" bad", " good"))
PREDICTIONS = {"teacher": [1, 0, 1, 0], "student": [1, 0, 0, 0], "onnx": [1, 0, 1, 0]}
SPEEDS = {"teacher": 10.0, "student": 5.0, "onnx": 40.0}
Make = Callable[..., Path]


def execute(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    """What a worker would bring back."""
    progress("predict", 4, 4)
    return {"parts": [predict(job["path"], part) for part in job["parts"]]}


def predict(path: str, part: dict[str, Any]) -> dict[str, Any]:
    labels = PREDICTIONS[Path(path).name][: len(part["examples"])]
    records = [{"i": i, "label": label, "scores": [-1.0, -2.0]} for i, label in enumerate(labels)]
    return {
        "backend": "onnx" if "onnx" in path else "torch", "versions": {"python": "3"},
        "peak_memory": 40.0, "records": records, "truncated": 1, "prompt_tokens": 9,
        "answer_tokens": [1, 1], "seconds": {"load": 1.0, "predict": 2.0, "compute": 1.9},
    }  # fmt: skip


def time(jobs: Any, progress: Any) -> list[dict[str, Any]]:
    """What timing rows in turn would bring back."""
    return [
        {
            "speed": to_json(
                speed_of([Repeat(1 / SPEEDS[job["name"]], [1 / SPEEDS[job["name"]]])] * 3, 1)
            ),
            "memory": {"bare": 10.0, "load": 20.0, "serve": 30.0 + SPEEDS[job["name"]]},
            "facts": {"versions": {"python": "3"}},
        }
        for job in jobs
    ]


def refuse(job: dict[str, Any], progress: Any) -> dict[str, Any]:
    raise AssertionError("no model may be loaded before everything is checked")
