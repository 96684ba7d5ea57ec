"""Runs ONNX artifacts on the CPU, with the custom-op library of this installation.

Decoding binds the past and the present of the cache to the same memory, so a step writes one row
and copies nothing. Needs onnxruntime, numpy and tokenizers; neither torch nor transformers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bitdistill.backends import kv_cache, onnx_probe
from bitdistill.backends.base import Floats, Forward, Integers, Runtime, pad
from bitdistill.backends.onnx_session import InstallationError, open_session
from bitdistill.decoder import DecoderSpec
from bitdistill.manifest import FormatError

if TYPE_CHECKING:
    from bitdistill.backends.embedding_file import EmbeddingFile

MODEL = "model.onnx"
CUSTOM = "custom"  # the manifest's `ops` of an artifact that needs our library
WINDOW_NEEDS = (1, 24)  # earlier versions let a token see one key more than the window
# Tokens of a prompt at once. Fewer take less memory, for artifacts made for the least of it
# (docs/LOG.md has the speeds).
CHUNK, SMALL_CHUNK = 128, 64
FORWARD_TOKENS = 256  # of a batch at once, which bounds the activations in memory


class OnnxCache:
    """Keys and values of R sequences, in the memory that the session reads and writes.

    For each layer's key and value an array as kv_cache.py says. `lengths` are the tokens that each
    row holds. `memory`: contents to start with, instead of nothing.
    """

    def __init__(
        self,
        runtime: OnnxRuntime,
        capacity: int,
        rows: int = 1,
        memory: Sequence[NDArray[Any]] | None = None,
    ) -> None:
        self.lengths, self.capacity = np.zeros(rows, np.int64), capacity
        self.runtime, spec = runtime, runtime.spec
        self.binding = runtime.session.io_binding()
        self._inputs: dict[str, NDArray[Any]] = {}  # bound, the cache excepted
        names = [f"{i}.{part}" for i in range(len(spec.layers)) for part in ("key", "value")]
        self.memory = runtime.empty(rows, capacity) if memory is None else memory
        for name, array in zip(names, self.memory, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(array)  # the same memory
            self.binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            self.binding.bind_ortvalue_output(f"present.{name}", value)

    @property
    def length(self) -> int:
        """The most tokens that a row holds."""
        return int(self.lengths.max())

    def feed(self, tokens_RT: Integers, counts_R: Integers, head: bool = True) -> Floats:
        """Feed counts_R[r] tokens to row r, padded on the right; float32 (R, V) of the last.

        Without `head` no logits are made, and the result is (0, V).
        """
        rows, width = tokens_RT.shape
        asked = (np.arange(rows) * width + counts_R - 1)[: rows if head else 0]
        for name, value in self.runtime.inputs(tokens_RT, self.lengths + counts_R, asked).items():
            self._give(name, value)
        # The caller's own memory, so that nothing is copied; the binding keeps an address, which it
        # does not use again.
        logits = np.empty((len(asked), self.runtime.words), np.float32)
        place = (np.float32, logits.shape, logits.ctypes.data)
        self.binding.bind_output("logits", "cpu", 0, *place)
        self.runtime.session.run_with_iobinding(self.binding)
        self.lengths = self.lengths + counts_R
        return self.runtime.all_words(logits)

    def _give(self, name: str, value: NDArray[Any]) -> None:
        """Bind an input, or write to where one of its shape is bound: faster, step after step."""
        bound = self._inputs.get(name)
        if bound is not None and bound.shape == value.shape:
            bound[...] = value
            return
        bound = self._inputs[name] = value.copy()
        self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(bound))

    def part(self, rows: slice) -> OnnxCache:
        """Some rows of this one, which holds nothing yet, in the same memory."""
        memory = [array[rows] for array in self.memory]
        return OnnxCache(self.runtime, self.capacity, len(memory[0]), memory)

    def select(self, keep: Sequence[int]) -> OnnxCache:
        """A cache whose row i is row keep[i] of this one."""
        memory = [array[list(keep)] for array in self.memory]
        chosen = OnnxCache(self.runtime, self.capacity, len(keep), memory)
        chosen.lengths = self.lengths[list(keep)]
        return chosen


class OnnxRuntime(Runtime):
    """An ONNX artifact, loaded. `threads` is the size of ONNX Runtime's pool (None: every core).

    With `warm` the first request is not slower than those after it: its work is done at loading.

    A classifier's head knows the label tokens alone (the other words' logits are minus infinity),
    and its embedding is read from its file row by row.

    Raises FormatError for a model file that is damaged, InstallationError for an installation
    that cannot run it; both say what to do. Warns of one that rounds less than the artifact says.
    """

    name = "onnx"
    prefill_chunk = CHUNK

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        threads: int | None = None,
        warm: bool = False,
    ) -> None:
        if absent := {"ops", "label_tokens", "kv_bits"} - manifest.keys():
            raise FormatError(
                f"{path} does not say its {' and '.join(sorted(absent))}: another version wrote "
                "it; export the student again"
            )
        self.path, self.manifest = path, manifest
        self.spec = DecoderSpec.from_json(manifest["decoder"])
        self.vocabulary, self.context = self.spec.vocabulary, int(manifest["context"])
        self.kv_bits: int = manifest["kv_bits"]
        self.stop_tokens = list(manifest["stop_tokens"])
        self.labels: list[int] | None = manifest["label_tokens"]
        if self.labels is not None or manifest.get("storage", {}).get("embedding") == "int4":
            self.prefill_chunk = SMALL_CHUNK
        self.words = self.vocabulary if self.labels is None else len(self.labels)
        self.embedding: EmbeddingFile | None = None
        if self.labels is not None:
            from bitdistill.backends.embedding_file import NAME, EmbeddingFile

            table = (self.vocabulary, self.spec.hidden, manifest["storage"]["embedding"])
            self.embedding = EmbeddingFile(path / NAME, *table)
        self._check_window()
        self.session = open_session(path / MODEL, threads, manifest["ops"] == CUSTOM)
        self.caveat = onnx_probe.caveat(manifest)
        if self.caveat:
            warnings.warn(self.caveat, stacklevel=3)  # of who called backends.load
        if warm:
            self.warm_up()

    def warm_up(self) -> None:
        """Run a chunk of a prompt and a step, which reads every weight and takes the memory."""
        count = min(self.prefill_chunk, max(1, self.context - 1))
        cache = self.new_cache(min(count + 1, self.context))
        self.step([0] * count, cache)
        if count < cache.capacity:
            self.step([0], cache)

    def _check_window(self) -> None:
        installed = tuple(int(part) for part in ort.__version__.split(".")[:2])
        windows = [layer.window for layer in self.spec.layers if layer.window is not None]
        if windows and min(windows) < self.context and installed < WINDOW_NEEDS:
            raise InstallationError(
                f"onnxruntime {ort.__version__} counts attention windows differently, and this "
                "model has them; run: pip install -U 'onnxruntime>=1.24'"
            )

    def empty(self, rows: int, positions: int) -> NDArray[Any]:
        """Keys and values of every layer that hold nothing yet: one array, without gaps."""
        shape = kv_cache.shape(self.spec, self.kv_bits, rows, positions)
        return np.zeros((2 * len(self.spec.layers), *shape), kv_cache.DTYPES[self.kv_bits])

    def new_cache(self, capacity: int) -> OnnxCache:
        """An empty cache for one sequence of up to `capacity` tokens."""
        self.check_capacity(capacity)
        return OnnxCache(self, capacity)

    def step(self, tokens: Sequence[int], cache: OnnxCache) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last."""
        self.check_tokens(tokens, cache.capacity - cache.length)
        return cache.feed(np.array([tokens], np.int64), np.array([len(tokens)]))[0]

    def prefill(self, prompt: Sequence[int], cache: OnnxCache) -> Floats:
        """Feed a prompt in chunks; the head is read once, for the last token."""
        self.check_tokens(prompt, cache.capacity - cache.length)
        *starts, last = range(0, len(prompt), self.prefill_chunk)
        for start in starts:
            chunk = np.array([prompt[start : start + self.prefill_chunk]], np.int64)
            cache.feed(chunk, np.array([self.prefill_chunk]), head=False)
        return self.step(prompt[last:], cache)

    def start_rows(self, prompts: Sequence[Sequence[int]], room: int) -> tuple[Floats, OnnxCache]:
        """Feed prompts, some rows or a chunk of one at a time: float32 (R, V), and their cache."""
        lengths_R = np.array([len(prompt) for prompt in prompts], np.int64)
        capacity = min(int(lengths_R.max()) + room, self.context)
        cache = OnnxCache(self, capacity, len(prompts))
        logits = []
        for rows in parts(lengths_R):
            part = cache.part(rows)
            if len(prompts[rows]) == 1:
                logits.append(self.prefill(prompts[rows.start], part)[None])
            else:
                logits.append(part.feed(pad(prompts[rows]), lengths_R[rows]))
        cache.lengths = lengths_R
        return np.concatenate(logits), cache

    def step_rows(self, tokens: Sequence[int], rows: OnnxCache) -> Floats:
        """Feed one token to each row; float32 (R, V)."""
        return rows.feed(np.array(tokens, np.int64)[:, None], np.ones(len(tokens), np.int64))

    def select_rows(self, rows: OnnxCache, keep: Sequence[int]) -> OnnxCache:
        """Rows dropped, repeated and reordered; what stays in place is not copied."""
        return rows if list(keep) == list(range(len(rows.lengths))) else rows.select(keep)

    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, V) at rows (b, t), without a cache; some sequences at a time."""
        logits = np.empty((len(rows), self.words), np.float32)
        for part in parts(lengths_B):
            asked = (part.start <= rows[:, 0]) & (rows[:, 0] < part.stop)
            if asked.any():
                tokens = tokens_BT[part, : lengths_B[part].max()]
                places = rows[asked] - [part.start, 0]
                logits[asked] = self._forward(tokens, lengths_B[part], places)
        return self.all_words(logits)

    def _forward(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, words of the head) at rows (b, t), of one forward."""
        binding = self.session.io_binding()
        flat = rows[:, 0] * tokens_BT.shape[1] + rows[:, 1]
        for name, value in self.inputs(tokens_BT, lengths_B, flat).items():
            binding.bind_cpu_input(name, value)
        # Layers run one after the other, and nobody reads their keys and values later: all write to
        # the same place, where each layer's own would take 15 MB for 128 tokens of a 0.6B model.
        count, dtype = tokens_BT.shape, kv_cache.DTYPES[self.kv_bits]
        nothing, *places = (
            np.empty(kv_cache.shape(self.spec, self.kv_bits, count[0], positions), dtype)
            for positions in (0, count[1], count[1])
        )
        for layer in range(len(self.spec.layers)):
            for part, place in zip(("key", "value"), places, strict=True):
                binding.bind_cpu_input(f"past_key_values.{layer}.{part}", nothing)
                address = (place.dtype, place.shape, place.ctypes.data)
                binding.bind_output(f"present.{layer}.{part}", "cpu", 0, *address)
        logits = np.empty((len(rows), self.words), np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        return logits

    def _batches(self, keys: list[Forward], batch_size: int) -> Iterator[list[Forward]]:
        """As Runtime's, of what one forward takes: logits of all words are held for each batch."""
        for batch in super()._batches(keys, batch_size):
            for part in parts([len(fed) for fed, _ in batch]):
                yield batch[part]

    def inputs(
        self, tokens_BT: Integers, lengths_B: NDArray[np.integer], rows_P: NDArray[np.integer]
    ) -> dict[str, NDArray[Any]]:
        """The graph's inputs, the cache excepted; lengths include what the cache holds."""
        inputs: dict[str, NDArray[Any]] = {
            "seqlens_k": (lengths_B - 1).astype(np.int32),
            "total_sequence_length": np.array(lengths_B.max(), np.int32),
            "logit_rows": np.ascontiguousarray(rows_P, np.int64),
        }
        if self.embedding is not None:
            return inputs | {"embeddings": self.embedding.rows(tokens_BT)}
        return inputs | {"input_ids": np.ascontiguousarray(tokens_BT, np.int64)}

    def all_words(self, logits: Floats) -> Floats:
        """(P, labels) -> (P, V) for a classifier; (P, V) as it is."""
        if self.labels is None:
            return logits
        wide = np.full((len(logits), self.vocabulary), -np.inf, np.float32)
        wide[:, self.labels] = logits
        return wide


def parts(lengths: Integers | Sequence[int]) -> Iterator[slice]:
    """Cut rows into parts of at most FORWARD_TOKENS tokens, padding included, or of one row."""
    start, widest = 0, 0
    for row, length in enumerate(lengths):
        widest = max(widest, int(length))
        if row > start and (row + 1 - start) * widest > FORWARD_TOKENS:
            yield slice(start, row)
            start, widest = row, int(length)
    yield slice(start, len(lengths))
