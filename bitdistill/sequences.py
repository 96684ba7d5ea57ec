"""Documents to full sequences of tokens, the same for any number of processes and devices.

Documents are dealt like cards to the R rows of the global batch, each to the row with the fewest
characters so far, and every row joins its own documents by the end-of-text token and cuts them into
sequences. A row needs nothing from another row, so rows can be spread over worker processes and
devices at will: the sequences of a step depend on R alone. Everybody reads all documents, which is
cheap, and tokenises only those of their own rows, which is not.

A row's position is a document, one of its chunks and an offset into that chunk's tokens; a resumed
run needs no more. So that it need not read from the start, the dealer's position is noted every
SNAPSHOT documents; and so that a book neither holds up a step nor is tokenised again as a whole, a
document is tokenised in chunks of CHUNK characters, cut before a space. Tokenizers split there
anyway.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitdistill.documents import Source

Tokens = NDArray[np.int32]
State = dict[str, Any]

SNAPSHOT = 256
CHUNK = 1 << 14
MAX_EMPTY_ROUNDS = 10_000


class Chunk(NamedTuple):
    """A part of a document."""

    text: str
    first: bool
    last: bool


Encode = Callable[[list[Chunk]], list[Tokens]]


def split_document(text: str) -> list[Chunk]:
    """A document in chunks of at most CHUNK characters, each but the first beginning with a space.

    Where there is no space for so long, as in Chinese, the cut is anywhere.
    """
    cuts = [0]
    while len(text) - cuts[-1] > CHUNK:
        space = text.rfind(" ", cuts[-1] + 1, cuts[-1] + CHUNK)
        cuts.append(space if space > 0 else cuts[-1] + CHUNK)
    ends = [*cuts[1:], len(text)]
    return [Chunk(text[a:b], a == 0, b == len(text)) for a, b in zip(cuts, ends, strict=True)]


class Encoder:
    """Chunks to token ids, the end-of-text token behind a document's last; without transformers."""

    def __init__(self, tokenizer: str, end: int | None) -> None:
        """`tokenizer` is the content of a tokenizer.json."""
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._end = [] if end is None else [end]

    def __call__(self, chunks: list[Chunk]) -> list[Tokens]:
        ids: dict[int, list[int]] = {}
        for first in (True, False):  # a token that begins a text begins no other chunk
            chosen = [i for i, chunk in enumerate(chunks) if chunk.first == first]
            texts = [chunks[i].text for i in chosen]
            encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=first)
            ids |= {i: e.ids for i, e in zip(chosen, encoded, strict=True)}
        ends = [self._end if chunk.last else [] for chunk in chunks]
        return [np.array(ids[i] + end, dtype=np.int32) for i, end in enumerate(ends)]


class Dealer:
    """Reads sources in turn and deals their documents to `rows` of `total`."""

    def __init__(self, sources: list[Source], rows: Sequence[int], total: int) -> None:
        self.sources = sources
        self._hands: dict[int, deque[tuple[int, str]]] = {row: deque() for row in rows}
        start = {"document": 0, "loads": [0] * total, "sources": [s.state() for s in sources]}
        self.restore(start, dict.fromkeys(rows, 0))

    def restore(self, state: State, wanted: dict[int, int]) -> None:
        """Go on at a noted position; each row takes only documents from its `wanted` one on."""
        self._document, self._wanted = state["document"], wanted
        self._loads = sorted((load, row) for row, load in enumerate(state["loads"]))  # a heap
        self._snapshots: deque[State] = deque([state])
        for source, position in zip(self.sources, state["sources"], strict=True):
            source.restore(position)
        for hand in self._hands.values():
            hand.clear()

    def take(self, row: int) -> tuple[int, str]:
        """The next document of a row, with its number among all."""
        while not self._hands[row]:
            self._deal()
        return self._hands[row].popleft()

    def _deal(self) -> None:
        number = self._document
        if number % SNAPSHOT == 0:
            self._snapshots.append(self._note())
        text = self.sources[number % len(self.sources)].next()
        load, row = self._loads[0]
        heapq.heapreplace(self._loads, (load + len(text) + 1, row))
        if number >= self._wanted.get(row, number + 1):
            self._hands[row].append((number, text))
        self._document += 1

    def _note(self) -> State:
        loads = [load for _, load in sorted((row, load) for load, row in self._loads)]
        sources = [source.state() for source in self.sources]
        return {"document": self._document, "loads": loads, "sources": sources}

    def snapshot(self, number: int) -> State:
        """The last noted position at or before a document; earlier ones are forgotten."""
        while len(self._snapshots) > 1 and self._snapshots[1]["document"] <= number:
            self._snapshots.popleft()
        return self._snapshots[0]


