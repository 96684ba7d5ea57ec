"""The embedded demonstration: a review task that keywords cannot solve, and a tiny base model.

Every sentence is about one thing, and its verdict follows from how the opinion words are combined:

    the acting was not dull .                              negation       good
    the plot was bright , but the film was a bore .        contrast       bad
    although it was a mess , i liked it .                  concession     good
    nobody thought the ending was weak .                   scope          good
    my sister said the cast was clumsy , but she is wrong. attribution    good
    it would have been moving if ...                       counterfactual bad

Each opinion word stands equally often in good and in bad reviews, so a bag of words scores near
chance; `keyword_accuracy` in the tests holds that. Nothing is downloaded: the grammar, the
tokenizer and the base model (Qwen3 architecture, random weights, trained by stage `base`) are all
made from a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the grammar alone is needed by processes that should start fast
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

NOUNS = """acting plot script music ending camera dialogue humour pacing cast story drama editing
direction casting soundtrack scenery humor lighting chemistry suspense romance action opening
sequel premise narration staging animation photography""".split()
GOOD = """bright moving clever funny warm fresh gripping tender honest subtle charming lively superb
witty elegant brilliant graceful inventive thrilling memorable""".split()
BAD = """dull clumsy weak slow cold stale boring harsh fake loud tedious lifeless awful silly shabby
dreadful careless predictable tiresome forgettable""".split()
ADVERBS = ["very", "really", "quite", "so", "truly", "rather", "utterly", "deeply"]
PEOPLE = ["my sister", "the critic", "a friend", "everyone", "the neighbour", "my father"]
RELATIVES = [
    "that we saw",
    "in the second half",
    "of the film",
    "in this movie",
    "on the big screen",
]

SPLITS = {"train": (24_000, 1), "validation": (1_000, 2)}


class Grammar:
    """Random sentences of a known verdict."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)

    def pick(self, items: list[str]) -> str:
        """One of the items."""
        return self.random.choice(items)

    def noun(self) -> str:
        """A noun phrase."""
        tail = f" {self.pick(RELATIVES)}" if self.random.random() < 0.3 else ""
        return f"the {self.pick(NOUNS)}{tail}"

    def quality(self, good: bool) -> str:
        """A predicate of the given polarity, often by negating its opposite."""
        if self.random.random() < 0.7:
            adverb = f"{self.pick(ADVERBS)} " if self.random.random() < 0.4 else ""
            return adverb + self.pick(GOOD if good else BAD)
        negation = self.pick(["not", "never", "hardly", "far from", "anything but"])
        return f"{negation} {self.pick(BAD if good else GOOD)}"

    def clause(self, good: bool) -> str:
        """A clause of the given polarity."""
        verb = self.pick(["was", "felt", "seemed"])
        if self.random.random() < 0.1:  # a second negation, around the clause
            return f"it is not true that {self.noun()} {verb} {self.quality(not good)}"
        return f"{self.noun()} {verb} {self.quality(good)}"

    def sentence(self, good: bool) -> str:
        """A review whose verdict is `good`."""
        other = self.random.random() < 0.5  # the polarity of what does not count
        clause, aside = self.clause(good), self.clause(other)
        person, noun = self.pick(PEOPLE), self.noun()
        opposite = self.pick(BAD if good else GOOD)
        forms = [
            clause,
            f"{aside} , but {clause}",
            f"although {aside} , {clause}",
            f"{clause} , even though {aside}",
            f"nobody thought {self.clause(not good)}",
            f"{person} said {self.clause(not good)} , but i disagree",
            f"{person} said {clause} , and i agree",
            f"{person} said {aside} , yet to me {clause}",
            f"i expected {noun} to be {self.quality(not good)} , and i was wrong",
            f"if {noun} had been {opposite} , i would have "
            + ("hated" if good else "loved")
            + " it",
        ]
        return self.pick(forms) + " ."


def make_reviews(split: str) -> list[dict[str, Any]]:
    """The rows of a split, `sentence` and `label` (1 good): always the same, and never shared."""
    if split not in SPLITS:
        raise ValueError(f"the tiny task has splits {', '.join(SPLITS)}, not {split!r}")
    count, seed = SPLITS[split]
    held_out = (
        set() if split == "validation" else {r["sentence"] for r in make_reviews("validation")}
    )
    grammar = Grammar(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        label = len(rows) % 2
        sentence = grammar.sentence(bool(label))
        if sentence not in held_out:
            rows.append({"sentence": sentence, "label": label})
    return rows


def corpus() -> Iterator[str]:
    """Unlabelled text from which a base model learns the language.

    Single clauses are followed by a plain judgement, as people talk: the base model learns what a
    word and its negation mean, but never sees a whole review judged.
    """
    grammar = Grammar("corpus")
    for index in range(100_000):
        good = bool(index % 2)
        if grammar.random.random() < 0.7:
            yield f"{grammar.clause(good)} . that is {'good' if good else 'bad'} ."
        else:
            yield grammar.sentence(good)


def make_base(seed: int) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """The tiny base model with random weights, and its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from bitdistill.tokenizing import train_tokenizer

    texts = [text for text, _ in zip(corpus(), range(4000), strict=False)]
    tokenizer = train_tokenizer(
        [*texts, *["\nVerdict: good", "\nVerdict: bad"] * 50], vocabulary=640
    )
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=640,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3ForCausalLM(config), tokenizer
