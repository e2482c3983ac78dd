"""JSON objects, read without trusting them; apart from files.py, because it is needed where torch is not."""

import json
from pathlib import Path
from typing import Any

AGAIN = "download it again"
# Far above any model's JSON.
_MAX_DEPTH = 50


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160].rstrip(". ") if lines else type(error).__name__


def read_json(file: Path) -> dict[str, Any]:
    return parse_json(file.read_bytes(), str(file))


def parse_json(raw: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `raw`; ValueError, beginning with `source`, for anything else and for absurd nesting."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: corrupt JSON ({first_line(error)}); {AGAIN}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source}: holds {type(content).__name__} instead of a JSON object; {AGAIN}")
    # What the parser just takes is too deep for whatever prints or writes it later, further down the stack.
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        containers = [value for value in level if isinstance(value, dict | list)]
        level = [inner for outer in containers for inner in (outer.values() if isinstance(outer, dict) else outer)]
    if level:
        raise ValueError(f"{source}: corrupt JSON (nested more than {_MAX_DEPTH} levels deep); {AGAIN}")
    return content
