"""Single layers: our kernels beside those of llama.cpp, bitnet.cpp and ik_llama.cpp, in turn.

    python benchmarks/kernel_peers.py --out kernels-peers.jsonl \\
        tq2_0=llama.cpp,llama.cpp/build \\
        i2_s=BitNet,BitNet/build iq2_bn_r4=ik_llama.cpp,ik_llama.cpp/build

A peer is NAME=CHECKOUT,BUILD: the ggml type of its weights, and where its headers and libraries
are. Build them for one instruction set, that of `--isa`, e.g. for AVX2, with the compiler that is
best for each, as

    cmake -S CHECKOUT -B BUILD -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \\
        -DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON
    cmake --build BUILD --target llama-bench

kernel_peers.cpp is compiled against each with `--compiler`. A peer where that fails, or whose
product is wrong, is a line with `missing`, the reason; nothing is estimated.

For each shape, number of tokens M and threads one process a peer holds as many copies of the layer
as ours do in the kernels' benchmark: more than the caches hold, or a tenth of a second of
arithmetic. Activations are floats everywhere, and are quantised inside. In a round each row has a
turn: a pass that warms up, then passes that last `--seconds`, whose median is the turn's time. A
line is the median of a row's rounds; `times_ours` are quartiles of its time over ours in the same
round. Columns are those of `python -m bitdistill.backends.kernels.bench`.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lines import put

from bitdistill.backends.kernels.bench.direct import ternary_pass
from bitdistill.backends.kernels.bench.figures import Case, figure_of
from bitdistill.backends.kernels.pool import Pool

SOURCE = Path(__file__).with_suffix(".cpp")
OURS = "ternary-2bit"
SHAPES = (
    "1024x2048", "1024x1024", "2048x1024", "1024x3072", "3072x1024", "2560x9728", "9728x2560",
)  # fmt: skip
WRONG = 0.02  # relative error of a result; rounding activations to 8 bits makes 0.004
STACK_BYTES = 1 << 28  # bitnet.cpp keeps a thread's results on its stack
PAUSE = 0.02  # seconds between turns: a peer's idle threads spin, those of GCC's OpenMP some 5 ms
SPIN = "10"  # ms of clang's OpenMP, instead of 200: still more than lies between two passes
BUSY = 0.5  # load average
Run = Callable[[], float]


class Missing(Exception):
    """A peer that cannot be measured, and why."""


@dataclass(frozen=True)
class Peer:
    """The ggml type of a peer's weights, and its checkout and build."""

    name: str
    checkout: Path
    build: Path


@dataclass(frozen=True)
class Row:
    """run() -> seconds of a pass over the copies of a layer, `weight_bytes` each."""

    run: Run
    copies: int
    weight_bytes: int


def parse(text: str) -> Peer:
    """NAME=CHECKOUT,BUILD; ArgumentTypeError for another form."""
    name, _, places = text.partition("=")
    checkout, _, build = places.partition(",")
    if not (name and checkout and build):
        raise argparse.ArgumentTypeError(f"{text!r} is not a peer; give NAME=CHECKOUT,BUILD")
    return Peer(name, Path(checkout), Path(build))


