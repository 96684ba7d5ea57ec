"""What is fed to a model for parity.py, and what is read of it: logits of last positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTHS = (8, 16, 32, 64, 128)
SEQUENCES = 10
PROMPTS = 16
PROMPT_TOKENS = 128
KEPT = 32  # positions compared per sequence, its last ones: logits of 150,000 words are large
Logits = list[NDArray[np.float32]]


def make_sequences(runtime: Any, prompts: Sequence[str], seed: int) -> list[list[int]]:
    """Random token ids of several lengths within the context, then the ends of the prompts."""
    random = np.random.default_rng(seed)
    lengths = [min(LENGTHS[i % len(LENGTHS)], runtime.context) for i in range(SEQUENCES)]
    drawn = [random.integers(0, runtime.vocabulary, length).tolist() for length in lengths]
    room = min(PROMPT_TOKENS, runtime.context)
    prompts = list(prompts)[:PROMPTS]
    encoded = [runtime.tokenizer.encode(prompt, special=True)[-room:] for prompt in prompts]
    return drawn + [ids for ids in encoded if ids]


def last_logits(
    runtime: Any, sequences: Sequence[Sequence[int]], labels: list[int] | None = None
) -> Logits:
    """Logits (P, V or labels) of each sequence's last KEPT positions, in one padded batch."""
    lengths = np.array([len(sequence) for sequence in sequences], np.int64)
    tokens = np.zeros((len(sequences), lengths.max()), np.int64)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    kept = [range(max(0, end - KEPT), end) for end in lengths.tolist()]
    rows = np.array([(b, t) for b, positions in enumerate(kept) for t in positions], np.int64)
    logits = _of_labels(runtime.logits_at(tokens, lengths, rows), labels)
    return np.split(logits, np.cumsum([len(positions) for positions in kept])[:-1])


def by_length(runtime: Any, sequences: Sequence[Sequence[int]], labels: list[int] | None) -> Logits:
    """The same, sequences of one length at a time: the reference reads no padding."""
    logits: dict[int, NDArray[np.float32]] = {}
    for length in {len(sequence) for sequence in sequences}:
        places = [i for i, sequence in enumerate(sequences) if len(sequence) == length]
        alike = last_logits(runtime, [sequences[i] for i in places], labels)
        logits |= dict(zip(places, alike, strict=True))
    return [logits[i] for i in range(len(sequences))]


def _of_labels(logits: NDArray[np.float32], labels: list[int] | None) -> NDArray[np.float32]:
    return logits if labels is None else logits[:, labels]


def decoded(
    runtime: Any, sequences: Sequence[Sequence[int]], labels: list[int] | None = None
) -> Logits:
    """The same logits by feeding the last tokens one by one, after the others at once."""
    logits = []
    for sequence in sequences:
        first = max(1, len(sequence) - KEPT + 1)
        cache = runtime.new_cache(len(sequence))
        rows = [runtime.step(sequence[:first], cache)]
        rows += [runtime.step([token], cache) for token in sequence[first:]]
        logits.append(_of_labels(np.stack(rows), labels))
    return logits
