"""Any task of lm-evaluation-harness on any directory: torch, ONNX and MLX through one adapter.

    python -m bitdistill.evals.harness run --model bitdistill --model_args path=DIR --tasks arc_easy

The arguments are those of `lm_eval`, which does not know this adapter by itself; importing this
module registers it as the model `bitdistill`. `model_args`: `path`, and if wanted `threads`,
`batch_size`, `max_length`, `max_gen_toks`, and options of the runtime such as `dtype`.

Texts are encoded and cut as the harness's own `hf` model does, so that scores can be compared:
a prompt loses its beginning where it is too long. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import lm_eval.models  # noqa: F401  (the harness lists its own only before any is registered)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    MISSING = (
        f"the harness needs lm-eval, which cannot be imported ({error}); run: pip install "
        "'bitdistill[lm-eval]'"
    )
    if __name__ == "__main__":
        raise SystemExit(f"Error: {MISSING}") from None
    raise ImportError(MISSING) from error

from bitdistill.backends import load
from bitdistill.backends.base import Request
from bitdistill.backends.generation import generate_batch
from bitdistill.backends.search import Search

NOT_OURS = ("device", "max_batch_size", "pretrained")


@register_model("bitdistill")
class BitdistillLM(TemplateLM):
    """A directory as a model of the harness."""

    def __init__(
        self,
        path: str,
        batch_size: int | str = 16,
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        **options: Any,
    ) -> None:
        super().__init__()
        if str(batch_size).startswith("auto"):
            batch_size = 16
        options = {key: value for key, value in options.items() if key not in NOT_OURS}
        self.runtime = load(path, threads=threads, **options)
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        self.max_length = min(int(max_length or self.runtime.context), self.runtime.context)
        self.special = _special_ids(Path(path), self.runtime.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token; ValueError where the tokenizer has none."""
        end = self.special["eos"]
        if end is None:
            raise ValueError(
                "this model's tokenizer names no end-of-text token, which the harness needs; add "
                "eos_token to its tokenizer_config.json"
            )
        return end

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is replaced by."""
        start = self.special["bos"]
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.runtime.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: Any
    ) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, unless the text has them."""
        if add_special_tokens is None:
            prefix = self.runtime.tokenizer.decode([self.prefix_token_id], special=True)
            add_special_tokens = not string.startswith(prefix)
        return self.runtime.tokenizer.encode(string, special=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (text, context, continuation)."""
        asked = [self._fit(context, continuation) for _, context, continuation in requests]
        return self.runtime.likelihoods(asked, self.batch_size)

    def _fit(self, context: list[int], continuation: list[int]) -> Request:
        """A request whose forward has at most `max_length` tokens: its last token is not fed."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than max_length "
                f"{self.max_length}; raise it, or use a model with a larger context"
            )
        kept = (context + continuation)[-(self.max_length + 1) :]
        return kept[: len(kept) - len(continuation)], continuation

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that share one token."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            asked = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(asked)))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to their stop strings; a task that samples draws each text by itself."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for settings, indices in groups.items():
            contexts = [requests[i].args[0] for i in indices]
            found = self._generate(contexts, json.loads(settings))
            for i, text in zip(indices, found, strict=True):
                texts[i] = text
        return texts

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        count = next((settings[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens")
                      if key in settings), self.max_gen_toks)  # fmt: skip
        room = self.max_length - count
        if room < 1:
            raise ValueError(
                f"{count} new tokens leave no room for a prompt in {self.max_length}; lower "
                "max_gen_toks"
            )
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        stop = sorted({self.eot_token_id, *self.runtime.stop_tokens})
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        decode = self.runtime.tokenizer.decode
        if temperature > 0:
            drawn = [
                list(self.runtime.generate(p, max_new_tokens=count, temperature=temperature,
                                           top_p=float(settings.get("top_p", 1.0)), seed=i,
                                           stop=stop))
                for i, p in enumerate(prompts)
            ]  # fmt: skip
        else:
            ends = _says_one_of(until, decode)
            drawn = generate_batch(
                self.runtime, prompts, Search(count), stop, self.batch_size, ends=ends
            )
        return [_cut(decode(tokens), until) for tokens in drawn]


def _says_one_of(
    strings: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> Callable[[Sequence[int]], bool]:
    """Whether a text's last tokens complete one of the strings (each has at least a byte)."""
    longest = max((len(text.encode()) for text in strings), default=0) + 4

    def ends(tokens: Sequence[int]) -> bool:
        return any(text in decode(tokens[-longest:]) for text in strings)

    return ends


def _cut(text: str, strings: Sequence[str]) -> str:
    """A text up to the first of the strings."""
    return text[: min([text.find(s) for s in strings if s and s in text], default=len(text))]


def _special_ids(path: Path, tokenizer: Any) -> dict[str, int | None]:
    """Ids of the tokens that tokenizer_config.json names as begin and end of text."""
    file = path / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids: dict[str, int | None] = {}
    for name in ("bos", "eos"):
        token = config.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        ids[name] = None if text is None else tokenizer.backend.token_to_id(text)
    return ids


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