def compile_peer(peer: Peer, compiler: str, folder: Path) -> Path:
    """The program that times a peer's layers; Missing if its parts are not there or do not fit."""
    headers = sorted(peer.checkout.rglob("ggml/include/ggml.h"))
    if not headers:
        raise Missing(f"no ggml/include/ggml.h below {peer.checkout}; give its checkout")
    libraries = sorted(p for end in ("a", "so") for p in peer.build.rglob(f"libggml*.{end}"))
    if not libraries:
        raise Missing(f"no libggml below {peer.build}; build the peer there")
    program = folder / peer.name
    paths = [f"-Wl,-rpath,{library.parent.resolve()}" for library in libraries]
    linked = ["-Wl,--start-group", *map(str, libraries), "-Wl,--end-group", *dict.fromkeys(paths)]
    command = [compiler, "-std=c++17", "-O2", f"-I{headers[0].parent}", str(SOURCE), *linked]
    command += ["-fopenmp", "-lpthread", "-ldl", "-lm", "-o", str(program)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Missing(
            f"no compiler {compiler}; install it, or give another by --compiler"
        ) from None
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise Missing(f"does not compile: {(errors or [done.stderr.strip()[-300:]])[0]}")
    return program


@contextmanager
def peer_row(program: Path, case: Case, copies: int) -> Iterator[Row]:
    """A peer's process; Missing if it ends early or its product is wrong."""
    sizes = map(str, (case.K, case.N, case.M, case.threads, copies))
    process = subprocess.Popen(
        [str(program), case.implementation, *sizes],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_STACKSIZE": f"{STACK_BYTES}B", "KMP_BLOCKTIME": SPIN},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    answers, asked = process.stdout, process.stdin

    def run() -> float:
        asked.write("\n")
        asked.flush()
        return float(answer())

    def answer() -> str:
        line = answers.readline()
        if not line:
            assert process.stderr is not None
            raise Missing(f"ended early: {process.stderr.read().strip()[-300:] or process.wait()}")
        return line

    try:
        weight_bytes, error = answer().split()
        if not float(error) < WRONG:
            raise Missing(f"its product is wrong: relative error {error}")
        yield Row(run, copies, int(weight_bytes))
    finally:
        process.kill()
        process.communicate()


def enlarge_stack() -> None:
    """For the processes that this one starts."""
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    size = STACK_BYTES if most == resource.RLIM_INFINITY else min(STACK_BYTES, most)
    resource.setrlimit(resource.RLIMIT_STACK, (size, most))


def median_pass(run: Callable[[], float], seconds: float) -> float:
    """Median of run() -> seconds of a pass, over passes that last `seconds` (five at least, but
    not beyond five times that), after one that warms up."""
    run()
    times: list[float] = []
    while sum(times) < 5 * seconds and (len(times) < 5 or sum(times) < seconds):
        times.append(run())
    return statistics.median(times)


def take_turns(rows: dict[str, Row], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of a layer in each round, by row; each round begins with another row."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    names = list(rows)
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(PAUSE)
            times[name].append(median_pass(rows[name].run, seconds) / rows[name].copies)
    return times


def line_of(case: Case, row: Row, times: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """A line of the kernels' benchmark, and quartiles of the time over ours in the same round."""
    line: dict[str, Any] = asdict(figure_of(case, statistics.median(times), row.weight_bytes))
    line["rounds"] = len(times)
    if case.implementation != OURS:
        ratios = [a / b for a, b in zip(times, ours, strict=True)]
        line["times_ours"] = [round(x, 3) for x in quartiles(ratios)]
    return line


def quartiles(values: Sequence[float]) -> list[float]:
    """The three of them; of one value, that value."""
    if len(values) == 1:
        return [*values] * 3
    return statistics.quantiles(values, method="inclusive")


def layers(
    ours: Case, programs: dict[str, Path], rounds: int, seconds: float
) -> Iterator[dict[str, Any]]:
    """The lines of one layer: ours, then the peers, those that cannot be measured as missing."""
    rows, cases, missing = {}, {OURS: ours}, []
    with ExitStack() as stack:
        opened = stack.enter_context(ternary_pass(ours))
        pool = stack.enter_context(Pool(ours.threads))
        rows[OURS] = Row(lambda: opened.run(pool), opened.copies, opened.weight_bytes)
        for name, program in programs.items():
            case = Case(name, ours.isa, ours.threads, ours.K, ours.N, ours.M)
            try:
                rows[name] = stack.enter_context(peer_row(program, case, rows[OURS].copies))
                cases[name] = case
            except Missing as error:
                missing.append({**asdict(case), "missing": str(error)})
        times = take_turns(rows, rounds, seconds)
    for name, row in rows.items():
        yield line_of(cases[name], row, times[name], times[OURS])
    yield from missing


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="+", type=parse, metavar="NAME=CHECKOUT,BUILD")
    parser.add_argument("--isa", default="avx2", help="of our kernels, and of the peers' builds")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="KxN")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 128], help="values of M")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a turn")
    parser.add_argument("--compiler", default="c++")
    parser.add_argument("--out", type=Path, help="a file that lines are appended to")
    arguments = parser.parse_args()
    enlarge_stack()
    if (load := os.getloadavg()[0]) > BUSY:
        print(
            f"the load average is {load:.1f}: the peers' threads wait for each other in loops, so "
            "a busy machine flatters ours; measure on a quiet one",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for peer in arguments.peers:
            try:
                programs[peer.name] = compile_peer(peer, arguments.compiler, Path(folder))
            except Missing as error:
                put({"implementation": peer.name, "missing": str(error)}, arguments.out)
        for threads in arguments.threads:
            for shape in arguments.shapes:
                columns, rows = map(int, shape.split("x"))
                for tokens in arguments.tokens:
                    case = Case(OURS, arguments.isa, threads, columns, rows, tokens)
                    print(f"{shape}, {tokens} tokens, {threads} threads", file=sys.stderr)
                    for line in layers(case, programs, arguments.rounds, arguments.seconds):
                        put(line, arguments.out)


if __name__ == "__main__":
    main()
