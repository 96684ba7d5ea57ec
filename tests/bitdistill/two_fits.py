"""Two processes that train a tiny student together (gloo), and the same training in one.

python two_fits.py FOLDER: both processes, forked after the imports. They train from the start,
again from their own state of step 4, and from the one that a single process left in FOLDER/one.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from short_runs import settings, task_batches
from transformers import LlamaConfig, LlamaForCausalLM

from bitdistill import distributed, training
from bitdistill.data import Shard, TaskBatches
from bitdistill.distributed import ALONE, World
from bitdistill.objective import make_objective
from bitdistill.progress import Reporter
from bitdistill.schema import Machine
from bitdistill.student import make_student
from bitdistill.training import Fit

ACCUMULATE = 4
OFTEN = {"LOG_EVERY": 2, "TRITS_EVERY": 4}  # of training.py: records of so short a run
SECONDS = 60


def make_fit(folder: Path, world: World = ALONE) -> Fit:
    """Of eight steps and a state after four; what one process accumulates is shared by two."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 200}
    teacher = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()
    options = settings(accumulate=ACCUMULATE, learning_rate=1e-2)
    share = world.share(ACCUMULATE, "accumulate")
    shard = Shard(world.rank, world.size)
    return Fit(
        "student",
        make_objective(make_student(teacher), teacher, options),
        TaskBatches(task_batches().rows, 0, options.batch_size, share, shard=shard),
        options,
        Machine(device="cpu", precision="float32", save_steps=4),
        Reporter(folder / "log.jsonl" if world.main else None, quiet=True),
        folder / "student.training",
        world=world,
    )


def keep_weights(fit: Fit, file: Path) -> None:
    """Write the whole student, of however many processes it is."""
    whole = {name: distributed.whole(p.detach()) for name, p in fit.model.named_parameters()}
    if fit.world.main:
        save_file({name: p.clone() for name, p in whole.items()}, file)


@torch.no_grad()
def trits_of(fit: Fit) -> list[Any]:
    """What the monitor says of the weights as they are, and then with every other sign turned."""
    monitor, matrices = fit.monitor, [part for part in fit.parts.values() if part.ndim > 1]
    monitor._trits = []
    said: list[Any] = [monitor.histogram(), monitor.trits(), monitor.linears]
    for part in matrices:
        part[:, ::2].neg_()
    said += [monitor.trits(), monitor.linears]
    for part in matrices:
        part[:, ::2].neg_()
    return said


def machine_of(fit: Fit) -> dict[str, float]:
    """What a record says of the machine, as if each process had a GPU and the second the most."""
    hardware: Any = SimpleNamespace(cuda=True, device=None)
    fit.monitor.hardware, fit.monitor._peak = hardware, 1e9
    allocated = torch.cuda.max_memory_allocated
    torch.cuda.max_memory_allocated = lambda device: (1 + fit.world.rank) << 30  # type: ignore
    try:
        return fit.monitor.machine(1000, 16, 1.0)
    finally:
        torch.cuda.max_memory_allocated = allocated


def work(folder: Path, world: World) -> None:
    fit = make_fit(folder / "two", world)
    fit.run()
    keep_weights(fit, folder / "two.safetensors")
    again = make_fit(folder / "two", world)
    again.reporter = Reporter(quiet=True)
    again.restore()
    again.run()
    keep_weights(again, folder / "again.safetensors")
    other = make_fit(folder / "two", world)
    other.reporter, other.state_dir = Reporter(quiet=True), folder / "one" / "student.training"
    other.restore()
    keep_weights(other, folder / "taken.safetensors")
    seen = trits_of(other)
    other.run()
    keep_weights(other, folder / "continued.safetensors")
    seen.append(machine_of(other))
    if world.main:
        (folder / "seen.json").write_text(json.dumps(seen))


def forked(folder: Path, rank: int) -> int:
    """A process that does the work; its id."""
    child = os.fork()
    if child != 0:
        return child
    try:
        store = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        work(folder, World(rank, 2))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path) -> None:
    """Fails as soon as one of them does, and takes the other down."""
    torch.set_num_threads(1)
    vars(training).update(OFTEN)
    running, failed = {forked(folder, rank) for rank in range(2)}, False
    deadline = time.monotonic() + SECONDS
    while running and not failed:
        time.sleep(0.02)
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                running.remove(child)
                failed = failed or status != 0
        failed = failed or time.monotonic() > deadline
    for child in running:
        os.kill(child, 9)
    sys.exit(int(failed))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
