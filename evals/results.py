"""A result: one metric of one directory on one task, and everything needed to read it alone.

Results travel as JSON lines; tables and plots are made from these lines only.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistill.backends.search import Search


@dataclass(frozen=True)
class Result:
    """One JSON line.

    `method` is fp16-sft, bitnet-sft, bitdistill, bitdistill-paper (or -authors); `backend` torch,
    onnx or mlx; `precision` says how weights are held. `unit` is %, tokens/s, ms, MiB, x (a ratio)
    or nothing. `stderr` and `interval` (95 %, bootstrap) are None where there is none. `artifact`
    is the directory's name, `artifact_hash` a hash of its files' hashes, `student` the fingerprint
    of the student's weights that it runs (None for a teacher), `seed` that of their training (None
    for what was not trained by `bitdistill train`; settings hold that of the bootstrap). `details`
    are the metric's own: a confusion matrix, the row that a ratio or difference is against.
    `settings` say how it was evaluated, and as `training` how it was trained; in an ablation, as
    `variant`, what was changed in the method, in words.
    """

    method: str
    model: str
    backend: str
    task: str
    split: str
    metric: str
    value: float
    unit: str
    n: int
    stderr: float | None
    seed: int | None
    artifact: str
    artifact_hash: str
    student: str | None = None
    precision: str = ""
    task_version: int = 1
    interval: tuple[float, float] | None = None
    details: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> str:
        """What was changed in the method, "" for nothing."""
        return str(self.settings.get("variant", ""))

    @property
    def asked(self) -> str:
        """The task, with its version where that is not the first: another prompt, other figures."""
        return self.task if self.task_version == 1 else f"{self.task}-v{self.task_version}"

    @property
    def answers(self) -> str:
        """How answers were got, "" in the usual way: labels by likelihood, summaries greedily."""
        options = self.settings.get("options", {})
        search = Search(**options.get("search", {}))
        words = ["said greedily"] if options.get("scoring") == "greedy" else []
        if search.beams > 1:
            words.append(f"{search.beams} beams, length penalty {search.length_penalty:g}")
        if search.min_new_tokens:
            words.append(f"at least {search.min_new_tokens} tokens")
        return ", ".join(words)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def check_output(path: str | Path, option: str = "--out") -> None:
    """FileExistsError where a file could not be written, found before the long work."""
    path = Path(path)
    if path.is_dir() or any(p.exists() and not p.is_dir() for p in path.parents):
        raise FileExistsError(f"{path} cannot be a file there; choose another {option}")


def write_jsonl(results: Iterable[Result], path: str | Path) -> None:
    """Append results to a file, one JSON object a line; the folder is made if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(r.to_json(), ensure_ascii=False, allow_nan=False) for r in results]
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")  # else edited by hand
    with path.open("a", encoding="utf-8") as stream:
        stream.write("" if whole else "\n")
        stream.write("".join(line + "\n" for line in lines))


def read_jsonl(path: str | Path) -> list[Result]:
    """The results in a file; ValueError names the file and the line that is not one."""
    results = []
    if not Path(path).exists():
        raise FileNotFoundError(f"results file {path} does not exist; check the path")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the file that `bitdistill eval --out` wrote")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is not UTF-8 text; give the file that `bitdistill eval --out` wrote"
        ) from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            results.append(_read(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is not a result ({error}); remove the line, or "
                "evaluate again"
            ) from None
    return results


def _read(value: dict[str, Any]) -> Result:
    """JSON has no tuples."""
    result = Result(**value)
    if result.interval is None:
        return result
    low, high = result.interval
    return dataclasses.replace(result, interval=(low, high))
