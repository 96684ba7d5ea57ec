"""Score and time whatever a backend runs: tasks, metrics, parity, speed, tables.

Knows runtimes only through `bitdistill.backends`. Reading starts at runner.py. Everything here is
imported when it is first used, so `import bitdistill.evals` loads no runtime, torch or datasets.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitdistill.evals.bench import Plan, Speed, measure
    from bitdistill.evals.directories import Variant, find_teacher
    from bitdistill.evals.html import write_report
    from bitdistill.evals.parity import report, task_prompts, verdict
    from bitdistill.evals.plots import plot
    from bitdistill.evals.process import WorkerError
    from bitdistill.evals.results import Result, check_output, read_jsonl, write_jsonl
    from bitdistill.evals.run_plots import plot_runs
    from bitdistill.evals.runner import run
    from bitdistill.evals.tables import render
    from bitdistill.evals.terminal import rich_tables

_HOME = {
    "run": "runner",
    "Result": "results",
    "check_output": "results",
    "read_jsonl": "results",
    "write_jsonl": "results",
    "render": "tables",
    "rich_tables": "terminal",
    "report": "parity",
    "task_prompts": "parity",
    "verdict": "parity",
    "measure": "bench",
    "Plan": "bench",
    "Speed": "bench",
    "Variant": "directories",
    "find_teacher": "directories",
    "plot": "plots",
    "plot_runs": "run_plots",
    "write_report": "html",
    "WorkerError": "process",
}
__all__ = [
    "Plan",
    "Result",
    "Speed",
    "Variant",
    "WorkerError",
    "check_output",
    "find_teacher",
    "measure",
    "plot",
    "plot_runs",
    "read_jsonl",
    "render",
    "report",
    "rich_tables",
    "run",
    "task_prompts",
    "verdict",
    "write_jsonl",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
