"""What a run reads from local files, by content: a changed file is not silently the same stage.

Covered are the task's training file (all of it), corpus files and a local model (beyond 16 MiB a
sample, see `sources.content_hash`). Not covered are hub data sets and models, whose content is not
here, and validation data, which nothing is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bitdistill.schema import Config
from bitdistill.schema_data import Model
from bitdistill.sources import content_hash, is_local, local_files

MODEL_FILES = (".safetensors", ".gguf", ".json")
SAMPLED_BEYOND = 1 << 24  # bytes, of corpus and model files


class Inputs:
    """Hashes of the local files that each section of a configuration names."""

    def __init__(self, config: Config) -> None:
        train = config.task.train
        self.hashes = {
            "model": _hashes(_model_files(config.model)),
            "teacher_model": _hashes(_model_files(config.teacher_model)),
            "corpus": _hashes(_corpus_files(config)),
            "task": {} if train is None else {train: content_hash(Path(train))},
        }

    def of(self, sections: Iterable[str]) -> dict[str, str]:
        """File names and hashes of the given sections."""
        return {name: h for key in sections for name, h in self.hashes.get(key, {}).items()}

    def difference(self, sections: Iterable[str], before: dict[str, Any]) -> str:
        """What differs from a stage's manifest whose fingerprint is another, for a person."""
        then, now = before.get("inputs", {}), self.of(sections)
        changed = [name for name in now if then.get(name, now[name]) != now[name]]
        return f"other content of {', '.join(changed)}" if changed else "another configuration"


def _hashes(files: list[Path]) -> dict[str, str]:
    return {str(file): content_hash(file, SAMPLED_BEYOND) for file in files}


def _model_files(model: Model | None) -> list[Path]:
    if model is None or model.source == "tiny" or not Path(model.source).expanduser().is_dir():
        return []
    folder = Path(model.source).expanduser()
    return sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILES)


def _corpus_files(config: Config) -> list[Path]:
    if not (config.base.enabled or config.pretrain.enabled):
        return []
    return [f for name in config.corpus.sources if is_local(name) for f in local_files(name)]
