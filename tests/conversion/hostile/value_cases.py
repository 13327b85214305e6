"""Values that are no weights, in files that are sound: NaN, infinities, and what a narrower dtype cannot hold."""

import inspect
from collections.abc import Callable
from pathlib import Path

import numpy as np

from conversion import write_checkpoint
from hostile.bases import with_value, write
from hostile.case import Case, cases

FORMATS = ("safetensors", "torch-bin", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors")
NAME = "decoder.layers.1.fc1.weight"


def holding(value: float, name: str = NAME) -> Callable[[Path, str], None]:
    """Writes the checkpoint again, with one value in it."""
    return lambda folder, format: write(folder, format, with_value(value, name), overwrite=True, allow_nonfinite=True)


def of(format: str, write_value: Callable[[Path, str], None]) -> Callable[[Path], None]:
    return lambda folder: write_value(folder, format)


VALUES = [
    ("NaN", holding(np.nan), NAME, "finite"),
    ("an infinity", holding(np.inf), NAME, "finite"),
    ("minus infinity in a bias", holding(-np.inf, "decoder.layers.2.fc2.bias"), "decoder.layers.2.fc2.bias", "finite"),
]
TOO_LARGE = ("a value that float16 cannot hold", holding(-7e4), NAME, "its largest magnitude 70000 overflows float16")
CASES: list[Case] = [
    *(
        case
        for format in FORMATS
        for case in cases(format, 7, [(id, of(format, change), names, says) for id, change, names, says in VALUES])
    ),
    *(
        Case(id, format, 7, of(format, change), names, says, writing=dict(dtype="float16"))
        for format in FORMATS
        for id, change, names, says in [TOO_LARGE]
    ),
]
if "allow_nonfinite" not in inspect.signature(write_checkpoint).parameters:
    CASES.clear()
