"""A decoder layer as one node, and as the nodes that it stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from attention_models import (
    ATTRIBUTES,
    FREQUENCIES,
    GIVEN,
    HEADS,
    KV_HEADS,
    PACKED,
    RESULTS,
    SIZE,
    F,
    Inputs,
    cached_model,
)
from onnx import helper

from bitdistill.packing import pack_layout

PARTS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
BLOCK_NORMS = ("qkv_proj", "gate_up_proj")
MEMBERS = ("W", "norm_weight", "bias")
SHARED = ("frequencies", "q_norm", "k_norm")
ADDED_EPSILON = 1e-3  # far from that of the other norms, or a mix-up could not be seen


@dataclass(frozen=True)
class Layer:
    """What one is made of; `norms` and `biases` are the parts that have one."""

    hidden: int = 100
    wide: int = 96  # whole blocks of rows
    bits: int = 16
    layout: int = 1
    activation_bits: int = 8
    activation: str = "silu"
    window: int = 0
    head_norms: bool = True
    norms: tuple[str, ...] = PARTS
    biases: tuple[str, ...] = ()

    def size(self, part: str) -> tuple[int, int]:
        sizes = {
            "qkv_proj": (PACKED, self.hidden),
            "o_proj": (self.hidden, HEADS * SIZE),
            "gate_up_proj": (2 * self.wide, self.hidden),
            "down_proj": (self.hidden, self.wide),
        }
        return sizes[part]

    def scale_rows(self, part: str) -> int:
        """As the exporter has them: one scale a matrix, in units that fit all of a stack."""
        rows = {"qkv_proj": KV_HEADS * SIZE, "gate_up_proj": self.wide}
        return rows.get(part, self.size(part)[0])

    def constants(self) -> Inputs:
        rng = np.random.default_rng(3)
        found: Inputs = {"frequencies": FREQUENCIES}
        if self.head_norms:
            found |= {name: rng.random(SIZE, F) + F(0.5) for name in ("q_norm", "k_norm")}
        for part in PARTS:
            rows, columns = self.size(part)
            trits = rng.integers(-1, 2, (rows, columns)).astype(np.int8)
            found[f"{part}.W"] = pack_layout(trits, self.layout)
            found[f"{part}.scale"] = rng.random(rows // self.scale_rows(part), F) / F(4)
            if part in self.norms:
                found[f"{part}.norm_weight"] = rng.random(columns, F) + F(0.5)
            if part in self.biases:
                found[f"{part}.bias"] = rng.standard_normal(rows, F)
        return found


def attention_attributes(layer: Layer) -> dict[str, Any]:
    return ATTRIBUTES | {"local_window_size": layer.window}


def form(layer: Layer) -> dict[str, int]:
    return {"layout": layer.layout, "activation_bits": layer.activation_bits}


def merged(constants: Inputs) -> Inputs:
    """Constants of a layer, which has the scales of all matrices in one tensor."""
    names = [f"{part}.scale" for part in PARTS]
    others = {name: value for name, value in constants.items() if name not in names}
    return others | {"scale": np.concatenate([constants[name] for name in names])}


def present(names: list[str], constants: Inputs) -> list[str]:
    """Inputs of a node, "" for those that the layer does not have."""
    known = {"x", *GIVEN, *RESULTS, "qkv", "attended", "middle", "gate_up", *constants}
    names = [name if name in known else "" for name in names]
    while names[-1] == "":
        names.pop()
    return names


def whole(
    layer: Layer, changed: Inputs | None = None, fed: tuple[str, ...] = (), **changes: Any
) -> bytes:
    """One DecoderLayer; `changed` takes the place of constants, `changes` of attributes."""
    constants = merged(layer.constants()) | (changed or {})
    names = ["x", *GIVEN, *SHARED, "scale", *(f"{part}.{m}" for part in PARTS for m in MEMBERS)]
    attributes = {
        **attention_attributes(layer),
        **form(layer),
        "hidden_size": layer.hidden,
        "intermediate_size": layer.wide,
        "head_size": SIZE,
        "activation": layer.activation,
        "added_epsilon": ADDED_EPSILON,
        **changes,
    }
    attributes = {name: value for name, value in attributes.items() if value is not None}
    inputs = present(names, constants)
    node = helper.make_node(
        "DecoderLayer", inputs, RESULTS, "layer 7", "", "bitdistill", **attributes
    )
    return cached_model([node], layer.bits, constants, fed)


def separate(layer: Layer) -> bytes:
    """The same of a node for each product, and one for attention."""
    constants = layer.constants()

    def product(part: str, x: str, y: str, residual: str = "", **more: Any) -> Any:
        rows, columns = layer.size(part)
        weight, *others = (f"{part}.{member}" for member in MEMBERS)
        names = [x, weight, f"{part}.scale", *others, "", residual]
        attributes = {
            **form(layer),
            "N": rows,
            "K": columns,
            "scale_rows": layer.scale_rows(part),
            "epsilon": ATTRIBUTES["epsilon"] if part in BLOCK_NORMS else ADDED_EPSILON,
            **more,
        }
        inputs = present(names, constants)
        return helper.make_node("TernaryLinear", inputs, [y], part, "", "bitdistill", **attributes)

    inputs = present(["qkv", "", "", *GIVEN, *SHARED], constants)
    nodes = [
        product("qkv_proj", "x", "qkv"),
        helper.make_node(
            "Attention", inputs, ["attended", *RESULTS[1:]], "attention", "", "bitdistill",
            **attention_attributes(layer),
        ),
        product("o_proj", "attended", "middle", "x"),
        product("gate_up_proj", "middle", "gate_up"),
        product("down_proj", "gate_up", "y", "middle", activation=layer.activation),
    ]  # fmt: skip
    return cached_model(nodes, layer.bits, constants)
