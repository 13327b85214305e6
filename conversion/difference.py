"""What differs between two checkpoints of any formats, weight by weight, in the schema's names and layout.

Values are read piece by piece. What a difference means to a model's outputs, it does not say.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from conversion.background import Background
from conversion.blocks import as_bits, joined_blocks, paired
from conversion.checkpoint import Checkpoint
from conversion.manifest import Manifest, Record
from conversion.stored import DTYPES
from opt_core.config import OPTConfig

_BLOCK_VALUES = 1 << 18  # that are compared as float64 at a time
_SAYS_NOTHING_OF_THE_MODEL = ("architectures", "torch_dtype", "extra")  # dtypes are compared weight by weight

Advance = Callable[[int, int], None]


class WeightDifference(NamedTuple):
    """One weight that both have in the same shape."""

    name: str
    values: int
    differing: int  # whose bits differ, or which as numbers differ where the dtypes do
    largest: float  # absolute difference; infinite where a value is not finite in one of the two

    @property
    def is_equal(self) -> bool:
        return not self.differing


class TableDifference(NamedTuple):
    """What is told by names, shapes and dtypes alone; each pair is (first, second)."""

    missing: list[str]  # in the second
    extra: list[str]
    shapes: dict[str, tuple]
    dtypes: dict[str, tuple[str, str]]


def differing_fields(first: OPTConfig, second: OPTConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of the configs that differ, but for those that say nothing of the model."""
    names = [field.name for field in dataclasses.fields(OPTConfig) if field.name not in _SAYS_NOTHING_OF_THE_MODEL]
    pairs = {name: (getattr(first, name), getattr(second, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def compare_tables(
    first: Mapping[str, tuple[tuple[int, ...], str]], second: Mapping[str, tuple[tuple[int, ...], str]]
) -> TableDifference:
    """Compares (shape, dtype) by name."""
    common = [name for name in first if name in second]
    shapes = {name: (first[name][0], second[name][0]) for name in common if first[name][0] != second[name][0]}
    dtypes = {name: (first[name][1], second[name][1]) for name in common if first[name][1] != second[name][1]}
    missing, extra = ([name for name in a if name not in b] for a, b in ((first, second), (second, first)))
    return TableDifference(missing, extra, shapes, dtypes)


def table_of(weights: Checkpoint | Manifest) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every weight by the schema's name."""
    if isinstance(weights, Manifest):
        return {name: (record.shape, record.dtype) for name, record in weights.weights.items()}
    return {name: (shape, weights.dtypes[name]) for name, shape in weights.shapes.items()}


def differing_hashes(first: Mapping[str, Record], second: Mapping[str, Record]) -> list[str]:
    """Weights that both manifests have in one shape and dtype, with other values."""
    common = [name for name in first if name in second and first[name][:2] == second[name][:2]]
    return [name for name in common if first[name].blake3 != second[name].blake3]


def compare_weights(first: Checkpoint, second: Checkpoint, progress: Advance | None = None) -> list[WeightDifference]:
    """Compares the values of every weight that both have in the same shape.

    Args:
        progress: called with (bytes of the first that were compared, bytes in all) after each weight.
    """
    names = [name for name, shape in first.shapes.items() if second.shapes.get(name) == shape]
    sizes = {name: math.prod(first.shapes[name]) * DTYPES[first.dtypes[name]].itemsize for name in names}
    done, found = 0, []
    with Background() as background:
        for name in names:
            background.make_room()
            pieces = (first.pieces(name), second.pieces(name))
            held = [piece for side, _ in pieces for piece in side]
            found.append(background.submit(held, _compare, name, *pieces))
            done += sizes[name]
            if progress:
                progress(done, sum(sizes.values()))
        return [it.result() for it in found]


def _compare(
    name: str, first: tuple[Sequence[np.ndarray], int], second: tuple[Sequence[np.ndarray], int]
) -> WeightDifference:
    values, differing, largest = 0, 0, 0.0
    for a, b in paired(joined_blocks(*first), joined_blocks(*second)):
        values += a.size
        for start in range(0, a.size, _BLOCK_VALUES):
            part = np.s_[start : start + _BLOCK_VALUES]
            count, gap = _gap(a[part], b[part])
            differing, largest = differing + count, max(largest, gap)
    return WeightDifference(name, values, differing, largest)


def _gap(a: np.ndarray, b: np.ndarray) -> tuple[int, float]:
    """How many values differ, and by how much at most."""
    if a.dtype == b.dtype:
        differ = as_bits(a) != as_bits(b)
        if not differ.any():
            return 0, 0.0
    with np.errstate(invalid="ignore"):  # of signalling NaN, and of infinity - infinity
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        if a.dtype != b.dtype:
            differ = ~((wide_a == wide_b) | (np.isnan(wide_a) & np.isnan(wide_b)))
        gaps = np.abs(wide_a - wide_b)[differ]
    return gaps.size, float(np.nan_to_num(gaps, nan=np.inf, posinf=np.inf).max(initial=0.0))
