"""Directories: names that stay inside, links that are followed, one writer at a time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitdistill import manifest


def write(path: Path, text: str, force: bool = False) -> None:
    with manifest.new_directory(path, force=force) as partial:
        (partial / "weights").write_text(text)
        manifest.write_manifest(partial, "artifact", {})


def test_a_hugging_face_cache_is_read_through_its_links(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    write(tmp_path / "whole", "good")
    snapshot.mkdir(parents=True)
    shutil.move(tmp_path / "whole", blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    content = manifest.read_manifest(snapshot)
    manifest.verify_files(snapshot, content)
    (blobs / "weights").write_text("evil")
    with pytest.raises(manifest.FormatError, match="does not match the hash"):
        manifest.verify_files(snapshot, content)


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "/etc/passwd", r"..\outside", r"C:\outside", "C:o"]
)
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").write_text("x")
    path = tmp_path / "inside"
    path.mkdir()
    with pytest.raises(manifest.FormatError, match="outside the directory"):
        manifest.check_sizes(path, {"files": {name: {"bytes": 1}}})


def test_a_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    write(path, "old")
    with manifest.new_directory(path, force=True) as partial:
        (partial / "weights").write_text("first")
        with pytest.raises(FileExistsError, match=r"written by another process; wait .* --out"):
            write(path, "second", force=True)
        program = (
            "import sys; from pathlib import Path; from bitdistill import manifest\n"
            "manifest.new_directory(Path(sys.argv[1]), force=True).__enter__()"
        )
        other = subprocess.run(
            [sys.executable, "-c", program, path], capture_output=True, text=True
        )
        assert "being written by another process" in other.stderr
        manifest.write_manifest(partial, "artifact", {})
    manifest.verify_files(path, manifest.read_manifest(path))
    assert (path / "weights").read_text() == "first"
    assert os.listdir(tmp_path) == ["artifact"]


def test_what_a_dead_writer_left_is_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    manifest.partial_of(path).mkdir()
    (manifest.partial_of(path) / "half").write_text("x")
    (tmp_path / "artifact.lock.partial").touch()
    write(path, "new")
    assert os.listdir(tmp_path) == ["artifact"]
    assert sorted(os.listdir(path)) == [manifest.MANIFEST, "weights"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "real", "old")
    link = tmp_path / "link"
    link.symlink_to("real")
    for text in ("new", "newer"):
        write(link, text, force=True)
        assert link.is_symlink()
        assert (tmp_path / "real" / "weights").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_here_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=r"exists; pass --force"):
        write(Path(), "new")
    write(Path(), "new", force=True)
    assert (tmp_path / "weights").read_text() == "new"
    with pytest.raises(FileExistsError, match="cannot be a directory there"):
        write(Path("/"), "new", force=True)


@pytest.mark.parametrize("key", ["kind", "files"])
def test_a_manifest_without_what_is_compared_is_refused(key: str, tmp_path: Path) -> None:
    write(tmp_path / "artifact", "text")
    file = tmp_path / "artifact" / manifest.MANIFEST
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))
    with pytest.raises(manifest.FormatError, match=f"has no {key}: altered; make or copy the dir"):
        manifest.read_manifest(tmp_path / "artifact")
