"""Unknown names, answered with the known one that was probably meant."""

from __future__ import annotations

from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"`, or the list of known names where none is close."""
    import difflib

    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
