"""Packed sequences: documents dealt to rows, exactly resumable, shared by devices."""

from __future__ import annotations

import copy
import json
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from short_runs import DOCUMENTS, WORDS, packed_batches, rows_of, same

from bitdistill.data import IGNORED, Shard
from bitdistill.documents import Source
from bitdistill.readers import Texts
from bitdistill.sequences import (
    CHUNK,
    SNAPSHOT,
    Chunk,
    Dealer,
    Encoder,
    merge_states,
    split_document,
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
