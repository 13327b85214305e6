"""How a stored tensor differs from the schema's, as data that inverts: order and splitting of axes, rows left out.

A layout is written in the letters of `opt_core.schema.AXES`: a linear weight with dims "DA" that is stored as "NHD"
has its joined heads split and its axes turned. Both directions derive from the same letters.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

_PARTS = {"A": "NH"}  # joined axes and what they may be split into


class Layout(NamedTuple):
    """One weight in a format.

    With `slot=(n, of)` the weight is block n of `of` equal blocks along the first axis of a joint tensor (fused keys,
    values and queries). `to_stored` and `to_schema` treat the block alone; `block` finds it.
    """

    dims: str  # the schema's letters
    stored: str  # the letters in stored order
    lengths: Mapping[str, int]  # of each letter in the schema's shape, and of the parts N and H
    skip_rows: int = 0  # leading rows that are not stored, and are zeros when read back
    slot: tuple[int, int] | None = None

    @property
    def stored_lengths(self) -> dict[str, int]:
        """The length of each letter in the file."""
        first = self.dims[0]
        return {**self.lengths, first: self.lengths[first] - self.skip_rows}

    @property
    def split_dims(self) -> str:
        """The schema's letters, those that the format splits replaced by their parts."""
        return "".join(letter if letter in self.stored else _PARTS.get(letter, letter) for letter in self.dims)

    @property
    def is_identity(self) -> bool:
        return self.dims == self.stored and not self.skip_rows


def stored_shape(layout: Layout) -> tuple[int, ...]:
    """The shape of the weight (of its block, where it has a slot) in the file."""
    return tuple(layout.stored_lengths[letter] for letter in layout.stored)


def schema_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
    """The shape in the schema of a tensor stored as `shape`; of one that does not fit, its axes in the schema's order.

    What does not fit and is more than a change of order keeps its shape.
    """
    if shape == stored_shape(layout):
        return tuple(layout.lengths[letter] for letter in layout.dims)
    if len(shape) == len(layout.dims) and sorted(layout.stored) == sorted(layout.dims):
        return tuple(shape[layout.stored.index(letter)] for letter in layout.dims)
    return shape


def to_stored(array: np.ndarray, layout: Layout) -> np.ndarray:
    """From the schema's shape to that in the file; a view where NumPy allows, `array` itself where nothing changes."""
    if layout.is_identity:
        return array
    lengths, letters = layout.stored_lengths, layout.split_dims
    array = array[layout.skip_rows :].reshape([lengths[letter] for letter in letters])
    return array.transpose([letters.index(letter) for letter in layout.stored])


def to_schema(array: np.ndarray, layout: Layout) -> np.ndarray:
    """The inverse of `to_stored`, up to the rows that the format lacks."""
    if layout.is_identity:
        return array
    array = array.transpose([layout.stored.index(letter) for letter in layout.split_dims])
    array = array.reshape([layout.stored_lengths[letter] for letter in layout.dims])
    missing_rows = np.zeros((layout.skip_rows, *array.shape[1:]), array.dtype)
    return np.concatenate([missing_rows, array]) if layout.skip_rows else array


def block(joint: np.ndarray, slot: tuple[int, int] | None) -> np.ndarray:
    """The block of `slot` in a joint tensor, as a view; the whole without a slot."""
    if slot is None:
        return joint
    number, total = slot
    return joint.reshape(total, joint.shape[0] // total, *joint.shape[1:])[number]
