"""The direction of imports, what stays light, and what no file may do; read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "bitdistill": "bitdistill",
    "backends": "bitdistill.backends",
    "exporters": "bitdistill.exporters",
    "evals": "bitdistill.evals",
}
SOURCES = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
ALL_PYTHON = sorted(p for f in (*FOLDERS, "tests", "examples") for p in (ROOT / f).rglob("*.py"))
ROOMS = ("backends", "exporters", "evals")

# What each room may use of the others. The exceptions have reasons: doctor examines the runtimes,
# and an exporter writes the layout that its backend reads.
CORE_WITHOUT_TORCH = {
    "bitdistill",
    "bitdistill.decoder",
    "bitdistill.manifest",
    "bitdistill.names",
    "bitdistill.packing",
    "bitdistill.tables",
}
CORE_EXCEPTIONS = {
    "bitdistill.cli": {"backends", "exporters", "evals"},
    "bitdistill.cli_eval": {"exporters", "evals"},
    "bitdistill.doctor": {"backends"},
    "bitdistill": {"backends", "exporters", "evals"},  # by name only, when they are asked for
}
TORCH_RUNTIME = {"bitdistill.checkpoint", "bitdistill.quantize", "bitdistill.student"}
PUBLIC_BACKENDS = {
    "bitdistill.backends",
    "bitdistill.backends.base",
    "bitdistill.backends.generation",
    "bitdistill.backends.search",
    "bitdistill.backends.tokenizer",
}
EXPORTER_BACKENDS = {
    "bitdistill.backends.registry",
    "bitdistill.backends.mlx_layout",
    "bitdistill.backends.embedding_file",
    "bitdistill.backends.kv_cache",
    "bitdistill.backends.kernels",  # where the library is that an artifact may carry
    "bitdistill.backends.tokenizer",
}
# A single layer lies below the protocol, and so do a model's two ends.
LAYERS = {
    f"bitdistill.backends.{name}"
    for name in (
        "kv_cache",
        "onnx_probe",
        "onnx_runtime",
        "onnx_session",
        "torch_runtime",
        "torch_storage",
    )
}
HEAVY = ("torch", "transformers", "datasets", "onnx", "onnxruntime", "mlx", "numpy", "pydantic")


def module_of(path: Path) -> str:
    """`backends/base.py` -> `bitdistill.backends.base`."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    parts = [FOLDERS[folder], *rest]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports_of(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Every module a file imports, at any depth; submodules imported by `from` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & set(MODULES)
            yield from submodules
            if submodules != names:
                yield node.module


def room_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if part in ROOMS else "core"


def ours(path: Path) -> set[str]:
    return {name for name in imports_of(path) if name.split(".")[0] == "bitdistill"}


def modules_in(room: str) -> list[str]:
    return [name for name in MODULES if room_of(name) == room]


def test_every_import_of_ours_exists() -> None:
    for path in SOURCES:
        assert ours(path) <= set(MODULES), path


@pytest.mark.parametrize("module", modules_in("core"))
def test_the_core_imports_no_other_room(module: str) -> None:
    rooms = {room_of(name) for name in ours(MODULES[module])} - {"core"}
    assert rooms <= CORE_EXCEPTIONS.get(module, set())


@pytest.mark.parametrize("module", modules_in("backends"))
def test_backends_import_little_of_the_core(module: str) -> None:
    allowed = CORE_WITHOUT_TORCH | set(modules_in("backends"))
    if module.removeprefix("bitdistill.backends.") in ("torch_runtime", "torch_storage"):
        allowed = allowed | TORCH_RUNTIME
    assert ours(MODULES[module]) <= allowed


@pytest.mark.parametrize("module", [m for m in modules_in("backends") if ".torch_" not in m])
def test_only_the_torch_modules_import_torch(module: str) -> None:
    """Nor does anything that the other runtimes import, however far away."""
    seen: set[str] = set()
    pending = [module]
    while pending:
        name = pending.pop()
        seen.add(name)
        found = set(imports_of(MODULES[name], top_only=not name.startswith("bitdistill.backends")))
        assert not {f.split(".")[0] for f in found} & {"torch", "transformers"}, name
        pending += sorted((found & set(MODULES)) - seen)


@pytest.mark.parametrize("module", modules_in("exporters"))
def test_exporters_do_not_evaluate(module: str) -> None:
    found = ours(MODULES[module])
    assert not {name for name in found if room_of(name) == "evals"}
    assert {name for name in found if room_of(name) == "backends"} <= EXPORTER_BACKENDS


@pytest.mark.parametrize("module", modules_in("evals"))
def test_evals_know_backends_by_their_protocol(module: str) -> None:
    found = ours(MODULES[module])
    assert not {name for name in found if room_of(name) == "exporters"}
    allowed = PUBLIC_BACKENDS | (
        LAYERS if module.endswith(("parity_layers", "parity_ends")) else set()
    )
    assert {name for name in found if room_of(name) == "backends"} <= allowed


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("statement", "heavy"),
    [
        ("import bitdistill", HEAVY),
        ("import bitdistill; bitdistill.exporters.export", ("torch", "onnx", "mlx", "pydantic")),
        ("import bitdistill; bitdistill.evals.run", ("torch", "onnxruntime", "mlx", "datasets")),
        ("import bitdistill; bitdistill.backends.load", ("torch", "onnxruntime", "mlx")),
        ("import bitdistill.backends.onnx_runtime", ("torch", "transformers", "mlx")),
        ("import bitdistill.backends.mlx_runtime", ("torch", "transformers", "onnxruntime")),
        ("import bitdistill; bitdistill.load_config", ("torch", "transformers", "datasets")),
    ],
)
def test_what_an_import_loads(statement: str, heavy: tuple[str, ...]) -> None:
    assert run(f"{statement}\nimport sys\nprint(sorted({set(heavy)!r} & set(sys.modules)))") == "[]"


def test_public_names() -> None:
    program = (
        "import bitdistill\nfor name in bitdistill.__all__: print(name, getattr(bitdistill, name))"
    )
    assert len(run(program).splitlines()) == 8
    program = "import bitdistill\ntry: bitdistill.nonsense\nexcept AttributeError as e: print(e)"
    assert run(program) == "module 'bitdistill' has no attribute 'nonsense'"


# --- safety and size ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_foreign_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"} & set(
        imports_of(path)
    )
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in ("eval", "exec", "torch.load", "yaml.load", "os.system")
        keywords = {k.arg: k.value for k in node.keywords}
        for name in ("trust_remote_code", "allow_pickle", "shell"):
            value = keywords.get(name)
            assert value is None or (isinstance(value, ast.Constant) and value.value is False)


def test_the_safety_test_sees_calls() -> None:
    calls = [
        n for p in SOURCES for n in ast.walk(ast.parse(p.read_text())) if isinstance(n, ast.Call)
    ]
    assert len(calls) > 1000


@pytest.mark.parametrize("path", ALL_PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 500
    assert ast.get_docstring(ast.parse(text))
