"""The showcase table: tasks by seeds, each trained, exported and scored, as JSON lines.

    python benchmarks/showcase.py --tasks sst2-movie qnli-privacy --seeds 0 1 2
    python benchmarks/showcase.py --gpus 0 1 --jobs 4    # all of it on two GPUs
    bitdistill report docs/results/showcase.jsonl

A row is what `bitdistill train --recipe showcase/TASK --set seed=N`, `export` and `eval` make, and
this only calls them: teacher, BitNet-SFT, and a student by each of `--methods`: the default, the
paper's, both, or none. `--jobs` trainings run at a time on the GPU, stage 2 first, and beside it
what does not wait for it. Scoring goes on beside them, one unit at a time: rows in PyTorch on
`--device`, students in fp64 too (what rounding alone changes), and the default student beside its
ONNX and MLX artifacts, which run on `--threads` of the CPU, on the first `--artifact-examples`,
into a file of their own.

Whatever is complete is skipped and what was interrupted goes on, so a table can be filled in
several sittings: SIGTERM and Ctrl-C let the trainings save. What each command said is in OUT/logs;
what each run recorded is left, thinned, in a folder of LOGS for `bitdistill plot`.
Recipes read models/smollm2 and data/ from where this runs; `--set` changes every recipe.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitdistill.config import load_config
from bitdistill.evals.run_plots import keep_records

TASKS = ("sst2-movie", "qnli-privacy", "boolq", "summary-bbc", "summary-debian")
METHODS = ("default", "paper")
TARGETS = ("onnx", "mlx")
SHARED = ("teacher", "bitnet-sft")  # stages that do not depend on the method


class Failed(Exception):
    """A command did not succeed; its log says why."""


@dataclass
class Shell:
    """Runs `bitdistill` commands, keeps what they say, and stops them all when it is told to."""

    logs: Path
    running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str, *arguments: str, gpu: str | None = None) -> None:
        """One command, its output appended to logs/NAME.txt; Failed if it does not return 0.

        It sees the GPU `gpu` alone: none if that is empty, all of them if it is None.
        """
        seen = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{name}.txt"
        with log.open("ab") as file:
            with self.lock:
                if self.stopped:
                    raise Failed(f"{name}: not started")
                child = subprocess.Popen(
                    [sys.executable, "-m", "bitdistill", *arguments],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=os.environ | seen,
                )
                self.running.add(child)
            code = child.wait()
        with self.lock:
            self.running.discard(child)
        if code != 0:
            raise Failed(f"{name}: `bitdistill {arguments[0]}` returned {code}; see {log}")

    def stop(self, *_: Any) -> None:
        """Ask every command to save and stop, and start no more."""
        self.stopped = True  # the lock may be held by the thread that the signal interrupted
        for child in list(self.running):
            child.send_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Unit:
    """One task and seed."""

    task: str
    seed: int
    options: argparse.Namespace

    @property
    def name(self) -> str:
        return f"{self.task}-seed{self.seed}"

    def run_of(self, method: str) -> Path:
        """The run directory of a method."""
        suffix = "" if method == "default" else f"-{method}"
        return self.options.out / f"{self.name}{suffix}"

    def pretrain(self, shell: Shell, gpu: str | None) -> None:
        """Every method's stage 2, which the other units find in the shared directory."""
        if "default" not in self.options.methods:  # which leaves the others their teacher
            self._train(shell, gpu, "default", SHARED[0])
        for method in self.options.methods:
            self._train(shell, gpu, method, "pretrained", "bitnet_sft.enabled=false")

    def prepare(self, shell: Shell, gpu: str | None) -> None:
        """What stage 2 has no part in."""
        settings = load_config(f"showcase/{self.task}", self.options.set)
        until = SHARED[1] if settings.bitnet_sft.enabled else SHARED[0]
        self._train(shell, gpu, "default", until)

    def train(self, shell: Shell, gpu: str | None) -> None:
        """Every method's student; a complete stage is skipped by the command itself."""
        for method in self.options.methods:
            self._train(shell, gpu, method, "student")
        for run in map(self.run_of, {"default", *self.options.methods}):
            keep_records(run, self.options.logs / run.name)

    def _train(self, shell: Shell, gpu: str | None, method: str, until: str, *more: str) -> None:
        run = self.run_of(method)
        if method != "default":
            run.mkdir(parents=True, exist_ok=True)
            for stage in SHARED:
                theirs = self.run_of("default") / stage
                if theirs.exists() and not (run / stage).exists():
                    (run / stage).symlink_to(theirs.resolve())
        recipe = f"showcase/{self.task}" + ("" if method == "default" else f"+{method}")
        settings = [f"seed={self.seed}", *self.options.set, *more]
        sets = [word for setting in settings for word in ("--set", setting)]
        where = ("--out", str(run), "--resume", "--until", until)
        shell(run.name, "train", "--recipe", recipe, *where, *sets, gpu=gpu)

    def score(self, shell: Shell, gpu: str | None) -> None:
        """`eval` all rows in PyTorch together."""
        run = self.run_of("default")
        rows = [run / s for s in (*SHARED, "student") if (run / s).exists()]
        rows += [self.run_of(m) / "student" for m in self.options.methods if m != "default"]
        self._eval(shell, gpu, "scored", rows, self.options.results)

    def score_artifacts(self, shell: Shell, gpu: str | None) -> None:
        """Export the default student, if there is one, and `eval` it beside its artifacts."""
        run, options = self.run_of("default"), self.options
        if "default" not in options.methods:
            return
        rows = [run / "student"]
        for target in TARGETS:
            rows.append(run / target)
            if not (run / target / "bitdistill.json").exists():
                what = ("--target", target, "--out", str(run / target), "--no-parity")
                shell(f"{run.name}-artifacts", "export", str(rows[0]), *what, gpu="")
        count = options.artifact_examples
        limit = () if count is None else ("--limit", str(count))
        self._eval(shell, gpu, "artifacts-scored", rows, options.artifact_results, *limit)

    def _eval(
        self, shell: Shell, gpu: str | None, mark: str, rows: list[Path], out: Path, *more: str
    ) -> None:
        """Once."""
        run, options = self.run_of("default"), self.options
        done = run / "-".join((mark, *options.methods))
        if done.exists():
            return
        held = options.data / self.task / options.file
        settings = ["--data", str(held), "--seed", str(self.seed), "--no-speed", "--floor", *more]
        settings += ["--device", options.device, "--threads", str(options.threads)]
        settings += ["--batch-size", str(options.batch_size)]
        places = ("--out", str(out), "--store", str(options.out / f"evals-{mark}"))
        shell(f"{run.name}-{mark}", "eval", *map(str, rows), *settings, *places, gpu=gpu)
        done.touch()


