"""The benchmark's lines: every row, key and instruction set is there (no time is judged)."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from bitdistill.backends.kernels.bench import figures
from bitdistill.backends.kernels.bench.__main__ import main
from bitdistill.backends.kernels.bench.ceilings import READS, Machine
from bitdistill.backends.kernels.bench.figures import Case
from bitdistill.backends.kernels.bench.measured import Measured, ceiling_figures
from bitdistill.backends.kernels.bench.paired import LEAST_ROUNDS, fastest, ratios, take_turns
from bitdistill.backends.kernels.bench.rows import ROWS
from bitdistill.backends.kernels.binding import available_isas
from bitdistill.backends.kernels.pool import Pool

KEYS = "implementation isa threads K N M microseconds gops gbytes_per_s".split()
PAIRED = "rounds of_read of_fma of_int8 over_one_thread fma_over_one_thread".split()


def lines_of(
    arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[dict]:
    monkeypatch.setattr(figures, "STREAMED_BYTES", 1 << 20)
    for name, row in ROWS.items():
        if row.shapes:
            monkeypatch.setitem(ROWS, name, replace(row, shapes=((64, 96),)))
    monkeypatch.setattr(sys, "argv", ["bench", *arguments.split(), "--seconds", "0"])
    main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_row_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--json --threads 2 --tokens 1 8 --shapes 256x128"
    lines = lines_of(arguments, monkeypatch, capsys)
    assert all(list(line) == KEYS + PAIRED for line in lines)
    assert {line["implementation"] for line in lines} >= set(ROWS) | {"ceiling-read"}
    layers = [line for line in lines if line["K"]]
    assert all(line["microseconds"] > 0 and line["gops"] > 0 for line in layers)
    ours = {
        (line["isa"], line["threads"], line["M"])
        for line in lines
        if line["implementation"] == "ternary-2bit"
    }
    assert ours == {(isa, 2, m) for isa in available_isas() for m in (1, 8)}
    for line in layers:
        assert line["rounds"] == LEAST_ROUNDS
        shares = [line[key] for key in PAIRED[1:] if line[key] is not None]
        assert len(line["of_read"]) == 3
        assert all(share == sorted(share) for share in shares)
        one_thread = line["over_one_thread"]
        assert (one_thread is not None) == ROWS[line["implementation"]].every_isa


def test_ceilings_are_of_all_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "--json --threads 1 2 --tokens 1 8 --shapes 128x64 --only ternary-2bit ort-fp32"
    best = f" --isa {available_isas()[0]}"
    lines = lines_of(arguments + best, monkeypatch, capsys)
    reads = [line for line in lines if line["implementation"] == "ceiling-read"]
    assert [(line["threads"], line["rounds"]) for line in reads] == [
        (1, 4 * LEAST_ROUNDS),
        (2, 4 * LEAST_ROUNDS),
    ]
    assert all(line["gbytes_per_s"] > 0 and line["K"] == 0 for line in reads)
    assert [line["over_one_thread"] is None for line in reads] == [True, False]


def test_rounds_take_turns() -> None:
    asked = []
    samples = {name: (lambda name=name: asked.append(name) or float(len(asked))) for name in "abc"}
    rounds = take_turns(samples, seconds=0)
    assert "".join(asked) == "abc" * LEAST_ROUNDS
    assert rounds == {"a": [1.0, 4.0, 7.0], "b": [2.0, 5.0, 8.0], "c": [3.0, 6.0, 9.0]}


def measured(speeds: list[float], one_thread: float | None = None) -> Measured:
    """A row of 0.5 of the read, 3 of the fma ceiling, on a machine of changing speed."""
    case = Case("ternary-2bit", "avx2", 1 if one_thread is None else 2, 8, 4, 5)
    rates = {
        "layer": [0.5 * speed for speed in speeds],
        "read": [1.0 * 100 * speed for speed in speeds],
        "fma": [2 * 5 * 8 * 4 / 6 * speed for speed in speeds],
    }
    alone = (
        {} if one_thread is None else {k: [v / one_thread for v in vs] for k, vs in rates.items()}
    )
    return Measured(case, "avx2", 100, rates, alone)


def test_what_slows_a_round_down_slows_neither_ratio() -> None:
    figure = measured([1.0, 0.3, 0.9, 0.4]).figure()
    assert figure.of_read == (0.5, 0.5, 0.5)
    assert figure.of_fma == (3.0, 3.0, 3.0)
    assert figure.of_int8 is None
    assert figure.over_one_thread is None
    assert figure.rounds == 4
    assert figure.microseconds == pytest.approx(1e6 / (0.5 * 0.65), abs=0.01)


def test_two_threads_over_one() -> None:
    figure = measured([1.0, 0.3], one_thread=1.6).figure()
    assert figure.over_one_thread == figure.fma_over_one_thread == (1.6, 1.6, 1.6)


def test_a_ratio_is_the_median_over_rounds() -> None:
    assert ratios([1.0, 2.0, 9.0], [1.0, 1.0, 1.0], 2.0) == (3.0, 4.0, 11.0)


def test_one_way_to_read_is_the_fastest_of_all_rounds() -> None:
    steady, luckier = [2.0, 2.0, 2.0], [1.0, 1.0, 3.0]
    assert fastest([luckier, steady]) is steady


def test_ceilings_are_medians_over_rows() -> None:
    rows = [measured([1e9], 1.5), measured([3e9], 1.7), measured([2e9], 1.9)]
    read, fma = ceiling_figures(rows)
    assert (read.implementation, read.isa, read.gbytes_per_s) == ("ceiling-read", "-", 200.0)
    assert (fma.implementation, fma.isa, fma.rounds) == ("ceiling-fma", "avx2", 3)
    assert fma.over_one_thread == (1.6, 1.7, 1.8)


@pytest.mark.parametrize("threads", [1, 2])
def test_memory_is_read_in_every_way(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr(figures, "STREAMED_BYTES", (5 << 20) // 2)
    machine = Machine()
    with Pool(threads) as pool:
        samples = machine.reads(pool)
        assert list(samples) == list(READS)
        assert all(sample() > 0 for sample in samples.values())


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
