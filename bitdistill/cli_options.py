"""Several command-line options at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def with_options(options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that adds several options."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add
