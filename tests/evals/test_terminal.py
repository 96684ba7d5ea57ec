"""Tables in a terminal, of whatever width, and names with signs that mean something there."""

from __future__ import annotations

import dataclasses
import io

from rich.console import Console
from test_tables import RESULTS, result

from bitdistill.evals import render, rich_tables


def test_rich_tables_show_the_same_cells() -> None:
    console = Console(file=io.StringIO(), width=80)
    (table,) = rich_tables(RESULTS)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("sst2 (validation)", "n=872)", "93.12", "± 0.50", "2.50×", "(1,050)", "–"):
        assert part in text


def test_a_wide_table_loses_no_digits_in_a_narrow_terminal() -> None:
    """MNLI on both splits with speed and memory; where output is no terminal it has 80 columns."""
    parts = [{"task": "mnli", "split": f"validation_{name}"} for name in ("matched", "mismatched")]
    rows = [result(m, 98.76, **part) for part in parts for m in ("accuracy", "agreement")]
    rows += [result(m, 4321.5, "MiB") for m in ("memory", "size_on_disk")]
    rows += [result(f"{m}_speed", 54321.0, "tokens/s") for m in ("prefill", "decode")]
    console = Console(file=io.StringIO(), width=80)
    console.print(*rich_tables(rows))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert [text.count(part) for part in ("98.76", "4,321.5", "54,321")] == [4, 2, 2]


def test_names_are_shown_as_they_are() -> None:
    """Brackets are no markup of a terminal, bars no columns of Markdown."""
    runs = [result("accuracy", 1.0), result("accuracy", 2.0, artifact_hash="2", task="a|b[c]")]
    runs += [dataclasses.replace(r, artifact_hash="3", settings={"variant": "[no] [/norms]"})
             for r in runs]  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    console.print(*rich_tables(runs))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("sst2 (validation), a|b[c] (validation)", "[no] [/norms]", "a|b[c] Accuracy"):
        assert part in text
    header, rule, *_ = render(runs, "markdown").splitlines()
    assert r"| a\|b[c] Accuracy (%, n=872) |" in header
    assert header.replace(r"\|", "").count("|") == rule.count("|")
