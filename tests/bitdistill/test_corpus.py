"""Packed sequences: the same for every number of workers and devices, exactly resumable."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import packed_batches

from bitdistill import corpus
from bitdistill.config import load_config
from bitdistill.data import IGNORED, Batch, Batches, PackedBatches, Shard
from bitdistill.distributed import World
from bitdistill.documents import Source
from bitdistill.feeds import corpus_batches
from bitdistill.prefetch import Prefetched, prefetched
from bitdistill.readers import Texts
from bitdistill.schema import Machine, Training
from bitdistill.sequences import (
    CHUNK,
    SNAPSHOT,
    Chunk,
    Dealer,
    Encoder,
    merge_states,
    split_document,
)

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()
DOCUMENTS = [
    [f"the film {i} is {' '.join(WORDS[: i % 9])}" for i in range(40)],
    ["a plot", "we liked it", ""],
]


def rows_of(batches: Batches, steps: range) -> list[list[list[int]]]:
    """The sequences of each step, micro-batches one after the other."""
    return [
        [row for batch in batches.window(step) for row in batch["input_ids"].tolist()]
        for step in steps
    ]


def same(one: list[Batch], two: list[Batch]) -> bool:
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(one, two, strict=True)
    )


# --- packing --------------------------------------------------------------------------------------


def test_the_encoder_is_the_tokenizer(tokenizer: Any) -> None:
    """With the end of text behind every document, and padding or truncation set by others."""
    tokenizer.backend_tokenizer.enable_truncation(3)
    encode = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.no_truncation()
    texts = ["the film is not good", "", "ümläut 🎬", tokenizer.eos_token]
    expected = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]
    chunks = [chunk for text in texts for chunk in split_document(text)]
    assert [tokens.tolist() for tokens in encode(chunks)] == expected


def test_documents_are_dealt_to_rows(tokenizer: Any) -> None:
    """Sources in turn, each document to the row with the fewest characters, rows by themselves."""
    batches = packed_batches([["the film", "is not"], ["good"]], tokenizer, 6, 2)
    rows: list[list[str]] = [[], []]
    for text in ["the film", "good", "is not", "good"] * 40:
        min(rows, key=lambda row: sum(len(t) + 1 for t in row)).append(text)
    expected = [tokenizer(tokenizer.eos_token.join(row)).input_ids for row in rows]
    for step in range(5):
        (batch,) = batches.window(step)
        assert batch["input_ids"].tolist() == [e[step * 6 : step * 6 + 6] for e in expected]
        assert torch.equal(batch["labels"], batch["input_ids"])
        assert bool((batch["attention_mask"] == 1).all())
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert batches.steps_per_epoch() is None
    assert same(batches.window(4), [batch])  # the same step again is the same window


def test_every_document_is_dealt_once() -> None:
    """To one row of one process, whoever asks first."""
    texts = [f"{i} " * (1 + i * 7 % 13) for i in range(48)]
    dealt: list[tuple[int, str]] = []
    for rows in ([3, 0], [1], [2, 4]):
        dealer = Dealer([Source("list", Texts(lambda: texts))], rows, 5)
        for row in rows:
            while (document := dealer.take(row))[0] < 96:
                dealt.append(document)
    assert sorted(dealt) == [(number, texts[number % 48]) for number in range(96)]


def test_no_row_runs_far_ahead(tokenizer: Any) -> None:
    """However uneven the documents, few are held for rows that have enough of them."""
    texts = ["good " * (1 + (i * i) % 97) for i in range(3000)]
    batches = packed_batches([texts], tokenizer, 32, 16)
    for step in range(300):
        batches.window(step)
    dealer = batches.steps._packing._dealer  # type: ignore[union-attr]
    assert sum(len(hand) for hand in dealer._hands.values()) < 2 * 16


def test_an_epoch_holds_every_document_once(tokenizer: Any) -> None:
    """No row gets another row's documents, whatever their lengths."""
    texts = [f"{i} " * (1 + i * 7 % 13) for i in range(48)]
    batches = packed_batches([texts], tokenizer, 5, 4, 2)
    streams: list[list[int]] = [[] for _ in range(8)]
    for step in range(60):
        for stream, row in zip(streams, rows_of(batches, range(step, step + 1))[0], strict=True):
            stream += row
    found = Counter(d for s in streams for d in tokenizer.decode(s).split(tokenizer.eos_token)[:-1])
    assert set(found) == set(texts)
    assert max(found.values()) <= min(found.values()) + 2  # rows are not in step to the document


