"""Runs MLX artifacts: on Metal by MLX's own 2-bit kernels, elsewhere in fp32 to check them.

On Apple silicon activations have the file's 16-bit type and weights stay at 2 bits. Elsewhere the
default is fp32, with all but the decoder's structure computed by our own CPU kernels, from the same
packed words (see mlx_host.py): that path is for verifying an artifact and for scoring.

Needs mlx, numpy and tokenizers; neither torch nor transformers nor mlx-lm. Nothing in the directory
is executed: a `model_file` there is for other programs.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx import nn

from bitdistill.backends.base import Floats, Integers, Runtime
from bitdistill.backends.mlx_architecture import Model, ModelArgs
from bitdistill.backends.mlx_host import HostHead, dense_table, floats
from bitdistill.backends.mlx_host_attention import HostCache, move_to_host
from bitdistill.backends.mlx_layout import architecture, table_paths
from bitdistill.backends.mlx_linear import TernaryLinear
from bitdistill.decoder import DecoderSpec
from bitdistill.manifest import FormatError, weight_files
from bitdistill.names import suggest

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
PRODUCTS = ("mlx", "cpu")
HOST_TOKENS = 512  # that many at a time, whose activations stay in a CPU's caches


class LayerCache:
    """Keys and values of one sequence in one layer, as mlx_architecture.py uses a cache."""

    def __init__(self, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
        self.offset = 0
        self.keys, self.values = mx.zeros(shape, dtype), mx.zeros(shape, dtype)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write new keys and values behind those held; returns all of them."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys[:, :, start : self.offset] = keys
        self.values[:, :, start : self.offset] = values
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is held, to be evaluated."""
        return self.keys, self.values

    def make_mask(self, length: int, return_array: bool, window_size: int | None) -> Any:
        """What `length` queries behind those held see: at most `window_size` tokens."""
        total = self.offset + length
        if window_size is None or window_size >= total:
            return None if length == 1 else "causal"
        queries, keys = mx.arange(self.offset, total)[:, None], mx.arange(total)[None]
        return (keys <= queries) & (keys > queries - window_size)


class KeyValueCache:
    """Keys and values of one sequence: `length` tokens are held, `capacity` fit."""

    def __init__(self, layers: Sequence[LayerCache | HostCache], capacity: int) -> None:
        self.layers, self.capacity = layers, capacity

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].offset

    @property
    def arrays(self) -> list[mx.array]:
        """Everything held, to be evaluated."""
        return [array for layer in self.layers for array in layer.arrays]


def read_tensors(path: Path, manifest: dict[str, Any]) -> dict[str, mx.array]:
    """All tensors of the listed files, lazily; FormatError for files that are not whole."""
    files = [file for file in weight_files(path, manifest) if file.is_file()]
    if not files:
        raise FormatError(f"{path} has no model.safetensors; export the student again")
    tensors: dict[str, mx.array] = {}
    for file in files:
        try:
            tensors |= cast(dict[str, mx.array], mx.load(str(file)))
        except (RuntimeError, ValueError) as error:
            raise FormatError(f"{file} cannot be read ({error}); export it again") from None
    return tensors


