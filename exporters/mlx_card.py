"""Which programs load an MLX artifact, and what none of them may do, for its card and manifest."""

from __future__ import annotations

from typing import Any

_OURS = (
    "**bitdistill**: `bitdistill generate`, `bitdistill eval` and `bitdistill.backends.load`. No "
    "code in this directory is run."
)
_STOCK = (
    "**mlx-lm, without a flag or a further package**: this is a stock `{model_type}` model in "
    "mlx-lm's 2-bit layout (`mlx_lm.generate --model DIRECTORY`, `mlx_lm.server`, `mlx_lm.chat`). "
    "It suits local programs that run mlx-lm models (chat windows, OpenAI-compatible servers, "
    "scripts); mlx-lm alone was tested. LM Studio and mlx-swift read the same layout and were not "
    "verified. On a CPU MLX sums in half precision: first "
    "`mlx_lm.convert --hf-path DIRECTORY --mlx-path OUT --dtype float32`."
)
_REGISTERED = (
    "**mlx-lm with bitdistill installed**: `bitdistill mlx generate --model DIRECTORY --prompt "
    '"..."`, likewise `mlx server`, `mlx chat`, `mlx lora`; in Python `import bitdistill` before '
    "`mlx_lm.load`. For local programs, and for every application that speaks to an "
    "OpenAI-compatible server. mlx-lm alone refuses this model, because {reason}; so do "
    "applications that bring their own mlx-lm or mlx-swift."
)
_MODEL_FILE = (
    "**plain mlx-lm**: `mlx_lm.generate --model DIRECTORY --trust-remote-code`, which runs "
    "`{model_file}` from this directory: read it first. For machines without bitdistill. With this "
    "file the directory needs that flag even where bitdistill is imported, but not in "
    "`bitdistill mlx`."
)
_CAUTIONS = (
    "**With each of them**: mlx 0.32.4 or newer where activations have 16 bits, as on Metal; "
    "earlier kernels sum them in half precision, which ruins the text. Do not `mlx_lm.fuse` "
    "adapters into this model or quantise it again: both fit a grid of four levels to each group "
    "and destroy the trits. Pass adapters beside it (`--adapter-path`)."
)


def loaders(config: dict[str, Any], not_stock: str | None) -> list[str]:
    """One sentence a way to load, and cautions; `not_stock` says why it is no stock model."""
    if not_stock is None:
        return [_STOCK.format(model_type=config["model_type"]), _OURS, _CAUTIONS]
    lines = [_REGISTERED.format(reason=not_stock), _OURS]
    if "model_file" in config:
        lines.append(_MODEL_FILE.format(model_file=config["model_file"]))
    return [*lines, _CAUTIONS]