def test_documents_of_a_sequence_are_numbered(tokenizer: Any) -> None:
    masked = packed_batches(DOCUMENTS, tokenizer, 16, 2, 2, document_mask=True)
    plain = packed_batches(DOCUMENTS, tokenizer, 16, 2, 2)
    seen = set()
    for step in range(6):
        for batch, other in zip(masked.window(step), plain.window(step), strict=True):
            assert torch.equal(batch["input_ids"], other["input_ids"])
            assert batch["documents"].dtype == batch["position_ids"].dtype == torch.int64
            for ids, labels, documents, positions in zip(
                *(batch[k].tolist() for k in ("input_ids", "labels", "documents", "position_ids")),
                strict=True,
            ):
                number = position = 0
                for index, token in enumerate(ids):
                    assert (documents[index], positions[index]) == (number, position)
                    assert labels[index] == (IGNORED if position == 0 else token)
                    position += 1
                    if token == tokenizer.eos_token_id:
                        number, position = number + 1, 0
                seen.add(number)
    assert max(seen) > 1


def test_long_documents_are_tokenised_in_chunks(tokenizer: Any) -> None:
    """To the same tokens; a sequence counts their chunks as one document."""
    texts = [" ".join(WORDS[(i * k) % 16] for i in range(9_000)) for k in (1, 3)]
    encode = Encoder(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    for text in texts:
        chunks = split_document(text)
        assert len(chunks) == -(-len(text) // CHUNK)
        assert "".join(chunk.text for chunk in chunks) == text
        assert [c.first for c in chunks] == [True, *[False] * (len(chunks) - 1)]
        assert [c.last for c in chunks] == [*[False] * (len(chunks) - 1), True]
        joined = [token for tokens in encode(chunks) for token in tokens]
        assert joined == [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    batches = packed_batches([texts], tokenizer, 1000, 1, document_mask=True)
    ids, documents, states = [], [], []
    for step in range(18):
        (batch,) = batches.window(step)
        ids += batch["input_ids"][0].tolist()
        documents.append(int(batch["documents"].max()))
        states.append((batch, json.dumps(batches.state())))
    for (_, state), (expected, _) in pairwise(states):
        again = packed_batches([texts], tokenizer, 1000, 1, document_mask=True)
        again.restore(json.loads(state))
        assert same(again.window(0), [expected])
    assert ids == tokenizer(tokenizer.eos_token.join(texts)).input_ids[: len(ids)]
    assert set(documents) == {0, 1}


def test_splitting_documents() -> None:
    assert split_document("") == [Chunk("", True, True)]
    assert [c.text for c in split_document("字" * (CHUNK + 5))] == ["字" * CHUNK, "字" * 5]
    lone = "a" * CHUNK + " b"  # a space at which nothing may be cut comes too late
    assert [c.text for c in split_document(lone)] == ["a" * CHUNK, " b"]
    assert [len(c.text) for c in split_document("x " * CHUNK)] == [CHUNK - 1, CHUNK - 2, 3]


def test_a_corpus_of_nothing_but_empty_texts(tokenizer: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("bitdistill.sequences.MAX_EMPTY_ROUNDS", 20)
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(ValueError, match=r"the pre-training corpus holds no text; check corpus"):
        packed_batches([["", ""]], bare, 5, 2).window(0)


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2, 7])
@pytest.mark.parametrize("mask", [True, False])
def test_packing_resumes_exactly(tokenizer: Any, stop: int, mask: bool) -> None:
    whole, part, rest = (
        packed_batches(DOCUMENTS, tokenizer, 7, 2, 2, document_mask=mask) for _ in range(3)
    )
    expected = [whole.window(step) for step in range(12)]
    for step in range(stop):
        part.window(step)
    state = part.state()
    text = json.dumps(state)
    part.window(stop)
    assert json.dumps(state) == text  # a saved state does not move on
    rest.restore(json.loads(text))
    assert json.loads(json.dumps(rest.state())) == json.loads(text)
    for step in range(stop, 12):
        assert same(rest.window(step), expected[step])


def test_resuming_does_not_read_from_the_start(tokenizer: Any) -> None:
    """Only the documents since the last noted position are read again."""
    texts = [f"the film {i} {'good ' * (i % 5)}" for i in range(20 * SNAPSHOT)]
    batches = packed_batches([texts], tokenizer, 64, 4)
    for step in range(200):
        batches.window(step)
    state = json.loads(json.dumps(batches.state()))
    noted, (source,) = state["reader"]["document"], state["reader"]["sources"]
    wanted = min(document for document, *_ in state["rows"].values())
    assert 2 * SNAPSHOT < noted <= wanted < noted + SNAPSHOT
    assert source["index"] == noted
    again = packed_batches([texts], tokenizer, 64, 4)
    again.restore(state)
    assert same(again.window(200), batches.window(200))


def test_a_position_of_another_batch_size(tokenizer: Any) -> None:
    small, large = (packed_batches(DOCUMENTS, tokenizer, 7, size) for size in (2, 3))
    small.window(0)
    large.restore(small.state())
    with pytest.raises(ValueError, match="has no row 2; continue with the batch size"):
        large.window(1)


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 4])
def test_devices_share_the_window_of_one(tokenizer: Any, world: int) -> None:
    """The same sequences in each step; and a position is theirs together, on any number."""
    alone = packed_batches(DOCUMENTS, tokenizer, 7, 2, 4)
    shared = [
        packed_batches(DOCUMENTS, tokenizer, 7, 2, 4 // world, shard=Shard(rank, world))
        for rank in range(world)
    ]
    expected = rows_of(alone, range(6))
    parts = [rows_of(batches, range(6)) for batches in shared]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == expected  # noqa: RUF017
    state = json.loads(json.dumps(merge_states([batches.state() for batches in shared])))
    assert state["rows"] == json.loads(json.dumps(alone.state()))["rows"]
    fewer = [
        packed_batches(DOCUMENTS, tokenizer, 7, 2, 8 // world, shard=Shard(rank, world // 2))
        for rank in range(world // 2)
    ]
    for batches in fewer:
        batches.restore(state)
    rest = [rows_of(batches, range(6, 9)) for batches in fewer]
    joined = [sum(rows, []) for rows in zip(*rest, strict=True)]  # noqa: RUF017
    assert joined == rows_of(alone, range(6, 9))


# --- worker processes -----------------------------------------------------------------------------


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
    program = (
        "import sys, bitdistill.corpus_worker as w\n"
        "w.open_sources({'corpus': {'sources': ['tiny']}, 'task': {'name': 'tiny'}, 'seed': 0})"
        "[0].next()\nprint(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_a_tokenizer_without_a_file(local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"object has no tokenizer.json; use a model with one"):
        corpus.corpus_steps(load_config("tiny"), object(), range(2), 2, 8, 0)


# --- made ready ahead -----------------------------------------------------------------------------


@pytest.fixture
def ready(tokenizer: Any) -> Iterator[Prefetched]:
    batches = Prefetched(packed_batches(DOCUMENTS, tokenizer, 7, 2, 2), 3)
    yield batches
    batches.close()


def test_prefetching_changes_nothing(tokenizer: Any, ready: Prefetched) -> None:
    """Neither the windows nor the position, however far ahead the thread is."""
    plain = packed_batches(DOCUMENTS, tokenizer, 7, 2, 2)
    assert ready.state() == plain.state()
    for step in range(8):
        assert same(ready.window(step), plain.window(step))
        time.sleep(0.01)
        assert ready.state() == plain.state()
        assert same(ready.window(step), plain.window(step))
    state = json.loads(json.dumps(ready.state()))
    ready.restore(state)
    for step in range(8, 12):
        assert same(ready.window(step), plain.window(step))
    assert ready.steps_per_epoch() is None


def test_a_thread_works_ahead_and_stops(tokenizer: Any, ready: Prefetched) -> None:
    ready.window(0)
    deadline = time.monotonic() + 20
    while not ready._ready.full():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    thread = ready._thread
    assert isinstance(thread, threading.Thread)
    ready.close()
    assert not thread.is_alive()
    again = packed_batches(DOCUMENTS, tokenizer, 7, 2, 2)
    again.window(0)
    assert same(ready.window(1), again.window(1))  # it starts again where it was


def test_an_error_arrives_where_the_window_is_asked_for(tokenizer: Any) -> None:
    with closing(Prefetched(packed_batches([[]], tokenizer, 7, 2), 2)) as batches:
        for _ in range(2):
            with pytest.raises(ValueError, match="the pre-training corpus is empty"):
                batches.window(0)


def test_prefetching_is_a_setting(tokenizer: Any) -> None:
    batches = packed_batches(DOCUMENTS, tokenizer, 7, 2)
    assert prefetched(batches, Machine(device="cpu", prefetch=0)) is batches
    ahead = prefetched(batches, Machine(device="cpu", prefetch=2))
    assert isinstance(ahead, Prefetched)
    assert (ahead.depth, ahead.pin) == (2, False)
