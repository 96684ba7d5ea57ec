"""Documents to full sequences of tokens, the same for any number of processes and devices.

Documents are dealt like cards: the j-th goes to row j mod R of the global batch of R sequences, and
every row joins its own documents by the end-of-text token and cuts them into sequences. A row needs
nothing from another row, so rows can be spread over worker processes and devices at will: the
sequences of a step depend on R alone. Everybody reads all documents, which is cheap, and tokenises
only those of their own rows, which is not.

A row's position is a document and an offset into its tokens; that is all that a resumed run needs.
So that it need not read from the start, the sources' positions are noted every SNAPSHOT documents.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from bitdistill.readers import Source

Tokens = NDArray[np.int32]
Encode = Callable[[list[str]], list[Tokens]]
State = dict[str, Any]

SNAPSHOT = 256
MAX_EMPTY_ROUNDS = 10_000


class Encoder:
    """Texts to token ids with the end-of-text token behind each; without torch or transformers."""

    def __init__(self, tokenizer: str, end: int | None) -> None:
        """`tokenizer` is the content of a tokenizer.json."""
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._end = [] if end is None else [end]

    def __call__(self, texts: list[str]) -> list[Tokens]:
        encoded = self.tokenizer.encode_batch_fast(texts)
        return [np.array(e.ids + self._end, dtype=np.int32) for e in encoded]


class Dealer:
    """Reads sources in turn and deals their documents to `rows` of `total`."""

    def __init__(self, sources: list[Source], rows: Sequence[int], total: int) -> None:
        self.sources, self.total = sources, total
        self._hands: dict[int, deque[str]] = {row: deque() for row in rows}
        self.restore(0, [source.state() for source in sources], dict.fromkeys(rows, 0))

    def restore(self, document: int, sources: list[Any], wanted: dict[int, int]) -> None:
        """Go on at a document; each row takes only those from its `wanted` one on."""
        self._document, self._wanted = document, wanted
        self._snapshots: deque[tuple[int, list[Any]]] = deque([(document, sources)])
        for source, state in zip(self.sources, sources, strict=True):
            source.restore(state)
        for hand in self._hands.values():
            hand.clear()

    def take(self, row: int) -> str:
        """The next document of a row; ValueError for a source without any."""
        while not self._hands[row]:
            self._deal()
        return self._hands[row].popleft()

    def _deal(self) -> None:
        number, row = self._document, self._document % self.total
        if number % SNAPSHOT == 0:
            self._snapshots.append((number, [source.state() for source in self.sources]))
        source = self.sources[number % len(self.sources)]
        raw = source.next()
        if number >= self._wanted.get(row, number + 1):
            self._hands[row].append(source.text(raw))
        self._document += 1

    def snapshot(self, number: int) -> tuple[int, list[Any]]:
        """The last noted position at or before a document; earlier ones are forgotten."""
        while len(self._snapshots) > 1 and self._snapshots[1][0] <= number:
            self._snapshots.popleft()
        return self._snapshots[0]


@dataclass
class _Row:
    """The tokens a row holds but has not used, document by document."""

    number: int  # of the row
    taken: int = 0  # documents of this row that were tokenised
    skip: int = 0  # tokens of the next one that were used before the run was resumed
    held: int = 0
    documents: deque[tuple[int, int, Tokens]] = field(default_factory=deque)

    @property
    def place(self) -> tuple[int, int]:
        """The document of this row, and the offset in it, that come next."""
        if self.documents:
            return self.documents[0][:2]
        return self.taken, self.skip

    def add(self, tokens: Tokens) -> None:
        skip, self.skip = self.skip, 0
        if len(tokens) > skip:
            self.documents.append((self.taken, skip, tokens))
            self.held += len(tokens) - skip
        self.taken += 1

    def cut(self, length: int) -> list[Tokens]:
        """The next `length` tokens, a piece for each document."""
        pieces = []
        self.held -= length
        while length > 0:
            number, offset, tokens = self.documents.popleft()
            piece = tokens[offset : offset + length]
            pieces.append(piece)
            length -= len(piece)
            if offset + len(piece) < len(tokens):
                self.documents.appendleft((number, offset + len(piece), tokens))
        return pieces


@dataclass(frozen=True)
class Sequences:
    """One sequence for each of a few rows: ids (rows, length), and the lengths of the pieces."""

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
        self.encode, self.total, self.length = encode, total, length
        self._rows = {row: _Row(row) for row in rows}
        self._dealer = Dealer(sources, list(self._rows), total)

    def next(self) -> Sequences:
        """The sequences of the next step."""
        self._fill()
        cut = [row.cut(self.length) for row in self._rows.values()]
        ids = np.stack([np.concatenate(pieces) for pieces in cut])
        return Sequences(ids, [[len(piece) for piece in pieces] for pieces in cut])

    def _fill(self) -> None:
        """Tokenise until every row holds a sequence; those in need at once, as a batch."""
        empty = 0
        while short := [row for row in self._rows.values() if row.held < self.length]:
            encoded = self.encode([self._dealer.take(row.number) for row in short])
            empty = 0 if any(map(len, encoded)) else empty + 1
            if empty == MAX_EMPTY_ROUNDS:
                raise ValueError("the pre-training corpus holds no text; check corpus.sources")
            for row, tokens in zip(short, encoded, strict=True):
                row.add(tokens)

    def state(self) -> State:
        """The rows' places, and a position of the sources from which all of them can be reached."""
        places = {str(row.number): list(row.place) for row in self._rows.values()}
        reader = self._dealer.snapshot(min(self._wanted().values()))
        return {"rows": places, "reader": list(reader)}

    def _wanted(self) -> dict[int, int]:
        """The number, in the dealt order, of each row's next document."""
        return {r.number: r.place[0] * self.total + r.number for r in self._rows.values()}

    def restore(self, state: State) -> None:
        """Return to a state, of these rows or of more; ValueError where one of them is missing."""
        for number in self._rows:
            if str(number) not in state["rows"]:
                raise ValueError(
                    f"the saved position has no row {number}; continue with the batch size, "
                    "accumulation and devices it was saved with"
                )
            taken, skip = state["rows"][str(number)]
            self._rows[number] = _Row(number, taken, skip)
        document, sources = state["reader"]
        self._dealer.restore(document, sources, self._wanted())

    def close(self) -> None:
        """Nothing to let go of: files are closed with their readers."""


def merge_states(states: Sequence[State]) -> State:
    """One state of all rows, from those of the processes or devices that share them."""
    rows = {row: place for state in states for row, place in state["rows"].items()}
    ordered = dict(sorted(rows.items(), key=lambda item: int(item[0])))
    return {"rows": ordered, "reader": min((s["reader"] for s in states), key=lambda r: r[0])}
