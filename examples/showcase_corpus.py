"""A corpus for stage 2 from Debian's documentation packages: prose, in one parquet file.

Paragraphs, list items and dictionary entries without headings, code and markup, each once, in the
order of the packages, joined to documents of 4,000 characters or more: 130M characters.

It is not the text that the published figures were measured on, whose extraction was not kept. Of
that text's 137M characters 56 % stand in paragraphs that are found here word for word, and the
dictionaries are cut otherwise. Missing are Wikipedia extracts, the Brown corpus, Jane Austen's
novels, the World Factbook, manual pages, and the documentation of Perl, GNOME and mail software:
put text of your own into `corpus.sources` beside it.
"""

from __future__ import annotations

import gzip
import html
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from showcase_tasks import Missing

SHORTEST_DOCUMENT = 4000  # characters
SHORTEST_PARAGRAPH = 60
# package -> what the column `source` calls it; each package's licence is in its copyright file
PACKAGES = {
    "anarchism": "anarchist_faq",
    "apache2-doc": "apache_doc",
    "cmake-doc": "cmake_doc",
    "debian-policy": "debian_docs",
    "debian-reference-en": "debian_docs",
    "developers-reference": "debian_docs",
    "dict-devil": "devil",
    "dict-foldoc": "foldoc",
    "dict-gcide": "gcide",
    "dict-jargon": "jargon",
    "fortunes": "fortunes",
    "git-doc": "git_doc",
    "libboost1.74-doc": "boost_doc",
    "libreoffice-help-en-us": "libreoffice_help",
    "linux-doc-6.1": "linux_doc",
    "llvm-14-doc": "llvm_doc",
    "nodejs-doc": "node_doc",
    "octave-doc": "octave_doc",
    "openjdk-17-doc": "openjdk_api",
    "postgresql-doc-15": "postgresql",
    "python-django-doc": "django_doc",
    "python3.11-doc": "python_doc",
    "qtbase5-doc-html": "qt_doc",
    "rust-doc": "rust_books",
    "sqlite3-doc": "sqlite_doc",
    "wordnet-base": "wordnet",
}
LICENCES = "free, each package's in its file `copyright`: GPL, GFDL, BSD, MIT, Apache and others"
_BLOCK = re.compile(
    r"<(?:p|dd|li|div class=\"block\")\b[^>]*>(.*?)"
    r"(?=</?(?:p|dd|dt|li|ul|ol|dl|div|pre|table|h\d|body)\b)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"<[^>]*>")
_OTHER_LANGUAGES = re.compile(r"/manual/(?!en/)|/(?:de|es|fr|it|ja|ko|pt|ru|zh)(?:[-_]\w+)?/")


def from_page(page: str) -> Iterator[str]:
    """The paragraphs and list items of a page of HTML."""
    for block in _BLOCK.findall(page):
        yield html.unescape(_TAG.sub("", block))


def from_wordnet(data: str) -> Iterator[str]:
    """`words: gloss` for every set of synonyms."""
    for line in data.splitlines():
        if line[:1].isdigit():
            entry, _, gloss = line.partition(" | ")
            fields = entry.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            yield f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}."


def paragraphs(path: str, content: bytes) -> Iterator[str]:
    """What a file of a package has to say, if it is of a kind that is read here."""
    text = (gzip.decompress(content) if path.endswith(".dz") else content).decode(
        "utf-8", "replace"
    )
    if path.endswith((".html", ".htm")) and not _OTHER_LANGUAGES.search(path):
        yield from from_page(text)
    elif path.endswith(".dict.dz"):
        yield from text.split("\n\n")
    elif "/wordnet/data." in path:
        yield from from_wordnet(text)
    elif re.search(r"/games/fortunes/[\w-]+$", path):
        yield from text.split("\n%\n")


def is_prose(text: str) -> bool:
    """Long enough, and made of words for the most part."""
    letters = sum(c.isalpha() or c == " " for c in text)
    return len(text) >= SHORTEST_PARAGRAPH and letters > 0.8 * len(text)


def documents(files: Iterable[tuple[str, bytes]], seen: set[int]) -> Iterator[str]:
    """Paragraphs that were not `seen` before, joined up to the end of a file."""
    parts: list[str] = []
    for path, content in files:
        for text in (" ".join(part.split()) for part in paragraphs(path, content)):
            if is_prose(text) and hash(text) not in seen:
                seen.add(hash(text))
                parts.append(text)
                if not path.endswith("html") and sum(map(len, parts)) >= SHORTEST_DOCUMENT:
                    yield "\n".join(parts)
                    parts = []
        if sum(map(len, parts)) >= SHORTEST_DOCUMENT:
            yield "\n".join(parts)
            parts = []
    if parts:
        yield "\n".join(parts)


def members(deb: Path) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in a Debian package."""
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpack,
        tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
    ):
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def from_apt(name: str, packages: Path) -> Path:
    """The newest .deb of a package, downloaded into `packages` unless it lies there."""
    if not list(packages.glob(f"{name}_*.deb")):
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise Missing(f"{name} is a Debian package, and apt-get and dpkg-deb are not here")
        command = ["apt-get", "-q", "download", name]
        if subprocess.run(command, cwd=packages, stdout=sys.stderr).returncode:
            raise Missing(f"apt-get cannot download {name} (Debian bookworm has it)")
    return max(packages.glob(f"{name}_*.deb"))


def write_corpus(out: Path, packages: Path) -> None:
    """A parquet file with columns text and source; a package that is missing is left out, and said.

    Raises Missing where none can be had.
    """
    import pyarrow
    from pyarrow import parquet

    columns: dict[str, list[str]] = {"text": [], "source": []}
    seen: set[int] = set()
    for name, source in PACKAGES.items():
        try:
            found = list(documents(members(from_apt(name, packages)), seen))
        except Missing as missing:
            print(f"corpus: without {source}: {missing}", file=sys.stderr)
            continue
        print(f"corpus: {name}: {sum(map(len, found)):,} characters", file=sys.stderr)
        columns["text"] += found
        columns["source"] += [source] * len(found)
    if not columns["text"]:
        raise Missing("none of its Debian packages can be had")
    out.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), out, compression="zstd")
