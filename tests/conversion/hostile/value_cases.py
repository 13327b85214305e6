"""Values that are no weights, in sound files: NaN, infinities, zeros, and what a narrower dtype cannot hold."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hostile.bases import BASES, TENSORS, with_value
from hostile.case import Case, cases
from hostile.index_cases import index_of
from hostile.metaseq_cases import NORM, PART, changed_tensor

FORMATS = (
    "safetensors", "torch-bin", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors", "metaseq", "orbax",
    "tf-checkpoint", "keras-hub",
)  # fmt: skip
NAME = "decoder.layers.1.fc1.weight"
BIAS = "decoder.layers.2.fc2.bias"


def rewritten(base: str, change: Callable[[dict], dict]) -> Callable[[Path], None]:
    """Writes the checkpoint again, with other values."""

    def damage(folder: Path) -> None:
        tensors = BASES[base].keywords.get("tensors", TENSORS)
        BASES[base](folder, tensors=change(tensors), overwrite=True, allow_nonfinite=True)

    return damage


def holding(base: str, value: float, name: str = NAME) -> Callable[[Path], None]:
    return rewritten(base, lambda tensors: with_value(tensors, value, name))


def zeros(tensors: dict) -> dict:
    return {**tensors, NAME: np.zeros_like(tensors[NAME])}


CASES: list[Case] = [
    *(
        case
        for base in FORMATS
        for case in cases(
            base,
            7,
            [
                ("NaN", holding(base, np.nan), NAME, "finite"),
                ("an infinity", holding(base, np.inf), NAME, "finite"),
                ("minus infinity in a bias", holding(base, -np.inf, BIAS), BIAS, "finite"),
            ],
        )
    ),
    *(
        Case(
            "a value that float16 cannot hold",
            base,
            7,
            holding(base, -7e4),
            NAME,
            "its largest magnitude 70000 overflows float16",
            writing=dict(dtype="float16"),
        )
        for base in FORMATS
    ),
]


def resized(folder: Path) -> None:
    index = json.loads(index_of(folder).read_text())
    index["metadata"]["total_size"] += 1
    index_of(folder).write_text(json.dumps(index))


WARNINGS: list[Case] = [
    *(Case("a matrix of zeros", base, 7, rewritten(base, zeros), NAME, "zeros alone") for base in FORMATS),
    *(Case("another total size", f"{base} in shards", 4, resized, "total_size", "expected") for base in FORMATS[:6]),
    Case("copies that differ a little", "metaseq unflattened", 5,
         changed_tensor(NORM, lambda values: values + 1e-5, PART.format(1)), NORM, "largest difference"),
]  # fmt: skip