class MlxRuntime(Runtime):
    """An MLX artifact, loaded.

    `dtype` is the type of activations (the file's own on Metal, else "float32"). `products` says
    who computes: "mlx", its kernels on packed words, the default on Metal; or "cpu", ours, the
    default elsewhere, on `threads` threads (None: all CPUs).

    Raises FormatError for tensors that are missing, misshapen or not ternary, ValueError for an
    option that is unknown or that this mlx gets wrong.
    """

    name = "mlx"

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        threads: int | None = None,
        dtype: str | None = None,
        products: str | None = None,
    ) -> None:
        self.path, self.manifest = path, manifest
        self.spec = DecoderSpec.from_json(manifest["decoder"])
        self.vocabulary, self.context = self.spec.vocabulary, manifest["context"]
        self.stop_tokens = list(manifest["stop_tokens"])
        metal = mx.metal.is_available()
        products = products or ("mlx" if metal else "cpu")
        _check("products", products, PRODUCTS)
        if dtype is not None:
            _check("dtype", dtype, DTYPES)
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be 1 or more, got {threads}")
        self.model = Model(ModelArgs("", architecture(self.spec)))
        self.model.dtype = None if dtype is None else DTYPES[dtype]
        try:
            load_weights(self.model, read_tensors(path, manifest))
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"{path}: {error}") from error
        self._head: HostHead | None = None
        if products == "cpu":
            self._head = move_to_host(self.model, self.spec, threads or os.cpu_count() or 1)
        elif self.model.dtype != mx.float32 and not metal:
            warnings.warn(
                "without Metal, MLX sums in half precision when activations are 16 bits wide: "
                "expect wrong logits, or pass dtype='float32'",
                stacklevel=2,
            )

    def new_cache(self, capacity: int) -> KeyValueCache:
        """An empty cache for one sequence of up to `capacity` tokens."""
        self.check_capacity(capacity)
        shape = (1, self.spec.kv_heads, capacity, self.spec.head_dim)
        if self._head is not None:
            return KeyValueCache([HostCache(shape) for _ in self.spec.layers], capacity)
        assert self.model.dtype is not None  # set when the weights were loaded
        layers = [LayerCache(shape, self.model.dtype) for _ in self.spec.layers]
        return KeyValueCache(layers, capacity)

    def step(self, tokens: Sequence[int], cache: KeyValueCache) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last."""
        self.check_tokens(tokens, cache.capacity - cache.length)
        hidden = self._hidden(np.array([tokens]), cache.layers)
        logits = self._logits(hidden[:, -1])
        mx.eval(cache.arrays)
        return logits[0]

    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, V) at rows (b, t); causal attention never looks at padding on the right."""
        if self._head is None:
            hidden = self._hidden(tokens_BT)
            return self._logits(hidden[mx.array(rows[:, 0]), mx.array(rows[:, 1])])
        found = np.empty((len(rows), self.spec.hidden), np.float32)
        size = max(1, HOST_TOKENS // tokens_BT.shape[1])
        for start in range(0, len(tokens_BT), size):
            group = slice(start, start + size)
            here = (rows[:, 0] >= start) & (rows[:, 0] < start + size)
            if here.any():
                part = floats(self._hidden(tokens_BT[group, : lengths_B[group].max()]))
                found[here] = part[rows[here, 0] - start, rows[here, 1]]
        return self._logits(found)

    def _hidden(self, tokens_BT: Integers, cache: Any = None) -> Any:
        """(B, T, H), of MLX, or of NumPy where our kernels compute in fp32."""
        tokens = mx.array(tokens_BT.astype(np.int32))
        embeddings: Any = self.model.model.embed_tokens(tokens)
        if self._head is not None and self.model.dtype == mx.float32:
            embeddings = floats(embeddings)
        return self.model.hidden(tokens, cache, embeddings)

    def tables(self) -> dict[str, Floats]:
        """Embedding and untied head, by tensor name, where fewer than 16 bits store them."""
        modules = dict(self.model.named_modules())
        stored = {path: modules[path] for path in table_paths(self.spec)}
        quantized = {path: table for path, table in stored.items() if "scales" in table}
        return {f"{path}.weight": dense_table(table).copy() for path, table in quantized.items()}

    def _logits(self, hidden_PH: Any) -> Floats:
        if self._head is not None:
            return self._head(hidden_PH)
        return np.array(self.model.logits(hidden_PH).astype(mx.float32))


def _check(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"{what} {name!r} is not one of MLX's{suggest(name, known)}")


def load_weights(model: Model, tensors: dict[str, mx.array]) -> None:
    """Load strictly, a quantised embedding as such; ValueError names a module that is malformed."""
    nn.quantize(model, class_predicate=lambda path, module: storage_of(tensors, path, module))
    model.load_weights(list(tensors.items()), strict=True)


def storage_of(tensors: dict[str, mx.array], path: str, module: nn.Module) -> dict[str, Any] | bool:
    """How a table is quantised in the file, by the shapes of its tensors; False if it is not."""
    if f"{path}.scales" not in tensors or isinstance(module, TernaryLinear):
        return False
    columns, groups = module.weight.shape[1], tensors[f"{path}.scales"].shape[1]
    bits = tensors[f"{path}.weight"].shape[1] * 32 // columns
    return {"group_size": columns // groups, "bits": bits, "mode": "affine"}
