"""One JSON object from a file, read strictly: configs, indexes and tokenizer files of unknown origin pass here."""

import json
import math
from pathlib import Path
from typing import Any

from opt_core.errors import ConfigError

MAX_JSON_BYTES = 10 * 1024 * 1024


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads one JSON object; refuses duplicate keys, numbers that are not finite, and files over 10 MB.

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
    return value


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
