"""One JSON object from a file, read strictly: configs, indexes and tokenizer files of unknown origin pass here."""

import json
import math
from pathlib import Path
from typing import Any

from opt_core.errors import ConfigError

MAX_JSON_BYTES = 10 * 1024 * 1024
_MAX_DEPTH = 64


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads one JSON object; refuses duplicate keys, numbers that are not finite, deep nesting, and files over 10 MB.

    Raises:
        ConfigError: names the file and what is wrong with it.
        FileNotFoundError: there is no such file.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ConfigError(str(path), [f"expected at most {MAX_JSON_BYTES} bytes of JSON, got {path.stat().st_size}"])
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"),
            object_pairs_hook=unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"not valid JSON: {error}"]) from None
    if not isinstance(value, dict):
        raise ConfigError(str(path), [f"expected a JSON object, got {type(value).__name__}"])
    if _is_deeper(value, _MAX_DEPTH):
        raise ConfigError(str(path), [f"expected at most {_MAX_DEPTH} objects and lists in one another"])
    return value


def _is_deeper(value, depth: int) -> bool:
    """True where copying or printing the value could exceed the recursion limit."""
    level = [value]
    for _ in range(depth):
        inner = (item for holder in level for item in (holder.values() if isinstance(holder, dict) else holder))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return bool(level)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's fields for `json.loads`, which would let the last of two equal keys win."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"duplicate key {name!r}")
        fields[name] = value
    return fields


def _refuse_constant(name: str):
    raise ValueError(f"the constant {name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)
