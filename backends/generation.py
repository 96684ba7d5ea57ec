"""Generating for many prompts at once: greedy, or beam search; the same for every backend.

Works on three operations of a Runtime: `start_rows` feeds prompts, `step_rows` one token to each
row, `select_rows` drops, repeats and reorders rows. NumPy only.

Shapes: R rows, V vocabulary, K beams.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bitdistill.backends.sampling import checked_max
from bitdistill.backends.search import Search

if TYPE_CHECKING:
    from bitdistill.backends.base import Runtime

Logits = NDArray[np.float32]
MAX_PROMPT_TOKENS = 4096  # of one batch, padding included: attention holds a square per row


def generate_batch(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    search: Search,
    stop: Collection[int] | None = None,
    batch_size: int = 16,
    ends: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[int]]:
    """New tokens for each prompt, in order, without the stop token that ended them.

    Prompts are batched by length. Generation ends at one of `stop` (None: the model's own), after
    `search.max_new_tokens`, when the context is full, or (greedy alone) when `ends` says so of the
    new tokens. ValueError as in `Runtime.generate`, and for logits that hold NaN.
    """
    for prompt in prompts:
        runtime.check_tokens(prompt)
    stops = sorted(runtime.stop_tokens if stop is None else stop)
    texts: list[list[int]] = [[] for _ in prompts]
    if search.max_new_tokens == 0:
        return texts
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    while order:
        size = min(batch_size, MAX_PROMPT_TOKENS // len(prompts[order[0]]))
        chunk, order = order[: max(1, size)], order[max(1, size) :]
        chosen = [prompts[i] for i in chunk]
        if search.beams == 1:
            found = _greedy(runtime, chosen, search, stops, ends or (lambda tokens: False))
        else:
            found = _beams(runtime, chosen, search, stops)
        for i, text in zip(chunk, found, strict=True):
            texts[i] = text
    return texts


def _start(runtime: Runtime, prompts: Sequence[Sequence[int]], search: Search) -> tuple[Any, ...]:
    """Logits of each prompt's last token, the cache, and how many tokens each may get."""
    limits = [min(search.max_new_tokens, runtime.context - len(p) + 1) for p in prompts]
    logits, rows = runtime.start_rows(prompts, max(limits) - 1)
    return logits, rows, limits


def _greedy(
    runtime: Runtime,
    prompts: Sequence[Sequence[int]],
    search: Search,
    stops: list[int],
    ends: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    logits, rows, limits = _start(runtime, prompts, search)
    texts: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # the prompt that each row belongs to
    while True:
        checked_max(logits)
        if len(texts[active[0]]) < search.min_new_tokens:
            logits[:, stops] = -np.inf
        tokens = logits.argmax(-1)
        keep = []
        for row, i in enumerate(active):
            if int(tokens[row]) not in stops:
                texts[i].append(int(tokens[row]))
                if len(texts[i]) < limits[i] and not ends(texts[i]):
                    keep.append(row)
        if not keep:
            return texts
        if len(keep) < len(active):
            rows = runtime.select_rows(rows, keep)
            active = [active[row] for row in keep]
        logits = runtime.step_rows(tokens[keep].tolist(), rows)


@dataclass
class _Beams:
    """The search for one prompt: texts that go on with their scores, and those that ended."""

    limit: int
    texts: list[list[int]]
    scores: NDArray[np.float64]
    ended: list[tuple[float, list[int]]]

    def advance(self, logits_KV: Logits, search: Search, stops: list[int]) -> list[int]:
        """Extend each text by a token; returns the beam that every new text came from."""
        totals_KV = self.scores[:, None] + _log_softmax(logits_KV)
        if len(self.texts[0]) < search.min_new_tokens:
            totals_KV[:, stops] = -np.inf
        vocabulary = totals_KV.shape[1]
        # enough that `beams` of them go on, whatever else ends
        count = min((1 + len(stops)) * search.beams, totals_KV.size)
        flat = totals_KV.ravel()
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.argsort(-flat[best], kind="stable")]
        length = len(self.texts[0]) + 1
        parents: list[int] = []
        texts, scores = [], []
        for rank, place in enumerate(best.tolist()):
            parent, token = divmod(place, vocabulary)
            if token in stops:
                if rank < search.beams:
                    self._end(self.texts[parent], flat[place], length, search)
            elif len(parents) < search.beams:
                parents.append(parent)
                texts.append([*self.texts[parent], token])
                scores.append(flat[place])
        self.texts, self.scores = texts, np.array(scores)
        return parents

    def _end(self, text: list[int], score: float, length: int, search: Search) -> None:
        self.ended.append((float(score) / length**search.length_penalty, text))
        self.ended = sorted(self.ended, key=lambda item: -item[0])[: search.beams]

    def finished(self, search: Search) -> bool:
        """Whether the limit is reached, or no text that goes on can still win by its score now."""
        length = len(self.texts[0])
        if length >= self.limit:
            for text, score in zip(self.texts, self.scores, strict=True):
                self._end(text, score, length, search)
            return True
        if len(self.ended) < search.beams:
            return False
        return bool(self.scores[0] / length**search.length_penalty <= self.ended[-1][0])


def _beams(
    runtime: Runtime, prompts: Sequence[Sequence[int]], search: Search, stops: list[int]
) -> list[list[int]]:
    logits, rows, limits = _start(runtime, prompts, search)
    searches = [_Beams(limit, [[]], np.zeros(1), []) for limit in limits]
    active = [(state, row, 1) for row, state in enumerate(searches)]  # search, first row, rows
    while True:
        checked_max(logits)
        keep: list[int] = []
        tokens: list[int] = []
        following: list[tuple[_Beams, int, int]] = []
        for state, first, count in active:
            parents = state.advance(logits[first : first + count], search, stops)
            if not state.finished(search):
                following.append((state, len(keep), len(parents)))
                keep += [first + parent for parent in parents]
                tokens += [text[-1] for text in state.texts]
        if not following:
            return [state.ended[0][1] for state in searches]
        active = following
        rows = runtime.select_rows(rows, keep)
        logits = runtime.step_rows(tokens, rows)


def _log_softmax(logits_RV: Logits) -> NDArray[np.float64]:
    wide = logits_RV.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
