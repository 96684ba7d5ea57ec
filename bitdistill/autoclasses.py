"""Make transformers' Auto classes know our students, without importing transformers ourselves.

`import bitdistill` must stay light, and `AutoModelForCausalLM.from_pretrained(student_dir)` must
work after it. Registering needs the model classes, which cannot be imported while transformers is
itself being imported. So a finder waits for the module of `AutoConfig` and arms its
`from_pretrained`, which every Auto class calls first: its first use registers our classes and puts
the original method back.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.abc import Loader, MetaPathFinder
else:  # as in mlx_models.py
    Loader = MetaPathFinder = object

_CONFIGURATION = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register every family's student with AutoConfig and AutoModelForCausalLM."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from bitdistill.decoder import FAMILIES, config_class
    from bitdistill.student import model_class

    for family in FAMILIES:
        config = config_class(family)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModelForCausalLM.register(config, model_class(family), exist_ok=True)


def _arm(module: ModuleType) -> None:
    """Let the first `AutoConfig.from_pretrained` register our classes."""
    auto_config = module.AutoConfig
    original = auto_config.__dict__["from_pretrained"]

    def first_use(cls: type, *args: Any, **kwargs: Any) -> Any:
        auto_config.from_pretrained = original
        register()
        return original.__get__(None, cls)(*args, **kwargs)

    auto_config.from_pretrained = classmethod(first_use)


class _Loader(Loader):
    """Runs the real loader, then arms the module."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _arm(module)


class _Finder(MetaPathFinder):
    """Finds AutoConfig's module as Python would, with our loader around its loader."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _CONFIGURATION:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def watch() -> None:
    """Arm AutoConfig now if it is loaded, else when it is; called once, by `import bitdistill`."""
    if _CONFIGURATION in sys.modules:
        _arm(sys.modules[_CONFIGURATION])
    else:
        sys.meta_path.insert(0, _Finder())
