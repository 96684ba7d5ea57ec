"""What a benchmark measured, as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def put(line: dict[str, Any], out: Path | None) -> None:
    """Print a line, and append it to a file if there is one."""
    text = json.dumps(line)
    print(text, flush=True)
    if out is not None:
        with out.open("a", encoding="utf-8") as stream:
            stream.write(text + "\n")
