"""Text <-> token ids on the `tokenizers` package alone, from a directory's tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend

from bitdistill.manifest import FormatError


class Tokenizer:
    """A model's tokenizer. Raises FormatError where tokenizer.json is missing or unreadable."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FormatError(
                f"{path} is missing; load the tokenizer with transformers.AutoTokenizer and "
                "save_pretrained() it into the directory"
            )
        try:
            self.backend = Backend.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise FormatError(f"{path} cannot be read ({error}); copy it again") from error
        # Settings left by training must not pad or cut a prompt.
        self.backend.no_padding()
        self.backend.no_truncation()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text; `special` adds what the model expects around it, such as BOS."""
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def encode_all(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of many texts, on several threads."""
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=special)
        return [list(encoding.ids) for encoding in found]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of ids; special tokens are left out unless `special`."""
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as their tokens arrive; together they are `decode` of all ids.

        A character split over tokens is held back until it is whole. Each piece is decoded with
        the tokens of the piece before it, because some tokenizers write a space only in context.
        """
        tokens: list[int] = []
        start, shown = 0, 0  # tokens[start:shown] give the context of the piece to come
        for token in ids:
            tokens.append(token)
            before = self.decode(tokens[start:shown])
            text = self.decode(tokens[start:])
            if len(text) > len(before) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(before) :]
                start, shown = shown, len(tokens)
        rest = self.decode(tokens[start:])[len(self.decode(tokens[start:shown])) :]
        if rest:
            yield rest
