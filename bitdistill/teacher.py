"""Load an off-the-shelf model: a local directory, a hub id, or a GGUF file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bitdistill.decoder import MODEL_TYPE_PREFIX, family_of
from bitdistill.schema import Config
from bitdistill.schema_data import Model
from bitdistill.student import layers_of

LICENCE_UNKNOWN = "unknown"
PROBE = "The film was not dull, 42 times."


class ModelError(ValueError):
    """A model that cannot be had or used; the message says what to do."""


def check_model(model: Model) -> None:
    """Find out cheaply whether `load_model` can work; ModelError says what is missing."""
    if model.gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise ModelError(
                    f"reading GGUF needs the package {package}: pip install 'bitdistill[gguf]'"
                )
    path = Path(model.source)
    looks_local = path.is_absolute() or model.source.startswith((".", "~")) or path.exists()
    if looks_local and not path.expanduser().is_dir():
        raise ModelError(f"model directory {model.source} does not exist; check model.source")
    needed = model.gguf_file or "config.json"
    if looks_local and not (path.expanduser() / needed).is_file():
        raise ModelError(
            f"{model.source} has no {needed}; it is not a Hugging Face model directory"
        )


def load_model(model: Model, seed: int = 0) -> tuple[PreTrainedModel, Tokenizer]:
    """The base model (fp32) and its tokenizer. Remote code never runs.

    Raises ModelError where the model cannot be had, and ValueError for an unknown architecture.
    """
    if model.source == "tiny":
        from bitdistill.tiny import make_base

        return make_base(seed)
    source, options = _address(model)
    config = _attempt(AutoConfig, model, source, options)
    family_of(config.model_type)
    if config.model_type.startswith(MODEL_TYPE_PREFIX):
        raise ModelError(
            f"model {model.source} is a ternary student, not a base model or teacher; give the "
            "model that it was made from, or a teacher directory"
        )
    tokenizer = _attempt(AutoTokenizer, model, source, options)
    precise = options | {"dtype": torch.float32, "output_loading_info": True}
    loaded, report = _attempt(AutoModelForCausalLM, model, source, precise)
    if report["missing_keys"]:  # transformers would train random weights in their place
        raise ModelError(
            f"model {model.source} lacks {len(report['missing_keys'])} tensors, e.g. "
            f"{min(report['missing_keys'])}; fetch or copy it again"
        )
    if model.gguf_file is not None:
        loaded = _without_gguf_traces(loaded)
        _end_as_the_file_says(tokenizer, loaded)
    check_layers(loaded)
    _make_saveable(loaded, model)
    return loaded, tokenizer


def _make_saveable(loaded: PreTrainedModel, model: Model) -> None:
    """Some models say how to sample and not that they do: transformers loads and will not save."""
    settings = loaded.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True
        try:
            settings.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"model {model.source} has a generation_config.json that transformers will not "
                f"save ({str(error).splitlines()[0]}); mend or remove that file"
            ) from error


def _address(model: Model) -> tuple[str, dict[str, Any]]:
    """What the Auto classes are asked for; ModelError for a local directory that lacks files."""
    check_model(model)
    folder = Path(model.source).expanduser()
    options = {"revision": model.revision or "main"}
    if model.gguf_file is not None:
        options["gguf_file"] = model.gguf_file
    return str(folder) if folder.exists() else model.source, options


class _Shape(NamedTuple):
    """What of a model is compared before it is loaded: tokenizer, rows of the head, width."""

    tokenizer: Tokenizer
    rows: int
    width: int


def _shape(model: Model, seed: int) -> _Shape:
    """A model's shape, without its weights."""
    if model.source == "tiny":
        loaded, tokenizer = load_model(model, seed)
        return _Shape(tokenizer, loaded.config.vocab_size, loaded.config.hidden_size)
    source, options = _address(model)
    text = _attempt(AutoConfig, model, source, options).get_text_config()
    tokenizer = _attempt(AutoTokenizer, model, source, options)
    return _Shape(tokenizer, text.vocab_size, text.hidden_size)


def check_teacher(config: Config) -> None:
    """ModelError unless `teacher_model`, where there is one, can teach what the stages compare.

    Logits are compared token by token, so a token id must mean the same to both. The teacher's
    head may have more rows (padding) than the student's, not fewer. Alignment compares residual
    streams, which must be of one width.
    """
    if config.teacher_model is None:
        return
    mine = _shape(config.model, config.seed)
    theirs = _shape(config.teacher_model, config.seed)
    names = config.teacher_model.source, config.model.source
    same_words = mine.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    same_ids = mine.tokenizer(PROBE).input_ids == theirs.tokenizer(PROBE).input_ids
    if not (same_words and same_ids and theirs.rows >= mine.rows):
        sizes = ", ".join(f"{len(m.tokenizer):,} tokens in {m.rows:,} rows" for m in (theirs, mine))
        raise ModelError(
            f"teacher_model {names[0]} has another vocabulary than model {names[1]} ({sizes}): "
            "their logits cannot be compared; choose a teacher with the same tokenizer"
        )
    stages = {"pretrain": config.pretrain, "distill": config.distill}
    aligned = [name for name, s in stages.items() if s.enabled and s.alignment.weight > 0]
    if aligned and theirs.width != mine.width:
        settings = " and ".join(f"{name}.alignment.weight" for name in aligned)
        raise ModelError(
            f"alignment compares residual streams of one width; teacher_model {names[0]} has "
            f"{theirs.width}, model {names[1]} {mine.width}: set {settings} to 0"
        )


def _attempt(auto: Any, model: Model, source: str, options: dict[str, Any]) -> Any:
    """What an Auto class loads from `source`, or a ModelError with the library's reason."""
    try:
        return auto.from_pretrained(source, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {model.source} cannot be had ({auto.__name__}: {str(error).splitlines()[0]}); "
            "check the name and the network, or give a complete local directory"
        ) from error


def _without_gguf_traces(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that knows nothing of GGUF, and can therefore be saved."""
    values = loaded.config.to_dict()
    values.pop("quantization_config", None)
    values.pop("_name_or_path", None)
    plain = type(loaded)(type(loaded.config).from_dict(values))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain


def _end_as_the_file_says(tokenizer: Tokenizer, loaded: PreTrainedModel) -> None:
    """transformers 5.17 takes the token that begins a text for the one that ends it."""
    end = loaded.config.eos_token_id
    if isinstance(end, int) and tokenizer.eos_token_id != end:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)


def check_layers(model: PreTrainedModel) -> None:
    """ValueError for a causal LM whose module tree is not the one the surgery table names."""
    family_of(model.config.model_type)
    if not hasattr(getattr(model, "model", None), "layers") or not len(layers_of(model)):
        raise ModelError(f"{type(model).__name__} has no decoder layers where they are expected")


def _card_header(model: Model, key: str) -> str | None:
    """A value from the header of the model card in a local directory."""
    card = Path(model.source).expanduser() / "README.md"
    if card.is_file():
        for line in card.read_text(encoding="utf-8").splitlines()[:40]:
            if line.startswith(f"{key}:"):
                return line.partition(":")[2].strip().strip("'\"") or None
    return None


def licence_of(model: Model) -> str:
    """The licence the student inherits: as configured, or as the model card's header says."""
    if model.source == "tiny":
        return "apache-2.0"
    return model.licence or _card_header(model, "license") or LICENCE_UNKNOWN


def name_of(model: Model) -> str:
    """What cards and tables call the base model: its hub id, or a local directory's name."""
    if not Path(model.source).expanduser().is_dir():
        return model.source
    name = Path(model.source).expanduser().resolve().name
    return _card_header(model, "base_model") or name