@dataclass(frozen=True)
class Step:
    """One step of a unit: which workers do it, and the names of the steps that it comes after."""

    name: str
    work: str  # "stage 2", "train", "score" or "artifacts"
    run: Callable[[Shell, str | None], None]
    after: tuple[str, ...] = ()


def steps_of(units: Sequence[Unit]) -> list[Step]:
    """All steps, those first that are to be done first when they can be."""
    first = Step("stage 2", "stage 2", units[0].pretrain)
    prepared, steps = [], [first]
    for unit in units:
        name, own = f"{unit.name}: train", f"{unit.name}: prepare"
        waits = () if prepared else (first.name,)  # stage 2 is in the first one's folder
        prepared.append(Step(own, "train", unit.prepare, waits))
        steps.append(Step(name, "train", unit.train, (first.name, own)))
        steps.append(Step(f"{unit.name}: score", "score", unit.score, (name,)))
        steps.append(Step(f"{unit.name}: artifacts", "artifacts", unit.score_artifacts, (name,)))
    return [*steps, *prepared]


class Work:
    """Hands steps out in their order; one whose forerunner failed is not done."""

    def __init__(self, steps: list[Step]) -> None:
        self.left, self.done, self.errors = list(steps), set[str](), list[str]()
        self.changed = threading.Condition()

    def do(
        self, kinds: Sequence[str], shell: Shell, gpu: str | None, after: str | None = None
    ) -> None:
        """Every step of these kinds, in turn, as it can be done; nothing before `after` is."""
        for kind in kinds:
            while (step := self._take(kind, after)) is not None:
                error = f"{step.name}: left undone"
                try:
                    step.run(shell, gpu)
                    error = ""
                except Failed as failed:
                    error = str(failed)
                finally:
                    self._end(step, error)

    def _take(self, kind: str, after: str | None) -> Step | None:
        with self.changed:
            while mine := [step for step in self.left if step.work == kind]:
                if after is None or after in self.done:
                    for step in mine:
                        if self.done.issuperset(step.after):
                            self.left.remove(step)
                            return step
                self.changed.wait()
        return None

    def _end(self, step: Step, error: str) -> None:
        with self.changed:
            if not error:
                self.done.add(step.name)
            else:
                print(error, file=sys.stderr, flush=True)
                self.errors.append(error)
                lost = {step.name}
                while more := {s.name for s in self.left if lost.intersection(s.after)} - lost:
                    lost |= more
                self.left = [s for s in self.left if s.name not in lost]
            self.changed.notify_all()


def fill(units: Sequence[Unit], shell: Shell, jobs: int, gpus: Sequence[str | None]) -> list[str]:
    """Train `jobs` units at a time and score each when it is trained; what went wrong."""
    steps = steps_of(units)
    work, first = Work(steps), steps[0]
    with ThreadPoolExecutor(jobs + 2) as threads:
        tasks = [threads.submit(work.do, ("stage 2", "train"), shell, gpus[0])]
        for index in range(1, jobs):
            gpu = gpus[index % len(gpus)]
            shared = len(gpus) > 1 and gpu == gpus[0]
            rest = (first.name,) if shared else ()
            tasks.append(threads.submit(work.do, ("train",), shell, gpu, *rest))
        for kind in ("score", "artifacts"):
            tasks.append(threads.submit(work.do, (kind,), shell, gpus[-1]))
        for task in tasks:
            task.result()  # raises an error of this script's own
    return work.errors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS[:1])
    parser.add_argument("--out", type=Path, default=Path("runs/showcase"))
    parser.add_argument("--results", type=Path, default=Path("docs/results/showcase.jsonl"))
    artifact_results = Path("docs/results/showcase-artifacts.jsonl")
    parser.add_argument("--artifact-results", type=Path, default=artifact_results)
    parser.add_argument("--logs", type=Path, default=Path("docs/results/showcase-runs"))
    parser.add_argument("--artifact-examples", type=int, metavar="N", help="the first N; else all")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of task folders")
    parser.add_argument("--file", default="validation.jsonl", help="what is scored, in each")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--gpus", nargs="+", metavar="ID", help="that share them; else as it is")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="of scoring")
    parser.add_argument("--threads", type=int, default=4, help="of scoring")
    parser.add_argument("--batch-size", type=int, default=64, help="of scoring")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    shell = Shell(options.out / "logs")
    signal.signal(signal.SIGTERM, shell.stop)
    signal.signal(signal.SIGINT, shell.stop)
    units = [Unit(task, seed, options) for seed in options.seeds for task in options.tasks]
    if errors := fill(units, shell, options.jobs, options.gpus or [None]):
        sys.exit(f"{len(errors)} steps were not completed; run this again to go on")


if __name__ == "__main__":
    main()
