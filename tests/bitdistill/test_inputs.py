"""What a stage was made from: a changed file is another stage, a copied one is not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from bitdistill import manifest
from bitdistill.hardware import TrainingError
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.sources import content_hash


@pytest.mark.parametrize(
    ("size", "most"), [(1 << 12, None), (1 << 12, 1 << 12), (1 << 17, 1 << 12)]
)
def test_the_hash_of_a_file(tmp_path: Path, size: int, most: int | None) -> None:
    """Content, not times; of large files the size and a sample."""
    file = tmp_path / "data.jsonl"
    content = bytes(i % 251 for i in range(size))
    file.write_bytes(content)
    first = content_hash(file, most)
    os.utime(file, (1, 1))
    assert content_hash(file, most) == first
    for altered in (b"?" + content[1:], content[:-1] + b"?", content + b"?"):
        file.write_bytes(altered)
        assert content_hash(file, most) != first
    reads_all = most is None or size <= most
    file.write_bytes(content[:1000] + b"?" + content[1001:])
    assert (content_hash(file, most) != first) == reads_all


def change(file: Path) -> None:
    """One character, and neither size nor time."""
    times, content = file.stat(), file.read_bytes()
    at = content.rindex(b"0")
    file.write_bytes(content[:at] + b"1" + content[at + 1 :])
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "stage"), [("train.jsonl", "teacher"), ("model/config.json", "teacher")]
)
def test_a_changed_file_is_another_stage(
    recipe: Callable[..., Config], tmp_path: Path, name: str, stage: str
) -> None:
    out = tmp_path / "run"
    train(recipe(), out, quiet=True)
    assert str(tmp_path / name) in manifest.read_manifest(out / stage)["inputs"]
    os.utime(tmp_path / name, (1, 1))
    train(recipe(), out, quiet=True)
    change(tmp_path / name)
    with pytest.raises(TrainingError) as caught:
        train(recipe(), out, quiet=True)
    assert str(caught.value) == (
        f"{out / stage} was made with other content of {tmp_path / name}; use another --out, or "
        "remove it and the stages after it"
    )


def test_a_changed_corpus_is_another_pre_training(
    recipe: Callable[..., Config], tmp_path: Path
) -> None:
    """And no other teacher; validation data is not trained on."""
    (tmp_path / "text.jsonl").write_text('{"text": "the film is good 0"}\n' * 9)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"sentence": "good", "label": 0}\n')
    config = recipe(
        "pretrain.enabled=true",
        f"corpus.sources=[{tmp_path / 'text.jsonl'}]",
        f"task.validation={held_out}",
    )
    out = tmp_path / "run"
    train(config, out, quiet=True)
    change(held_out)
    train(config, out, quiet=True)
    change(tmp_path / "text.jsonl")
    with pytest.raises(TrainingError, match=r"refined was made with other content of .*text"):
        train(config, out, quiet=True)