class _Held(NamedTuple):
    """Tokens of a chunk, the first `offset` of them used."""

    document: int
    chunk: int
    offset: int
    tokens: Tokens


@dataclass
class _Row:
    """The tokens that a row holds and has not used, and what comes next.

    That is a chunk of the first document dealt to this row whose number is at least `document`.
    """

    number: int
    document: int = 0
    chunk: int = 0
    skip: int = 0  # tokens of the next chunk that were used before the run was resumed
    count: int = 0
    held: deque[_Held] = field(default_factory=deque)
    pending: deque[Chunk] = field(default_factory=deque)

    @property
    def place(self) -> tuple[int, int, int]:
        """Document, chunk and offset of the token that comes next."""
        return self.held[0][:3] if self.held else (self.document, self.chunk, self.skip)

    def next_chunk(self, dealer: Dealer) -> Chunk:
        """The next chunk to tokenise."""
        if not self.pending:
            self.document, text = dealer.take(self.number)
            self.pending.extend(split_document(text)[self.chunk :])
        return self.pending.popleft()

    def add(self, tokens: Tokens) -> None:
        """Hold the tokens of that chunk."""
        if len(tokens) > self.skip:
            self.held.append(_Held(self.document, self.chunk, self.skip, tokens))
            self.count += len(tokens) - self.skip
        self.skip, self.chunk = 0, self.chunk + 1
        if not self.pending:
            self.document, self.chunk = self.document + 1, 0

    def cut(self, length: int) -> tuple[list[Tokens], list[int]]:
        """The next `length` tokens in pieces, and how many of them each document has."""
        pieces: list[Tokens] = []
        lengths: dict[int, int] = {}
        self.count -= length
        while length > 0:
            document, chunk, offset, tokens = self.held.popleft()
            pieces.append(tokens[offset : offset + length])
            taken = len(pieces[-1])
            length -= taken
            lengths[document] = lengths.get(document, 0) + taken
            if offset + taken < len(tokens):
                self.held.appendleft(_Held(document, chunk, offset + taken, tokens))
        return pieces, list(lengths.values())


@dataclass(frozen=True)
class Sequences:
    """One sequence for each of a few rows: ids (rows, length), and the tokens of each document."""

    ids: Tokens
    pieces: list[list[int]]


class Packer:
    """The sequences of some rows of the global batch, step by step."""

    def __init__(
        self,
        sources: list[Source],
        encode: Encode,
        rows: Iterable[int],
        total: int,
        length: int,
    ) -> None:
        self.encode, self.length = encode, length
        self._rows = {row: _Row(row) for row in rows}
        self._dealer = Dealer(sources, list(self._rows), total)

    def next(self) -> Sequences:
        """The sequences of the next step."""
        self._fill()
        cut = [row.cut(self.length) for row in self._rows.values()]
        ids = np.stack([np.concatenate(pieces) for pieces, _ in cut])
        return Sequences(ids, [lengths for _, lengths in cut])

    def _fill(self) -> None:
        """Tokenise until every row holds a sequence; those in need at once, as a batch."""
        empty = 0
        while short := [row for row in self._rows.values() if row.count < self.length]:
            encoded = self.encode([row.next_chunk(self._dealer) for row in short])
            empty = 0 if any(map(len, encoded)) else empty + 1
            if empty == MAX_EMPTY_ROUNDS:
                raise ValueError("the pre-training corpus holds no text; check corpus.sources")
            for row, tokens in zip(short, encoded, strict=True):
                row.add(tokens)

    def state(self) -> State:
        """The rows' places, and a position of the sources from which all of them can be reached."""
        places = {str(row.number): list(row.place) for row in self._rows.values()}
        return {"rows": places, "reader": self._dealer.snapshot(min(self._wanted().values()))}

    def _wanted(self) -> dict[int, int]:
        """The number from which on each row needs documents."""
        return {row.number: row.place[0] for row in self._rows.values()}

    def restore(self, state: State) -> None:
        """Return to a state, of these rows or of more; ValueError where one of them is missing."""
        for number in self._rows:
            if str(number) not in state["rows"]:
                raise ValueError(
                    f"the saved position has no row {number}; continue with the batch size, "
                    "accumulation and devices it was saved with"
                )
            self._rows[number] = _Row(number, *state["rows"][str(number)])
        self._dealer.restore(state["reader"], self._wanted())

    def close(self) -> None:
        """Nothing to let go of: files are closed with their readers."""


def merge_states(states: Sequence[State]) -> State:
    """One state of all rows, from those of the processes or devices that share them."""
    rows = {row: place for state in states for row, place in state["rows"].items()}
    ordered = dict(sorted(rows.items(), key=lambda item: int(item[0])))
    reader = min((state["reader"] for state in states), key=lambda r: r["document"])
    return {"rows": ordered, "reader": reader}
