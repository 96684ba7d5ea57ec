"""The model card of an artifact."""

from __future__ import annotations

from typing import Any

from bitdistill.cards import header

_GENERATE = """```
bitdistill generate DIRECTORY "your prompt"
```

```python
from bitdistill import backends

model = backends.load("DIRECTORY")
prompt = model.tokenizer.encode("your prompt")
print(model.tokenizer.decode(list(model.generate(prompt))))
```
"""
_ANSWER = """This is a classifier: its head knows {answers} alone, each one token.
It answers the task's whole prompt: `--task-prompt` puts a text into the template, where the task
has one input.

```
bitdistill generate DIRECTORY "your text" --task-prompt --max-new-tokens 1
```

```python
from bitdistill import backends

model = backends.load("DIRECTORY")
prompt = model.tokenizer.encode("your prompt")
print(model.tokenizer.decode(list(model.generate(prompt, max_new_tokens=1))))
```
"""


def _answers(content: dict[str, Any]) -> str:
    """The labels of a classifier's task, for its card."""
    *others, last = (f"`{label.strip()}`" for label in content["task"]["labels"])
    return f"{', '.join(others)} and {last}"


def card(content: dict[str, Any]) -> str:
    """The model card of an artifact, from its manifest."""
    runtime = {"onnx": "ONNX Runtime (CPU)", "mlx": "MLX"}.get(content["target"], content["target"])
    task = (content.get("task") or {}).get("name", "language modelling")
    loaders = "".join(f"- {line}\n" for line in content.get("loaders", ()))
    library = {"library_name": "mlx"} if content["target"] == "mlx" else {}
    mib = {k: v / 2**20 for k, v in content["parts"].items() if "bits" not in k}
    sizes = "\n".join(f"| {name} | {size:.2f} |" for name, size in mib.items())
    bits = "\n".join(f"| {k} | {v:.3f} |" for k, v in content["parts"].items() if "bits" in k)
    classifier = content.get("label_tokens") is not None
    kind = "text-classification" if classifier else "text-generation"
    extra = {**library, "pipeline_tag": kind, "tags": "[bitdistill, ternary]"}
    return f"""{header(content, **extra)}
# A 1.58-bit model for {runtime}

Every linear layer of every block is ternary (-1, 0, +1, one scale a matrix), with activations at
{content["decoder"]["activation_bits"] or 32} bits; the embedding, norms and LM head are not.
{_embedding(content)}
Method: {content["method"]}. Task: {task}. Base model: {content["base_model"]}, whose licence
({content["licence"]}) this model inherits.

## Run it

{_ANSWER.format(answers=_answers(content)) if classifier else _GENERATE}
{"## Load it elsewhere" if loaders else ""}

{loaders}
## Size

| part | MiB |
| --- | --- |
{sizes}

| bits, scales included | |
| --- | --- |
{bits.replace("_", " ")}

## Limits

The longest sequence is {content["context"]} tokens. A student is good at the task it was distilled
for and should be measured again on any other. Nothing was measured on Apple hardware.
`bitdistill.json` holds the hash of every file and, where a parity check was made at export, how the
artifact compared with PyTorch.
{_block_rounding(content)}"""


def _embedding(content: dict[str, Any]) -> str:
    """How the embedding and head are stored, and what that costs where it was measured."""
    text = f"The embedding and LM head are stored as {content['storage']['embedding']}."
    error = content.get("embedding_error", {}).get("embedding")
    if error is None:
        return text
    return (
        f"{text[:-1]}: a row is off by {100 * error['mean']:.2g} % of its length on average, by "
        f"{100 * error['largest']:.2g} % at most."
    )


def _block_rounding(content: dict[str, Any]) -> str:
    """For artifacts whose activations are rounded by the runtime, or not."""
    if content["storage"].get("activations") != "int8 blocks":
        return ""
    return (
        "Activations are rounded in blocks of columns where onnxruntime has a kernel: with "
        "AVX2\nfrom 1.29 on. 1.24 to 1.28 and onnxruntime-web do not round them and give other "
        "logits;\n`--ops integer` computes the same everywhere.\n"
    )
