"""Batches that a thread makes ready: the same ones, in the same order."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from short_runs import DOCUMENTS, packed_batches, same

from bitdistill.prefetch import Prefetched, prefetched
from bitdistill.schema import Machine


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
