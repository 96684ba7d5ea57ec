"""Runs ONNX artifacts on the CPU, with the custom-op library of this installation.

Decoding binds the past and the present of the cache to the same memory, so a step writes one row
and copies nothing. Needs onnxruntime, numpy and tokenizers; neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from bitdistill.backends.base import Floats, Integers, Runtime
from bitdistill.backends.embedding_file import NAME, EmbeddingFile
from bitdistill.backends.kernels import library_path
from bitdistill.decoder import DecoderSpec
from bitdistill.manifest import FormatError

MODEL = "model.onnx"
CUSTOM = "custom"  # the manifest's `ops` of an artifact that needs our library
WINDOW_NEEDS = (1, 24)  # earlier versions let a token see one key more than the window
ERRORS_ONLY = 3


class OnnxCache:
    """Keys and values of one sequence, in the memory that the session reads and writes.

    float32 (1, KV heads, capacity, head size) for each layer's key and value.
    """

    def __init__(
        self, session: ort.InferenceSession, spec: DecoderSpec, capacity: int, words: int
    ) -> None:
        self.length, self.capacity = 0, capacity
        self.binding = session.io_binding()
        self.memory: list[ort.OrtValue] = []
        shape = (1, spec.kv_heads, capacity, spec.head_dim)
        for index in range(len(spec.layers)):
            for part in ("key", "value"):
                value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self.memory.append(value)
                self.binding.bind_ortvalue_input(f"past_key_values.{index}.{part}", value)
                self.binding.bind_ortvalue_output(f"present.{index}.{part}", value)
        logits = np.zeros((1, words), np.float32)
        self.logits = ort.OrtValue.ortvalue_from_numpy(logits)
        self.binding.bind_ortvalue_output("logits", self.logits)


class OnnxRuntime(Runtime):
    """An ONNX artifact, loaded. `threads` is the size of ONNX Runtime's pool (None: every core).

    A classifier's head knows the label tokens alone (the other words' logits are minus infinity),
    and its embedding is read from its file row by row.

    Raises FormatError for a model file that is damaged, RuntimeError for an installation that
    cannot run it; both say what to do.
    """

    name = "onnx"
    prefill_chunk = 64  # as fast as 256 on a 0.6B model, with 20 MB less of workspace

    def __init__(self, path: Path, manifest: dict[str, Any], *, threads: int | None = None) -> None:
        self.path, self.manifest = path, manifest
        self.spec = DecoderSpec.from_json(manifest["decoder"])
        self.vocabulary, self.context = self.spec.vocabulary, int(manifest["context"])
        self.stop_tokens = list(manifest["stop_tokens"])
        self.labels: list[int] | None = manifest["label_tokens"]
        self.embedding: EmbeddingFile | None = None
        if self.labels is not None:
            table = (self.vocabulary, self.spec.hidden, manifest["storage"]["embedding"])
            self.embedding = EmbeddingFile(path / NAME, *table)
        self._check_window()
        self.session = open_session(path / MODEL, threads, manifest["ops"] == CUSTOM)

    def _check_window(self) -> None:
        installed = tuple(int(part) for part in ort.__version__.split(".")[:2])
        windows = [layer.window for layer in self.spec.layers if layer.window is not None]
        if windows and min(windows) < self.context and installed < WINDOW_NEEDS:
            raise RuntimeError(
                f"onnxruntime {ort.__version__} counts attention windows differently, and this "
                "model has them; run: pip install -U 'onnxruntime>=1.24'"
            )

    def new_cache(self, capacity: int) -> OnnxCache:
        """An empty cache for one sequence of up to `capacity` tokens."""
        self.check_capacity(capacity)
        words = self.vocabulary if self.labels is None else len(self.labels)
        return OnnxCache(self.session, self.spec, capacity, words)

    def step(self, tokens: Sequence[int], cache: OnnxCache) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last."""
        count = len(tokens)
        self.check_tokens(tokens, cache.capacity - cache.length)
        total = cache.length + count
        inputs = self._inputs(
            np.array([tokens], np.int64), np.array([total]), np.array([count - 1])
        )
        for name, value in inputs.items():
            cache.binding.bind_cpu_input(name, value)
        self.session.run_with_iobinding(cache.binding)
        cache.length = total
        # a copy, because the buffer is written again by the next step
        return np.array(self._all_words(cache.logits.numpy())[0])

    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, V) at rows (b, t), by one forward without a cache."""
        flat = rows[:, 0] * tokens_BT.shape[1] + rows[:, 1]
        inputs = self._inputs(tokens_BT, lengths_B, flat)
        shape = (len(tokens_BT), self.spec.kv_heads, 0, self.spec.head_dim)
        nothing = np.zeros(shape, np.float32)
        for index in range(len(self.spec.layers)):
            for part in ("key", "value"):
                inputs[f"past_key_values.{index}.{part}"] = nothing
        logits: Floats = self.session.run(["logits"], inputs)[0]
        return self._all_words(logits)

    def _inputs(
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

    def _all_words(self, logits: Floats) -> Floats:
        """(P, labels) -> (P, V) for a classifier; (P, V) as it is."""
        if self.labels is None:
            return logits
        wide = np.full((len(logits), self.vocabulary), -np.inf, np.float32)
        wide[:, self.labels] = logits
        return wide


def open_session(model: Path, threads: int | None, custom: bool = True) -> ort.InferenceSession:
    """A CPU session, with our operators if `custom`; FormatError or RuntimeError with a remedy."""
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, got {threads}")
        options.intra_op_num_threads = threads
    if custom:
        _register(options)
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise _explain(model, error) from error


def _register(options: ort.SessionOptions) -> None:
    library = library_path()
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # onnxruntime raises its own classes, derived from Exception
        raise RuntimeError(
            f"the custom operators in {library} cannot be loaded ({_first_line(error)}); "
            "reinstall bitdistill on this machine"
        ) from error


def _explain(model: Path, error: Exception) -> Exception:
    """What a failed load means, in one sentence with the remedy."""
    text = _first_line(error)
    if "is not a registered function/op" in text:
        return RuntimeError(
            f"{model} uses an operator that this installation lacks ({text}); upgrade bitdistill "
            "and onnxruntime, or export the student again"
        )
    return FormatError(f"{model} cannot be loaded: damaged or altered ({text}); export it again")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
