"""Teacher -> student: ternary linears, the norms SubLN adds, and their calibrated gains.

A student is the teacher's own Hugging Face architecture in which every linear layer of a block is a
`BitLinear`; embeddings, block norms and the LM head stay full precision. Where `norm_style` puts an
RMSNorm on a linear's input, that norm lives inside the BitLinear (`o_proj.norm.weight`), so one
table says where they are and no family needs code of its own:

    paper    SubLN (arXiv 2510.13998, eq. 4-5): attention output and FFN down projections
    allnorm  the authors' released code: every projection, eps 1e-8
    none     the plain architecture

The `model_type` is ours (`bitdistill_qwen3`), so that stock transformers refuses a student instead
of dropping its norms and running it unquantised. `bitdistill.autoclasses` registers it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from bitdistill.decoder import (
    FAMILIES,
    LINEARS,
    NORMED_LINEARS,
    NormStyle,
    config_class,
    family_of,
)
from bitdistill.quantize import BitLinear, RMSNorm, bit_linears

ALLNORM_EPS = 1e-8


@functools.cache
def model_class(family: str) -> type[PreTrainedModel]:
    """The student's model class of a family: the stock causal LM, its linears replaced."""
    row = FAMILIES[family]
    modeling = import_module(f"transformers.models.{row.module}.modeling_{row.module}")
    stock = getattr(modeling, f"{row.prefix}ForCausalLM")

    def __init__(self: PreTrainedModel, config: PreTrainedConfig) -> None:
        stock.__init__(self, config)
        replace_linears(self)

    def initialize_weights(self: PreTrainedModel) -> None:
        """`from_pretrained` allocates what no file holds, and then asks here for its contents."""
        stock.initialize_weights(self)
        for linear in bit_linears(self):
            linear.anneal.fill_(1.0)

    body = {
        "__init__": __init__,
        "initialize_weights": initialize_weights,
        "config_class": config_class(family),
        "__module__": __name__,
    }
    return type(f"Bitdistill{row.prefix}ForCausalLM", (stock,), body)


def empty_student(config: PreTrainedConfig) -> PreTrainedModel:
    """A student for the caller to fill: only buffers and norms hold values, the rest is memory.

    Drawing random weights takes longer than reading them, and would move the caller's generator.
    """
    with no_init_weights():
        model = model_class(family_of(config.model_type))(config)
    model.tie_weights()  # which is a part of what was left out
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a teacher or student."""
    return model.model.layers  # type: ignore[union-attr, return-value]


def replace_linears(model: PreTrainedModel) -> None:
    """Replace the linears of every block by BitLinears, as `model.config.bitdistill` says.

    Raises ValueError for a block that lacks a named linear or has one that is not in the table.
    """
    options = model.config.bitdistill
    normed = NORMED_LINEARS[options["norm_style"]]
    for index, layer in enumerate(layers_of(model)):
        found = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        if found != set(LINEARS):
            raise ValueError(
                f"layer {index} has linears {sorted(found)}, expected {sorted(LINEARS)}: "
                "this is not an architecture that bitdistill knows"
            )
        for name in LINEARS:
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            norm = (
                RMSNorm(linear.in_features, options["added_norm_eps"]) if name in normed else None
            )
            layer.set_submodule(
                name,
                BitLinear(
                    linear.in_features,
                    linear.out_features,
                    linear.bias is not None,
                    activation_bits=options["activation_bits"],
                    norm=norm,
                ),
            )


def make_student(
    teacher: PreTrainedModel, norm_style: NormStyle = "paper", activation_bits: int | None = 8
) -> PreTrainedModel:
    """A student with the teacher's weights; added norms have gain 1 until `set_gains`.

    Raises ValueError for an architecture that is not in FAMILIES.
    """
    family = family_of(teacher.config.model_type)
    values = teacher.config.to_dict()
    for key in ("model_type", "architectures", "quantization_config", "transformers_version"):
        values.pop(key, None)
    eps = ALLNORM_EPS if norm_style == "allnorm" else teacher.config.rms_norm_eps
    config = config_class(family)(**values)
    config.bitdistill = {
        "norm_style": norm_style,
        "added_norm_eps": eps,
        "activation_bits": activation_bits,
    }
    student = empty_student(config)
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    lost = [name for name in missing if not name.endswith(".norm.weight")] + list(unexpected)
    if lost:
        raise ValueError(f"the student does not take over the teacher's {', '.join(lost[:3])}")
    student.generation_config = teacher.generation_config
    return student.to(device=teacher.device)


def measure_gains(
    teacher: PreTrainedModel, norm_style: NormStyle, batches: Iterable[dict[str, Tensor]]
) -> dict[str, float]:
    """E[rms(x)] of the input of every linear that gets a norm, over the teacher's real tokens.

    A unit gain rescales every block, and an untrained student then agrees with its teacher on
    nothing; with this gain the added norm is on average the identity. Keys are module names.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def record(name: str, x: Tensor) -> None:
        assert mask is not None
        rms = x.float().square().mean(-1).sqrt()
        sums[name] = sums.get(name, rms.new_zeros(())) + (rms * mask).sum()
        counts[name] = counts.get(name, rms.new_zeros(())) + mask.sum()

    handles = []
    for name, module in teacher.named_modules():
        if any(name.endswith(linear) for linear in NORMED_LINEARS[norm_style]):
            hook = functools.partial(lambda key, _, args: record(key, args[0]), name)
            handles.append(module.register_forward_pre_hook(hook))
    try:
        with torch.no_grad():
            for batch in batches:
                mask = batch["attention_mask"]
                teacher.model(input_ids=batch["input_ids"], attention_mask=mask)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(sums[name] / counts[name]) for name in sums}


def set_gains(student: PreTrainedModel, gains: dict[str, float]) -> None:
    """Fill the weight of each added norm with its measured gain; every norm must have one."""
    for name, module in student.named_modules():
        if isinstance(module, BitLinear) and module.norm is not None:
            if not gains.get(name, 0.0) > 0.0:
                raise ValueError(f"no gain was measured for {name}; give calibration batches")
            nn.init.constant_(module.norm.weight, gains[name])


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Convert floating-point parameters in place; not the buffers, because angles need fp32
    frequencies.

    In 16 bits a BitLinear keeps its fp32 weights: trits are taken from those.
    """
    for module in model.modules():
        if dtype.itemsize < 4 and isinstance(module, BitLinear | RMSNorm):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def round_tables(student: PreTrainedModel) -> None:
    """Round embedding and head to the 16 bits that artifacts store, in place.

    So a student and its artifacts are one model. ONNX stores float16, MLX the family's own type:
    what both hold. Values beyond float16 stay: they need `--embed-bits 32`.
    """
    narrow = getattr(torch, FAMILIES[family_of(student.config.model_type)].half)
    for table in (student.get_input_embeddings(), student.get_output_embeddings()):
        weight = table.weight
        half = weight.to(narrow).half().to(weight.dtype)
        weight.copy_(torch.where(half.isfinite(), half, weight))


def quantization_statistics(model: nn.Module) -> dict[str, Any]:
    """Fraction of zero trits over all BitLinears and by kind of linear."""
    zeros: dict[str, list[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            unit = module.weight.detach() / module.weight.detach().abs().mean()
            zeros.setdefault(name.rsplit(".", 1)[-1], []).append(
                float((unit.abs() < 0.5).float().mean())
            )
    by_kind = {kind: sum(values) / len(values) for kind, values in zeros.items()}
    return {"zero_fraction": by_kind}
