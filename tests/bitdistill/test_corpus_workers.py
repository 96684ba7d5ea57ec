"""Worker processes of a corpus: any number of them gives the same sequences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from short_runs import WORDS, rows_of, same

from bitdistill import corpus
from bitdistill.config import load_config
from bitdistill.data import PackedBatches
from bitdistill.distributed import World
from bitdistill.feeds import corpus_batches
from bitdistill.schema import Training


@pytest.fixture
def local(tokenizer: Any, tmp_path: Path) -> Any:
    """`local(workers)`: batches of 2 x 3 sequences from JSON lines and parquet files."""
    import pandas as pd

    lines = [json.dumps({"text": f"{i} {' '.join(WORDS[: i % 11])}"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pd.DataFrame({"text": [f"row {i} is good" for i in range(90)]}).to_parquet(
        tmp_path / "b.parquet", row_group_size=20
    )

    def make(workers: int, *settings: str) -> PackedBatches:
        sources = f"corpus.sources=[{tmp_path / 'a.jsonl'}, {tmp_path / 'b.parquet'}, tiny]"
        config = load_config("tiny", [sources, f"machine.workers={workers}", *settings])
        size = Training(steps=1, max_length=32, batch_size=3, accumulate=2)
        return corpus_batches(config, size, tokenizer, World())

    return make


def test_the_number_of_workers_changes_nothing(local: Any) -> None:
    """Nor does changing it in the middle."""
    with closing(local(0, "corpus.document_mask=true")) as inline:
        expected = [inline.window(step) for step in range(30)]
        state = json.loads(json.dumps(inline.state()))
    with closing(local(2, "corpus.document_mask=true")) as two:
        assert all(same(two.window(step), expected[step]) for step in range(10))
        middle = json.loads(json.dumps(two.state()))
    with closing(local(9, "corpus.document_mask=true")) as nine:  # more than there are rows
        nine.restore(middle)
        assert all(same(nine.window(step), expected[step]) for step in range(10, 30))
        assert nine.state()["rows"] == state["rows"]


def test_a_worker_reports_what_a_user_can_mend(local: Any, tmp_path: Path) -> None:
    batches = local(1)
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 5}\n')
    with closing(batches), pytest.raises(ValueError, match=r"row 1 of .*a.jsonl has 5 in column"):
        batches.window(0)
    (tmp_path / "a.jsonl").unlink()
    batches.restore(None)
    with closing(batches), pytest.raises(FileNotFoundError, match=r"a.jsonl does not exist"):
        batches.window(0)


def test_a_worker_that_dies(local: Any) -> None:
    with closing(local(1)) as batches:
        batches.window(0)
        os.kill(batches.steps._packing.workers[0].process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker ended unexpectedly \(exit status -9\)"):
            rows_of(batches, range(1, 10_000))


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_end_with_the_training_process(local: Any, tmp_path: Path) -> None:
    """Even with one that was killed; and they leave signals for it to act on."""
    with closing(local(1)) as batches:
        job = {
            "corpus": {"sources": [str(tmp_path / "a.jsonl")]},
            "task": {"name": "tiny"},
            "seed": 0,
            "run_seed": 0,
            "tokenizer": "",
            "end": None,
            "rows": [0],
            "total": 1,
            "length": 8,
            "state": None,
        }
        batches.window(0)
        process = batches.steps._packing.workers[0].process
        for number in (signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        assert len(batches.window(1)) == 2
        assert process.poll() is None
    assert process.returncode == -signal.SIGKILL
    import tokenizers

    job["tokenizer"] = tokenizers.Tokenizer(tokenizers.models.BPE()).to_str()
    job["end"] = 0
    parent = (
        "import json, os, sys; from bitdistill.corpus import Worker\n"
        "w = Worker(json.loads(sys.argv[1])); w.next(); print(w.process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, json.dumps(job)], capture_output=True, text=True
    )
    assert done.returncode == -9, done.stderr
    deadline = time.monotonic() + 20
    while _alive(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody waits for does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_loads_neither_torch_nor_transformers() -> None:
    job = {"corpus": {"sources": ["tiny"]}, "task": {"name": "tiny"}, "seed": 0, "run_seed": 0}
    program = (
        f"import sys, bitdistill.corpus_worker as w\nw.open_sources({job})[0].next()\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_tokenizer_without_a_file(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"object has no tokenizer.json; use a model with one"):
        corpus.corpus_steps(load_config("tiny"), object(), range(2), 2, 8, 0)
