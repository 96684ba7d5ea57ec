"""Model directories: written whole or not at all, read back exactly or refused.

A student directory has the Hugging Face layout plus `bitdistill.json` (see manifest.py). Loading
rebuilds the module tree from config.json and loads strictly: a missing SubLN gain is an error, not
a norm of ones. Only safetensors are read; nothing is unpickled and no remote code runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill import manifest
from bitdistill.decoder import (
    LINEARS,
    MODEL_TYPE_PREFIX,
    DecoderSpec,
    config_class,
    decoder_spec,
    family_of,
)
from bitdistill.quantize import ternarize
from bitdistill.student import cast, empty_student

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "generation_config.json",
)


def save(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    kind: str,
    content: dict[str, Any],
    card: str,
) -> None:
    """Write a teacher or student directory: weights, config, tokenizer, card, manifest.

    `kind` is `teacher` or `student`; `content` becomes the manifest. FileExistsError if it exists,
    OSError where there is no room.
    What training ends an answer with ends a generation too, whatever the base model says of it.
    """
    model.generation_config.eos_token_id = ends_of(model, tokenizer) or None
    with manifest.new_directory(path) as partial:
        try:
            model.save_pretrained(partial)
        except SafetensorError as error:  # which is no OSError
            raise OSError(
                f"{path} could not be written ({error}); make room or choose another --out, and go "
                "on with --resume"
            ) from error
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        manifest.write_manifest(partial, kind, content)


def ends_of(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """What ends a text in training, and whatever else ends one of this model, in order."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    found = {tokenizer.eos_token_id, *([own] if isinstance(own, int) else own or [])}
    return sorted(token for token in found if token is not None)


def stop_tokens(path: Path, config: dict[str, Any]) -> list[int]:
    """Ids that end a generation of the model in a directory, whose config.json is given."""
    file = path / "generation_config.json"
    generation = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    stop = generation.get("eos_token_id", config.get("eos_token_id"))
    if stop is None:
        return []
    return [stop] if isinstance(stop, int) else list(stop)


class FileRows:
    """A matrix in a safetensors file, read some rows at a time: it may be the largest tensor."""

    def __init__(self, file: Path, name: str) -> None:
        self.file, self.name = file, name
        with safe_open(file, "pt") as tensors:
            self.shape: tuple[int, ...] = tuple(tensors.get_slice(name).get_shape())

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        with safe_open(self.file, "pt") as tensors:  # closed again: no page stays mapped
            part: NDArray[np.float32] = tensors.get_slice(self.name)[rows].float().numpy()
        return part


def tensor_shape(spec: DecoderSpec, name: str) -> tuple[int, ...]:
    """The shape of a student's tensor, by its name."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return spec.vocabulary, spec.hidden
    module, _, kind = name.rpartition(".")
    part = ".".join(module.removesuffix(".norm").split(".")[3:])  # of model.layers.0.
    if part not in LINEARS:
        return (spec.head_dim if part in ("self_attn.q_norm", "self_attn.k_norm") else spec.hidden,)
    rows, columns = spec.shape(part)
    if module.endswith(".norm"):
        return (columns,)
    return (rows,) if kind == "bias" else (rows, columns)


class StudentFiles:
    """A student directory opened for export: tensors are read one at a time, never all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = manifest.read_manifest(path, "student")
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text("utf-8"))

    @cached_property
    def spec(self) -> DecoderSpec:
        """Sizes and switches of the decoder."""
        cls = config_class(family_of(self.config["model_type"]))
        return decoder_spec(cls.from_pretrained(self.path))

    @cached_property
    def _index(self) -> dict[str, Path]:
        index: dict[str, Path] = {}
        for file in manifest.weight_files(self.path, self.manifest):
            with safe_open(file, "pt") as tensors:
                index |= dict.fromkeys(tensors.keys(), file)
        return index

    @property
    def names(self) -> list[str]:
        """Every tensor name in the directory."""
        return list(self._index)

    def _file_of(self, name: str) -> Path:
        if name not in self._index:
            raise manifest.FormatError(f"{self.path} has no tensor {name!r}: it is not complete")
        return self._index[name]

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = tensor_shape(self.spec, name)
        if shape != expected:
            raise manifest.FormatError(
                f"{self.path} holds {name!r} as {shape}, its config describes {expected}; it was "
                "altered or written by another version"
            )

    def tensor(self, name: str) -> Tensor:
        """One tensor in fp32; FormatError if the directory lacks it or it has another shape."""
        with safe_open(self._file_of(name), "pt") as tensors:
            value = tensors.get_tensor(name).float()
        self._check_shape(name, tuple(value.shape))
        return value

    def rows(self, name: str) -> FileRows:
        """One matrix, whose rows are read in fp32 when they are asked for; else as `tensor`."""
        rows = FileRows(self._file_of(name), name)
        self._check_shape(name, rows.shape)
        return rows

    def ternary(self, linear: str) -> tuple[NDArray[np.int8], float]:
        """Trits (N, K) and scale of a linear, e.g. `model.layers.0.mlp.up_proj`."""
        trits, scale = ternarize(self.tensor(f"{linear}.weight"))
        return trits.numpy(), float(scale)

    def tokenizer_files(self) -> list[Path]:
        """The tokenizer's files that exist, to be copied into an artifact."""
        return [self.path / name for name in TOKENIZER_FILES if (self.path / name).is_file()]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the weight files, as the manifest lists them."""
        files = self.manifest["files"]
        weights = {n: f["sha256"] for n, f in files.items() if n.endswith(".safetensors")}
        return manifest.fingerprint(weights)

    @property
    def stop_tokens(self) -> list[int]:
        """Ids that end a generation."""
        return stop_tokens(self.path, self.config)


def open_student(path: str | Path) -> StudentFiles:
    """Open a student directory for export; FormatError says what is wrong with another one."""
    return StudentFiles(Path(path))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a model directory."""
    return AutoTokenizer.from_pretrained(path)


