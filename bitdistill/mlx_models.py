"""Make mlx-lm know our students, without importing mlx ourselves.

mlx-lm looks an architecture up by importing `mlx_lm.models.<model_type>`. A finder answers for the
names that begin as our model types do, with the one architecture that serves every family; nothing
is loaded until mlx-lm asks. So `import bitdistill` is all that `mlx_lm.load` needs, and no code
from a model directory runs.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # their module takes as long to import as all the rest of `import bitdistill`
    Loader = MetaPathFinder = object

PREFIX = "mlx_lm.models.bitdistill_"


class _Loader(Loader):
    """Fills a module with the names that mlx-lm takes from an architecture."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Python's own kind of module will do."""

    def exec_module(self, module: ModuleType) -> None:
        architecture = importlib.import_module("bitdistill.backends.mlx_architecture")
        module.Model = architecture.Model  # type: ignore[attr-defined]
        module.ModelArgs = architecture.ModelArgs  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    """Finds our architectures among mlx-lm's."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, _Loader()) if name.startswith(PREFIX) else None


def register() -> None:
    """Register with Python's import system; called once, by `import bitdistill`."""
    sys.meta_path.append(_Finder())
