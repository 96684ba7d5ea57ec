"""Layers beside a peer's: what is asked of its process, what is missing, and ratios by round."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitdistill.backends.kernels.bench.figures import Case
from bitdistill.backends.kernels.binding import Kernels

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernel_peers.py"
PEER = """#!{python}
import sys

kind, k, n, m, threads, copies = sys.argv[1:]
if kind == "ends":
    sys.exit("out of memory")
print(int(k) * int(n) // 4, 0.5 if kind == "wrong" else 0.004, flush=True)
for _ in sys.stdin:
    print(int(copies) * 0.002, flush=True)
"""


@pytest.fixture(scope="module")
def script(load_script: Callable[[Path], ModuleType]) -> Any:
    return load_script(SCRIPT)


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """A peer whose layers take two milliseconds."""
    path = tmp_path / "peer"
    path.write_text(PEER.format(python=sys.executable))
    path.chmod(0o755)
    return path


def case(name: str = "tq2_0") -> Case:
    return Case(name, Kernels().isa, 1, 256, 128, 4)


def test_peers_are_named_with_their_places(script: Any) -> None:
    assert script.parse("i2_s=a,b/c") == script.Peer("i2_s", Path("a"), Path("b/c"))
    for text in ("i2_s", "i2_s=a", "=a,b"):
        with pytest.raises(argparse.ArgumentTypeError, match="give NAME=CHECKOUT,BUILD"):
            script.parse(text)


def test_what_cannot_be_built_is_missing(script: Any, tmp_path: Path) -> None:
    peer = script.Peer("i2_s", tmp_path / "source", tmp_path / "build")
    with pytest.raises(script.Missing, match=r"no ggml/include/ggml\.h below"):
        script.compile_peer(peer, "c++", tmp_path)
    header = peer.checkout / "ggml" / "include" / "ggml.h"
    header.parent.mkdir(parents=True)
    header.write_text("#error not this one\n")
    with pytest.raises(script.Missing, match="no libggml below"):
        script.compile_peer(peer, "c++", tmp_path)
    peer.build.mkdir()
    (peer.build / "libggml.a").write_bytes(b"!<arch>\n")
    with pytest.raises(script.Missing, match=r"does not compile: .*not this one"):
        script.compile_peer(peer, "c++", tmp_path)
    with pytest.raises(script.Missing, match="no compiler nothing-such"):
        script.compile_peer(peer, "nothing-such", tmp_path)


def test_a_wrong_product_is_missing(script: Any, program: Path) -> None:
    with script.peer_row(program, case(), 3) as row:
        assert (row.copies, row.weight_bytes, row.run()) == (3, 8192, 0.006)
    with (
        pytest.raises(script.Missing, match=r"product is wrong: relative error 0\.5"),
        script.peer_row(program, case("wrong"), 3),
    ):
        pass
    with (
        pytest.raises(script.Missing, match="ended early: out of memory"),
        script.peer_row(program, case("ends"), 3),
    ):
        pass


def test_rows_take_turns(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PAUSE", 0)
    asked: list[str] = []

    def row(name: str, seconds: float) -> Any:
        return script.Row(lambda: asked.append(name) or seconds, 2, 100)

    rows = {"a": row("a", 1.0), "b": row("b", 3.0)}
    times = script.take_turns(rows, 3, 0.1)
    assert times == {"a": [0.5] * 3, "b": [1.5] * 3}
    assert list(dict.fromkeys(asked[: len(asked) // 3])) == ["a", "b"]
    assert asked[len(asked) // 3] == "b"  # the second round begins with another row


def test_ratios_are_of_one_round(script: Any) -> None:
    row = script.Row(lambda: 0.0, 1, 8192)
    line = script.line_of(case(), row, [2e-3, 9e-3, 4e-3], [1e-3, 3e-3, 4e-3])
    assert line["times_ours"] == [1.5, 2.0, 2.5]
    assert (line["microseconds"], line["rounds"]) == (4000.0, 3)
    assert line["gops"] == pytest.approx(2e-9 * 4 * 256 * 128 / 4e-3, abs=0.01)
    assert script.quartiles([2.0]) == [2.0] * 3


def test_lines_of_a_layer(script: Any, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "PAUSE", 0)
    programs = {"tq2_0": program, "wrong": program}
    ours, theirs, missing = script.layers(case(script.OURS), programs, 2, 1e-4)
    keys = "implementation isa threads K N M microseconds gops gbytes_per_s rounds".split()
    assert list(ours) == keys
    assert list(theirs) == [*keys, "times_ours"]
    assert theirs["microseconds"] == 2000.0
    assert theirs["times_ours"][1] > 1
    assert missing["implementation"] == "wrong"
    assert "microseconds" not in missing
    assert json.dumps(missing)
