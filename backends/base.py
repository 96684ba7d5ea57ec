"""The protocol every backend implements, and what is the same for all of them.

A backend gives three primitives: `new_cache` and `step` (one sequence, token by token) and
`logits_at` (a right-padded batch, no cache, the LM head only where it is asked for). Scoring,
generation and whole-sequence logits are built on these here, once, so that every backend is
measured and used the same way. NumPy only.

Shapes: B sequences, T tokens, V vocabulary, P asked positions.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.sampling import Sampler

if TYPE_CHECKING:
    from bitdistill.backends.tokenizer import Tokenizer

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Request = tuple[Sequence[int], Sequence[int]]
Forward = tuple[tuple[int, ...], int]  # the tokens fed, the first position whose logits are needed

MAX_LOGITS = 1 << 26  # elements of logits asked for at once: 256 MiB


class Cache(Protocol):
    """Keys and values of one sequence: `length` tokens are held, `capacity` fit."""

    length: int
    capacity: int


class Runtime(ABC):
    """A loaded model. `context` is the most tokens a sequence may have, `vocabulary` is V.

    `prefill_chunk` is how many tokens of a prompt are fed at once, `caveat` says what this
    installation computes otherwise than the artifact asks for. A subclass sets the attributes
    below in `__init__(path, manifest, *, threads=None, ...)`.
    """

    name: str
    path: Path
    manifest: dict[str, Any]
    vocabulary: int
    context: int
    stop_tokens: list[int]
    prefill_chunk = 256
    caveat: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The directory's tokenizer; read on first use, so that ids alone need no tokenizer."""
        from bitdistill.backends.tokenizer import Tokenizer

        return Tokenizer(self.path)

    @abstractmethod
    def new_cache(self, capacity: int) -> Any:
        """An empty cache for one sequence of up to `capacity` tokens (at most `context`)."""

    @abstractmethod
    def step(self, tokens: Sequence[int], cache: Any) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last. The cache advances."""

    @abstractmethod
    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """Logits float32 (P, V) at `rows` int64 (P, 2) of (b, t); no cache, right padding.

        tokens_BT int64 (B, T) holds sequence b in its first lengths_B[b] places.
        """

    def tables(self) -> dict[str, Floats]:
        """Embedding and untied head, by tensor name, where fewer than 16 bits store them."""
        return {}

    def check_tokens(self, tokens: Sequence[int], room: int | None = None) -> None:
        """ValueError unless there is at least one token, all are in V, and they fit `room`."""
        if len(tokens) == 0:
            raise ValueError("no tokens were given; a sequence needs at least one")
        if min(tokens) < 0 or max(tokens) >= self.vocabulary:
            raise ValueError(
                f"a token id is outside the vocabulary of {self.vocabulary}; encode the text with "
                "this model's own tokenizer"
            )
        room = self.context if room is None else room
        if len(tokens) > room:
            raise ValueError(
                f"{len(tokens)} tokens do not fit, there is room for {room} (context "
                f"{self.context}); shorten the text, or export with a larger context"
            )

    def check_capacity(self, capacity: int) -> None:
        """ValueError unless a cache of `capacity` tokens is within the context."""
        if not 0 < capacity <= self.context:
            raise ValueError(f"cache capacity {capacity} is not between 1 and {self.context}")

    def logits(self, tokens: Sequence[Sequence[int]]) -> list[Floats]:
        """Logits float32 (T, V) of every position of each sequence, in one padded batch."""
        if len(tokens) == 0:
            return []
        lengths = [len(sequence) for sequence in tokens]
        rows = [(b, t) for b, length in enumerate(lengths) for t in range(length)]
        logits = self._padded(tokens, rows)
        return np.split(logits, np.cumsum(lengths)[:-1])

    def _padded(self, tokens: Sequence[Sequence[int]], rows: list[tuple[int, int]]) -> Floats:
        """`logits_at` of sequences of different lengths, checked and padded with token 0."""
        for sequence in tokens:
            self.check_tokens(sequence)
        lengths_B = np.array([len(sequence) for sequence in tokens], np.int64)
        return self.logits_at(pad(tokens), lengths_B, np.array(rows, np.int64).reshape(-1, 2))

    def score(self, requests: Sequence[Request], batch_size: int = 16) -> list[float]:
        """Sum of log-probabilities (natural) of each continuation given its prompt, in order.

        Requests are (prompt ids, continuation ids). Those that differ only in their last token, as
        the one-token answers of a label task do, share one forward. Batches are sorted by length.
        Raises ValueError for an empty prompt or continuation, or more tokens than the context.
        """
        return [score for score, _ in self.likelihoods(requests, batch_size)]

    def likelihoods(
        self, requests: Sequence[Request], batch_size: int = 16
    ) -> list[tuple[float, bool]]:
        """As `score`, and whether greedy decoding would say that continuation."""
        groups = self._forwards(requests)
        scores, greedy = [0.0] * len(requests), [True] * len(requests)
        for batch in self._batches(sorted(groups, key=lambda key: len(key[0])), batch_size):
            rows = [(b, t) for b, (fed, start) in enumerate(batch) for t in range(start, len(fed))]
            logits_PV = self._padded([fed for fed, _ in batch], rows)
            for (b, t), row in zip(rows, logits_PV, strict=True):
                total, top = log_sum(row), int(row.argmax())
                for index in groups[batch[b]]:
                    token = requests[index][1][t - batch[b][1]]
                    scores[index] += float(row[token]) - total
                    greedy[index] &= token == top
        return list(zip(scores, greedy, strict=True))

    def _forwards(self, requests: Sequence[Request]) -> dict[Forward, list[int]]:
        """The different forwards that requests need, each with the indices of its requests."""
        forwards: dict[Forward, list[int]] = {}
        for index, (prompt, continuation) in enumerate(requests):
            if not len(prompt) or not len(continuation):
                raise ValueError(f"request {index} has an empty prompt or continuation")
            self.check_tokens(continuation)
            key = ((*prompt, *continuation[:-1]), len(prompt) - 1)
            forwards.setdefault(key, []).append(index)
        return forwards

    def _batches(self, keys: list[Forward], batch_size: int) -> Iterator[list[Forward]]:
        """Cut sorted forwards into batches, none asking for more than MAX_LOGITS elements."""
        batch: list[Forward] = []
        asked = 0
        for fed, start in keys:
            more = (len(fed) - start) * self.vocabulary
            if batch and (len(batch) >= batch_size or asked + more > MAX_LOGITS):
                yield batch
                batch, asked = [], 0
            batch.append((fed, start))
            asked += more
        if batch:
            yield batch

    def generate(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
        stop: Collection[int] | None = None,
    ) -> Iterator[int]:
        """Generate token ids one by one; greedy unless `temperature` is above 0.

        Ends before the first of the `stop` tokens (None: the model's own; `()`: none), after
        `max_new_tokens`, or when the context is full, which is logged as a warning. Arguments are
        checked at the call: ValueError for an empty prompt or one longer than the context.
        """
        self.check_tokens(prompt)
        sampler = Sampler(temperature, top_p, top_k, seed)
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must be 0 or more, got {max_new_tokens}")
        stop = frozenset(self.stop_tokens if stop is None else stop)
        return self._generate(list(prompt), max_new_tokens, sampler, stop)

    def _generate(
        self, prompt: list[int], limit: int, sampler: Sampler, stop: frozenset[int]
    ) -> Iterator[int]:
        if limit == 0:
            return
        # The last generated token is never fed back, so it needs no room.
        count = min(limit, self.context - len(prompt) + 1)
        cache = self.new_cache(len(prompt) + count - 1)
        logits = self.prefill(prompt, cache)
        for index in range(count):
            token = sampler(logits)
            if token in stop:
                return
            yield token
            if index + 1 < count:
                logits = self.step([token], cache)
        if count < limit:
            import logging

            logging.getLogger(__name__).warning(
                "generation stopped: the context of %d tokens is full; export with a larger "
                "context, or shorten the prompt",
                self.context,
            )

    def start_rows(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Floats, Any]:
        """Feed R prompts, with room for `room` more tokens each: float32 (R, V), and their cache.

        This and the two below are what generation.py decodes many sequences with. A backend that
        can batch overrides them; here each row is a sequence on its own.
        """
        capacities = [min(len(prompt) + room, self.context) for prompt in prompts]
        caches = [self.new_cache(capacity) for capacity in capacities]
        fed = [self.prefill(p, cache) for p, cache in zip(prompts, caches, strict=True)]
        return np.stack(fed), caches

    def step_rows(self, tokens: Sequence[int], rows: Any) -> Floats:
        """Feed one token to each row; float32 (R, V)."""
        return np.stack([self.step([t], cache) for t, cache in zip(tokens, rows, strict=True)])

    def select_rows(self, rows: Any, keep: Sequence[int]) -> Any:
        """A cache whose row i is row keep[i] of `rows`, which is not to be used any more."""
        first = {row: place for place, row in reversed(list(enumerate(keep)))}
        return [rows[r] if first[r] == i else copy.deepcopy(rows[r]) for i, r in enumerate(keep)]

    def prefill(self, prompt: Sequence[int], cache: Any) -> Floats:
        """Feed a prompt in chunks, which bounds memory; float32 (V,) logits of its last token."""
        for start in range(0, len(prompt), self.prefill_chunk):
            logits = self.step(prompt[start : start + self.prefill_chunk], cache)
        return logits


def pad(sequences: Sequence[Sequence[int]]) -> Integers:
    """int64 (B, T): sequence b in the first places of row b, then token 0."""
    tokens_BT = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, sequence in zip(tokens_BT, sequences, strict=True):
        row[: len(sequence)] = sequence
    return tokens_BT


def log_sum(logits_V: Floats) -> float:
    """log of the sum of exponentials, in fp64: fp32 loses digits over a large vocabulary."""
    top = logits_V.max()
    wide = np.subtract(logits_V, top, dtype=np.float64)
    return float(top) + float(np.log(np.exp(wide, out=wide).sum()))
