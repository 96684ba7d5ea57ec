"""The paper's experiments on files laid out as the hub has them, under the hub's names.

Models are tiny ones of each architecture in folders called as on the hub. Data sets are parquet
with the hub's columns, configurations and splits; `datasets` resolves and reads them as it would
there, told only where they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from short_runs import log_of, stages_of

from bitdistill.config import EXPERIMENTS, load_config
from bitdistill.distributed import World
from bitdistill.dry_run import dry_run
from bitdistill.feeds import corpus_batches, task_batches
from bitdistill.recipe import train
from bitdistill.schema import Config
from bitdistill.tasks import load_examples
from bitdistill.teacher import load_model

WORDS = "the film is not good bad but very dull bright and we liked it a plot".split()
FAMILIES = {
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-1.7B": "qwen3",
    "Qwen/Qwen3-4B": "qwen3",
    "Qwen/Qwen2.5-0.5B": "qwen2",
    "google/gemma-3-1b-pt": "gemma3_text",
}
GLUE = {"sst2": ("sentence",), "qnli": ("question", "sentence"), "mnli": ("premise", "hypothesis")}
LABELS = {"sst2": 2, "qnli": 2, "mnli": 3}
SHORT = ["machine.device=cpu", "machine.workers=0", "machine.pad_multiple=8"]
for _stage in ("teacher", "bitnet_sft", "pretrain", "distill"):
    SHORT += [f"{_stage}.steps=1", f"{_stage}.batch_size=2", f"{_stage}.accumulate=1"]
    SHORT += [f"{_stage}.max_length=48"]


def sentence(index: int) -> str:
    return " ".join(WORDS[(index + step) % len(WORDS)] for step in range(4 + index % 3))


def glue_rows(columns: tuple[str, ...], labels: int, split: str) -> dict[str, list[Any]]:
    rows: dict[str, list[Any]] = {c: [sentence(i) for i in range(8)] for c in columns}
    label = [-1] * 8 if split.startswith("test") else [i % labels for i in range(8)]
    return rows | {"label": label, "idx": list(range(8))}


def write(path: Path, columns: dict[str, list[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def card(folder: Path, configurations: dict[str, list[str]]) -> None:
    """The header by which the hub's data sets say where their splits are."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        start = "data" if name == "default" else name
        for split in splits:
            lines += [f"  - split: {split}", f"    path: {start}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    glue = root / "nyu-mll/glue"
    splits = {name: ["train", "validation", "test"] for name in GLUE}
    matched = [f"{kind}_{which}" for kind in ("validation", "test") for which in ("m", "mism")]
    splits["mnli"] = ["train", *(f"{name}atched" for name in matched)]
    for name, columns in GLUE.items():
        for split in splits[name]:
            file = glue / name / f"{split}-00000-of-00001.parquet"
            write(file, glue_rows(columns, LABELS[name], split))
    card(glue, splits)
    news = root / "abisee/cnn_dailymail"
    for split in ("train", "validation", "test"):
        text = [" ".join([sentence(i)] * 30) for i in range(8)]
        rows = {"article": text, "highlights": [sentence(i) for i in range(8)]}
        write(news / f"3.0.0/{split}-00000-of-00001.parquet", rows | {"id": [f"{i}" for i in text]})
    card(news, {"3.0.0": ["train", "validation", "test"]})
    web = root / "tiiuae/falcon-refinedweb"
    for part in range(2):  # the hub's columns, of which one is read
        pages: dict[str, list[Any]] = {"content": [sentence(i) + "\n" for i in range(200)]}
        pages |= {"url": ["http://a"] * 200, "timestamp": [0] * 200, "dump": ["CC"] * 200}
        pages |= {"segment": ["1"] * 200, "image_urls": [[["a", "b"]]] * 200}
        write(web / f"data/train-{part:05d}-of-00002.parquet", pages)
    card(web, {"default": ["train"]})
    return root


@pytest.fixture
def offline(
    hub: Path,
    make_teacher: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub's data sets and models under their names, in a folder that is worked in."""
    import datasets

    load = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *rest, **options: load(
            str(hub / name), *rest, **options
        )
    )  # fmt: skip
    work = tmp_path / "work"
    for source, family in FAMILIES.items():
        (work / source).mkdir(parents=True)
        make_teacher(family).save_pretrained(work / source)
        tokenizer.save_pretrained(work / source)
    monkeypatch.chdir(work)


def test_the_table_of_experiments() -> None:
    """Three sizes by four tasks, and two other families on MNLI."""
    assert len(EXPERIMENTS) == len(set(EXPERIMENTS)) == 14
    configs = [load_config(name) for name in EXPERIMENTS]
    assert {c.model.source for c in configs} == set(FAMILIES)
    for config in configs:
        for stage in (config.teacher, config.bitnet_sft, config.pretrain, config.distill):
            assert stage.enabled
            assert (stage.batch_size * stage.accumulate, stage.max_length) == (32, 512)
        assert config.corpus.sources == ["tiiuae/falcon-refinedweb"]
        assert config.corpus.column == "content"


@pytest.mark.usefixtures("offline")
def test_every_experiment_finds_its_model_and_data() -> None:
    for name in EXPERIMENTS:
        config: Config = load_config(name, SHORT)
        model, tokenizer = load_model(config.model)
        assert model.config.model_type == FAMILIES[config.model.source]
        batch = task_batches(config, config.distill, tokenizer, World()).window(0)[0]
        assert batch["input_ids"].shape[0] == 2
        assert (batch["labels"] >= 0).any()
        task = config.task.resolve()
        for split in task.evaluation_splits:
            assert len(load_examples(task, None, split)) == 8
        text = corpus_batches(config, config.pretrain, tokenizer, World())
        assert text.window(0)[0]["input_ids"].shape == (2, 48)
        text.close()


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name", ["qwen3-4b+cnn_dailymail+paper", "gemma3-1b+mnli+paper", "qwen2.5-0.5b+mnli+authors"]
)
def test_an_experiment_runs(name: str, tmp_path: Path) -> None:
    """Every stage, one step each; what was not shortened is as shipped."""
    out = tmp_path / "run"
    student = train(load_config(name, SHORT), out, quiet=True)
    assert stages_of(out) == {
        "teacher", "bitnet-sft", "refined", "pretrained", "student"
    }  # fmt: skip
    assert [r["stage"] for r in log_of(out)] == ["teacher", "bitnet-sft", "pretrained", "student"]
    content = json.loads((student / "bitdistill.json").read_text())
    assert content["method"] == f"bitdistill-{name.rpartition('+')[2]}"
    assert set(content["metrics"]["terms"]) >= {"ce", "logits", "relations"}


@pytest.mark.usefixtures("offline")
def test_a_dry_run_says_what_it_would_cost() -> None:
    report = dry_run(load_config("qwen3-0.6b+sst2+paper", SHORT))
    assert "cost: on one H100, computed and not measured: " in report
    for stage in ("teacher", "bitnet-sft", "pretrained", "student"):
        assert f"{stage} " in report.splitlines()[-1]
