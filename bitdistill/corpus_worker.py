"""A process that reads, tokenises and packs some rows of a corpus: `-m bitdistill.corpus_worker`.

The job is one line of JSON on stdin. What follows on stdout is, for every step without end, one
line of JSON (the lengths of the pieces and the position after the step) and the ids as int32. The
pipe is the queue: a worker that is ahead waits until somebody reads. It imports neither torch nor
transformers, starts in a fraction of a second, and ends when the other side of the pipe is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any, BinaryIO

from bitdistill.documents import Source, open_source
from bitdistill.schema_data import Corpus, TaskData
from bitdistill.sequences import Encoder, Packer

# what a job may fail with for a reason that a user can mend
MENDABLE = {"ValueError": ValueError, "FileNotFoundError": FileNotFoundError, "OSError": OSError}


def open_sources(job: dict[str, Any]) -> list[Source]:
    """The sources of a job; it holds `corpus`, `task` and seeds of a configuration."""
    corpus = Corpus.model_validate(job["corpus"])
    task = TaskData.model_validate(job["task"])
    seeds = job["seed"], job["run_seed"]
    return [open_source(name, corpus, task, *seeds) for name in corpus.sources]


def make_packer(job: dict[str, Any]) -> Packer:
    """The packer that a job describes, at its position."""
    encoder = Encoder(job["tokenizer"], job["end"])
    packer = Packer(open_sources(job), encoder, job["rows"], job["total"], job["length"])
    if job["state"] is not None:
        packer.restore(job["state"])
    return packer


def serve(job: dict[str, Any], out: BinaryIO) -> None:
    """Write step after step; a reason to stop is written as `error`."""
    try:
        packer = make_packer(job)
        while True:
            sequences = packer.next()
            head = {"pieces": sequences.pieces, "state": packer.state()}
            out.write(json.dumps(head).encode() + b"\n" + sequences.ids.tobytes())
            out.flush()
    except BrokenPipeError:
        return  # the training process is gone
    except tuple(MENDABLE.values()) as error:
        kind = next(k for k, v in MENDABLE.items() if isinstance(error, v))
        out.write(json.dumps({"error": str(error), "kind": kind}).encode() + b"\n")
        out.flush()


def main() -> None:
    """Serve the job on stdin; whoever started this process also ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole group; the trainer saves first
        signal.signal(number, signal.SIG_IGN)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come in between
    serve(json.loads(sys.stdin.buffer.readline()), out)
    sys.stderr.flush()
    os._exit(0)  # the threads of some data libraries do not survive an orderly exit


if __name__ == "__main__":
    main()
