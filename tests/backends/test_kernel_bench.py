"""The benchmark's lines: every row, key and instruction set is there (no time is judged)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from bitdistill.backends.kernels.bench import figures
from bitdistill.backends.kernels.bench.__main__ import main
from bitdistill.backends.kernels.bench.rows import ROWS
from bitdistill.backends.kernels.binding import available_isas

KEYS = "implementation isa threads K N M microseconds gops gbytes_per_s".split()


def lines_of(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict]:
    monkeypatch.setattr(figures, "STREAMED_BYTES", 1 << 20)
    for name, row in ROWS.items():
        if row.shapes:
            monkeypatch.setitem(ROWS, name, replace(row, shapes=((64, 96),)))
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split(), "--seconds", "0.001"])
    main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_row_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--json --threads 2 --tokens 1 8 --shapes 256x128"
    lines = lines_of(arguments, monkeypatch, capsys)
    assert all(list(line) == KEYS for line in lines)
    assert {line["implementation"] for line in lines} >= set(ROWS) | {"ceiling-read"}
    layers = [line for line in lines if line["K"]]
    assert all(line["microseconds"] > 0 and line["gops"] > 0 for line in layers)
    ours = {
        (line["isa"], line["threads"], line["M"])
        for line in lines
        if line["implementation"] == "ternary-2bit"
    }
    assert ours == {(isa, 2, m) for isa in available_isas() for m in (1, 8)}


def test_rows_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--json --threads 1 --tokens 1 --shapes 128x64 --only ort-fp32"
    lines = lines_of(arguments, monkeypatch, capsys)
    names = [line["implementation"] for line in lines if not line["implementation"].startswith("c")]
    assert names == ["ort-fp32"]


def test_instruction_sets_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--json --threads 1 --tokens 1 --shapes 128x64 --only ternary-2bit --isa scalar"
    lines = lines_of(arguments, monkeypatch, capsys)
    assert {line["isa"] for line in lines} == {"-", "scalar"}  # the read ceiling is of no set
