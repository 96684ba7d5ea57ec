"""`export --task`: a head of label tokens, an embedding on disk, and the same predictions."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bitdistill import backends, exporters, manifest
from bitdistill.backends import embedding_file
from bitdistill.evals import parity
from bitdistill.evals.predict import predict
from bitdistill.tasks import TASKS, Example, Task

Students = Callable[..., Path]
TASK = Task("film", "label", "{text} :", ("text",), "label", labels=("a", "b", "c"))


@pytest.fixture
def student(student_dir: Students) -> Path:
    return student_dir("gemma3_text", "paper", 8, task=TASK.to_json())


@pytest.fixture
def classifier(student: Path, tmp_path: Path) -> Path:
    return exporters.export(student, "onnx", tmp_path / "film", task="film")


def test_what_is_in_the_directory(classifier: Path) -> None:
    content = manifest.read_manifest(classifier, "artifact")
    words, hidden = content["decoder"]["vocabulary"], content["decoder"]["hidden"]
    assert len(content["label_tokens"]) == 3
    assert content["parts"]["embedding"] == words * hidden * 2
    assert (classifier / "embedding.bin").stat().st_size == words * hidden * 2
    assert content["parts"]["head"] == 3 * hidden * 4
    assert content["embedding_error"]["embedding"]["largest"] < 1e-3
    assert not (classifier / "genai_config.json").exists()
    graph = onnx.load(classifier / "model.onnx", load_external_data=False).graph
    assert graph.input[0].name == "embeddings"
    assert not any(list(tensor.dims) == [words, hidden] for tensor in graph.initializer)


@pytest.mark.parametrize("tied", [True, False])
def test_bits_a_weight_are_of_the_rows_there_are(
    student_dir: Students, tmp_path: Path, tied: bool
) -> None:
    path = student_dir("llama", "paper", 8, task=TASK.to_json(), tie_word_embeddings=tied)
    content = manifest.read_manifest(exporters.export(path, "onnx", tmp_path / "film", task="film"))
    words = content["decoder"]["vocabulary"]
    expected = (16 * words + 32 * 3) / (words + 3)
    assert content["parts"]["embedding_bits_per_weight"] == pytest.approx(expected)


@pytest.mark.parametrize("trained", [None, TASK, Task("sum", "summary", "{x}", ("x",), "y")])
def test_a_built_in_task_is_the_classifiers(
    student_dir: Students, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Task | None
) -> None:
    """Whatever the student was trained for: prompt and answers are what the head was made for."""
    votes = Task("votes", "label", "{vote}?", ("vote",), "label", labels=("d", "e"))
    monkeypatch.setitem(TASKS, "votes", votes)
    path = student_dir("llama", "paper", 8, task=trained and trained.to_json())
    out = exporters.export(path, "onnx", tmp_path / "out", task="votes")
    content = manifest.read_manifest(out)
    assert Task.from_json(content["task"]) == votes
    tokenizer = backends.load(out).tokenizer
    assert [tokenizer.decode([token]) for token in content["label_tokens"]] == ["d", "e"]
    card = (out / "README.md").read_text()
    assert "its head knows `d` and `e` alone" in card
    assert "Task: votes." in card


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ops", ["custom", "integer"])
def test_label_logits_are_those_of_the_whole_head(
    student_dir: Students, tmp_path: Path, tied: bool, ops: str
) -> None:
    path = student_dir("llama", "paper", 8, task=TASK.to_json(), tie_word_embeddings=tied)
    whole = backends.load(exporters.export(path, "onnx", tmp_path / "whole", ops=ops))
    model = backends.load(exporters.export(path, "onnx", tmp_path / "film", task="film", ops=ops))
    assert (whole.prefill_chunk, model.prefill_chunk) == (128, 64)  # for less memory
    labels = model.manifest["label_tokens"]
    tokens = [[5, 6, 7, 5], [9]]
    for found, expected in zip(model.logits(tokens), whole.logits(tokens), strict=True):
        assert found.shape == expected.shape
        np.testing.assert_allclose(found[:, labels], expected[:, labels], atol=1e-5)
        assert np.isneginf(np.delete(found, labels, axis=1)).all()
    cache = model.new_cache(4)
    step = model.step(tokens[0], cache)
    np.testing.assert_allclose(step[labels], whole.logits(tokens)[0][-1][labels], atol=1e-5)


def test_predictions_and_parity(student: Path, classifier: Path) -> None:
    storage = manifest.read_manifest(classifier)["storage"]
    model, reference = backends.load(classifier), backends.load(student, storage=storage)
    examples = [Example(i, text, "a", 0) for i, text in enumerate(("not dull", "a plot", "it is"))]
    found, expected = (predict(runtime, TASK, examples) for runtime in (model, reference))
    labels = [record["label"] for record in found.records]
    assert labels == [record["label"] for record in expected.records]
    report = parity.report(student, classifier, ["the film is not good"])
    assert report["failures"] == []
    assert report["artifact"]["finite"]
    [token] = model.generate(model.tokenizer.encode("not dull :"), max_new_tokens=1, stop=())
    assert token in model.manifest["label_tokens"]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (("a", "the film"), {}, "needs answers of one token each, all different"),
        (("a", "a"), {}, "needs answers of one token each, all different"),
        ((), {}, "needs answers of one token each"),
        (("a", "b"), {"embed_bits": 4}, "stays on disk, where fewer bits save no memory"),
    ],
)
def test_refusals(
    student_dir: Students,
    tmp_path: Path,
    labels: tuple[str, ...],
    options: dict[str, Any],
    message: str,
) -> None:
    task = Task("film", "label", "{text} :", ("text",), "label", labels=labels).to_json()
    # a width of its own: students are made once for each configuration
    path = student_dir("llama", "none", 8, task=task, intermediate_size=32 * (1 + len(str(labels))))
    with pytest.raises(ValueError, match=message):
        exporters.export(path, "onnx", tmp_path / "out", task="film", **options)


def test_other_refusals(student: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'sst'"):
        exporters.export(student, "onnx", tmp_path / "out", task="sst")
    with pytest.raises(ValueError, match="mlx has no option task"):
        exporters.export(student, "mlx", tmp_path / "out", task="film")
    (classifier / "embedding.bin").write_bytes(b"1234")
    with pytest.raises(manifest.FormatError, match="is not a table of"):
        embedding_file.EmbeddingFile(classifier / "embedding.bin", 2, 2, "float16")


@pytest.fixture(params=["pread", "lock"])
def table(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[np.ndarray[Any, Any], embedding_file.EmbeddingFile]:
    """A table (500, 8) and its file, read either way."""
    if request.param == "lock":
        monkeypatch.delattr("os.pread", raising=False)
    table = np.random.default_rng(0).standard_normal((500, 8)).astype(np.float16)
    (tmp_path / "table").write_bytes(table.tobytes())
    return table, embedding_file.EmbeddingFile(tmp_path / "table", 500, 8, "float16")


def test_rows_are_read_from_the_file(table: Any) -> None:
    tokens = np.array([[3, 499, 3], [0, 3, 7]])
    np.testing.assert_array_equal(table[1].rows(tokens), table[0].astype(np.float32)[tokens])


def test_threads_read_their_own_rows(table: Any) -> None:
    values, file = table
    orders = [np.random.default_rng(seed).integers(0, 500, 20_000) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(file.rows, orders))
    for rows, tokens in zip(found, orders, strict=True):
        np.testing.assert_array_equal(rows, values.astype(np.float32)[tokens])


def test_a_file_that_became_shorter(table: Any) -> None:
    os.truncate(table[1].path, 499 * 16 + 2)
    table[1].rows(np.array([498]))
    with pytest.raises(manifest.FormatError, match="became shorter while in use; copy it again"):
        table[1].rows(np.array([499]))


def test_the_card_is_a_classifiers(student: Path, classifier: Path, tmp_path: Path) -> None:
    card = (classifier / "README.md").read_text()
    assert "pipeline_tag: text-classification\n" in card
    assert "its head knows `a`, `b` and `c` alone" in card
    assert '"your text" --task-prompt --max-new-tokens 1' in card
    assert "model.generate(prompt, max_new_tokens=1)" in card
    whole = (exporters.export(student, "onnx", tmp_path / "whole") / "README.md").read_text()
    assert "pipeline_tag: text-generation\n" in whole
    assert "model.generate(prompt))" in whole
