"""How far the loss curves of two runs of one recipe are from each other, stage by stage.

    python benchmarks/compare_losses.py runs/one runs/two

Prints a JSON line for each stage and term: the number of records, and the largest and the mean
difference of the second run's term from the first's, relative to the first's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TERMS = {"ce", "logits", "prompt", "relations", "alignment", "gradient_norm"}


def curves(run: Path) -> dict[tuple[str, str], dict[int, float]]:
    """The values of every term by step, under (stage, term)."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record: dict[str, Any] = json.loads(line)
        for term in TERMS & record.keys():
            found.setdefault((record["stage"], term), {})[record["step"]] = record[term]
    return found


def compare(one: Path, two: Path) -> list[dict[str, Any]]:
    """A record for every stage and term that both runs have."""
    first, second, rows = curves(one), curves(two), []
    for stage, term in first.keys() & second.keys():
        a, b = first[stage, term], second[stage, term]
        apart = [abs(b[s] - a[s]) / max(abs(a[s]), 1e-12) for s in a.keys() & b.keys()]
        row = {"stage": stage, "term": term, "records": len(apart)}
        rows.append(row | {"largest": max(apart), "mean": sum(apart) / len(apart)})
    return sorted(rows, key=lambda row: (row["stage"], row["term"]))


if __name__ == "__main__":
    for row in compare(Path(sys.argv[1]), Path(sys.argv[2])):
        print(json.dumps(row))