def _all_tensors(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for file in manifest.weight_files(path, content):
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                yield name, tensors.get_tensor(name)


def load(path: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A teacher or student directory as a PyTorch model in eval mode.

    Raises FormatError when the directory is incomplete, of another format version, or does not
    hold exactly the tensors its config describes.
    """
    path = Path(path)
    content = manifest.read_manifest(path)
    manifest.check_sizes(path, content)
    if content["kind"] == "teacher":
        return load_plain(path, dtype, content)
    if content["kind"] != "student":
        raise manifest.FormatError(
            f"{path} holds {manifest.an(content['kind'])}, which is no PyTorch model; load it with "
            "bitdistill.backends.load"
        )
    config_path = path / "config.json"
    model_type = json.loads(config_path.read_text("utf-8"))["model_type"]
    if not model_type.startswith(MODEL_TYPE_PREFIX):
        raise manifest.FormatError(f"{config_path} has model_type {model_type!r}, not a student's")
    model = empty_student(config_class(family_of(model_type)).from_pretrained(path))
    load_tensors(model, path, content)
    return cast(model, dtype).eval()


def load_plain(
    path: Path, dtype: torch.dtype, content: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model of a Hugging Face directory, in eval mode; FormatError without safetensors.

    What `content`, a manifest, does not list must not be what transformers takes first.
    """
    whole = path / "model.safetensors"
    if not whole.is_file() and not (path / f"{whole.name}.index.json").is_file():
        raise manifest.FormatError(
            f"{path} has no {whole.name}, and pickled weights are not read because they can run "
            "code; save the model again with save_pretrained, or convert them to safetensors"
        )
    if content and whole.is_file() and whole.name not in content["files"]:
        raise manifest.FormatError(
            f"{path} has a {whole.name} that its manifest does not list; remove it, or make the "
            "directory again"
        )
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True).eval()


def load_tensors(model: PreTrainedModel, path: Path, content: dict[str, Any]) -> None:
    """Copy every tensor of the files that a directory's manifest lists into the model.

    FormatError unless names and shapes are the model's, and all values floating-point ones.
    """
    tensors = dict(_all_tensors(path, content))
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight")
        tensors.pop("lm_head.weight", None)
    if difference := expected.keys() ^ tensors.keys():
        names = ", ".join(sorted(difference)[:3])
        raise manifest.FormatError(
            f"{path} does not hold exactly the tensors of its architecture ({len(difference)} "
            f"differ: {names}); it was altered or written by another version"
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise manifest.FormatError(
                f"{path} holds {name!r} as {tuple(tensor.shape)} of {tensor.dtype}, its config "
                f"describes {tuple(expected[name].shape)} of floats; it was altered or written by "
                "another version"
            )
    model.load_state_dict(tensors, strict=False)
