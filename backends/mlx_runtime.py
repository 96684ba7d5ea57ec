"""Runs MLX artifacts: on Metal with stock 2-bit kernels, elsewhere in fp32 to check them.

On Apple silicon activations are float16 and weights stay at 2 bits. On other machines MLX has only
slow 2-bit code that also sums in half precision for half inputs, so there the default is fp32 with
the trits held as fp32 matrices (16 times the memory of the file): that path is for verifying an
artifact and for scoring small models, not for serving.

Needs mlx, numpy and tokenizers; neither torch nor transformers nor mlx-lm.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np

from bitdistill.backends.base import Floats, Integers, Runtime
from bitdistill.backends.mlx_linear import Precision
from bitdistill.backends.mlx_model import Decoder, KeyValueCache
from bitdistill.decoder import DecoderSpec
from bitdistill.manifest import FormatError
from bitdistill.names import suggest

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
HALF_NEEDS = (0, 32, 4)  # earlier kernels sum the affine term in half precision


def precision(dtype: str | None, dequantize: bool | None) -> Precision:
    """The precision to run in; None means what suits this machine.

    Raises ValueError for an unknown dtype, or a half-precision one on an mlx that gets it wrong.
    """
    metal = mx.metal.is_available()
    dtype = dtype or ("float16" if metal else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of MLX's{suggest(dtype, DTYPES)}")
    if dtype != "float32":
        _check_half(metal)
    return Precision(DTYPES[dtype], not metal if dequantize is None else dequantize)


def _check_half(metal: bool) -> None:
    installed = version("mlx")
    numbers = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    if numbers < HALF_NEEDS:
        raise ValueError(
            f"mlx {installed} sums 2-bit layers in half precision, which ruins the logits; "
            "pip install -U 'mlx>=0.32.4', or pass dtype='float32'"
        )
    if not metal:
        warnings.warn(
            "without Metal, MLX sums in half precision when activations are 16 bits wide: expect "
            "wrong logits, or pass dtype='float32'",
            stacklevel=4,
        )


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of an artifact, lazily; FormatError for files that are not whole."""
    files = sorted(path.glob("model*.safetensors"))
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

    `dtype` is the type of activations ("float16" on Metal, else "float32"); `dequantize` holds the
    trits as fp32 matrices instead of 2-bit codes (default: off on Metal, on elsewhere). MLX offers
    no control of CPU threads, so `threads` changes nothing.

    Raises FormatError for tensors that are missing, misshapen or not ternary.
    """

    name = "mlx"

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        *,
        threads: int | None = None,
        dtype: str | None = None,
        dequantize: bool | None = None,
    ) -> None:
        self.path, self.manifest = path, manifest
        self.spec = DecoderSpec.from_json(manifest["decoder"])
        self.vocabulary, self.context = self.spec.vocabulary, manifest["context"]
        self.stop_tokens = list(manifest["stop_tokens"])
        self.precision = precision(dtype, dequantize)
        self.decoder = Decoder(self.spec)
        try:
            self.decoder.load_weights(list(read_tensors(path).items()), strict=True)
            self.decoder.prepare(self.precision)
        except (ValueError, RuntimeError) as error:
            raise FormatError(f"{path}: {error}") from error

    def new_cache(self, capacity: int) -> KeyValueCache:
        """An empty cache for one sequence of up to `capacity` tokens."""
        self.check_capacity(capacity)
        return KeyValueCache(self.spec, capacity, self.precision.dtype)

    def step(self, tokens: Sequence[int], cache: KeyValueCache) -> Floats:
        """Feed tokens of one sequence; float32 (V,) logits of the last."""
        self.check_tokens(tokens, cache.capacity - cache.length)
        hidden = self.decoder.hidden(mx.array([list(tokens)], mx.int32), cache)
        logits = self.decoder.logits(hidden[:, -1])[0]
        mx.eval(logits, cache.keys, cache.values)
        return np.array(logits)

    def logits_at(self, tokens_BT: Integers, lengths_B: Integers, rows: Integers) -> Floats:
        """float32 (P, V) at rows (b, t); causal attention never looks at padding on the right."""
        hidden = self.decoder.hidden(mx.array(tokens_BT.astype(np.int32)))
        picked = hidden[mx.array(rows[:, 0]), mx.array(rows[:, 1])]
        return np.array(self.decoder.logits(picked))
