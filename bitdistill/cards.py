"""Model cards: what a directory holds, where it comes from, whose licence it inherits."""

from __future__ import annotations

from typing import Any

_WHAT = {
    "fp16-sft": "The base model fine-tuned in full precision: baseline and teacher.",
    "base": "The embedded demonstration's base model.",
    "bitnet-sft": "A ternary copy of the base model, fine-tuned directly: a baseline.",
}
_STUDENT = (
    "A 1.58-bit student: every linear layer of a block is ternary (-1, 0, +1 times one scale a "
    "matrix) with int8 activations. `model.safetensors` holds the full-precision master weights "
    "that training continues from; `bitdistill export` writes the small files that are deployed."
)
_USE = """```python
import bitdistill  # registers the architecture with transformers' Auto classes
model = bitdistill.load("{name}")
```
Stock transformers without `import bitdistill` refuses this model, because it would drop the added
norms and run it unquantised."""


def header(content: dict[str, Any], **extra: str) -> str:
    """The YAML block at the top of a card."""
    lines = {"license": content["licence"], "base_model": content["base_model"], **extra}
    return "---\n" + "".join(f"{key}: {value}\n" for key, value in lines.items()) + "---\n"


def model_card(content: dict[str, Any]) -> str:
    """The card of a stage directory, from its manifest."""
    method, stage = content["method"], content["stage"]
    what = _WHAT.get(method, _STUDENT)
    task = content["task"]["name"] if content["task"] else "none"
    lines = [
        header(content, pipeline_tag="text-generation", tags="[bitdistill, ternary]"),
        f"# {content['base_model']}: {method}",
        what,
        "",
        f"- base model: `{content['base_model']}`, whose licence ({content['licence']}) this "
        "model inherits",
        f"- stage `{stage}` of recipe `{content['recipe']}`, seed {content['seed']}; task: {task}",
        f"- norm style: {content['norm_style']}, activation bits: {content['activation_bits']}",
        f"- written by {content['created_by']}",
    ]
    if content["norm_style"] is not None:
        lines += ["", _USE.format(name=stage)]
    return "\n".join(lines) + "\n"
