"""Names that resolve to code only when used: `"package.module:attribute"` strings in a table.

Backends and exporters are listed this way, so that listing them imports no runtime, and adding one
is a file and a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from bitdistill.names import suggest


def resolve(table: Mapping[str, str], name: str, what: str) -> Any:
    """The object a table names; `what` is its kind in messages ("backend", "target").

    Raises ValueError with a suggestion for an unknown name, and ImportError with the pip command
    where the module needs a package that is not installed.
    """
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}{suggest(name, table)}")
    module, attribute = table[name].split(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "bitdistill"):
            raise
        raise ImportError(
            f"{what} {name!r} needs the package {package}, which is not installed; "
            f"run: pip install {package.replace('_', '-')}"
        ) from error
