"""Files that are written whole or not at all, and values as strict JSON; neither ever holds a credential."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distrecon.errors import redact


def plain(value: Any, not_finite: Callable[[float], Any] = lambda number: None) -> Any:
    """Strict JSON data: tuples become lists, scalars of numpy and torch numbers, numbers that are not finite null (or
    what `not_finite` makes of them), texts lose their credentials."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact(str(key)): plain(inner, not_finite) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, not_finite) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    if hasattr(value, "item"):
        return plain(value.item(), not_finite)
    return value


def write_json(path: Path, data: Any) -> None:
    """Writes JSON whole or not at all."""
    write_text(path, json.dumps(plain(data), indent=1))


def write_text(path: Path, text: str) -> None:
    """Writes text, without credentials, whole or not at all: to a file beside it, synced, which then takes its name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(redact(text))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
