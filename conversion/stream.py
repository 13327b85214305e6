"""The values on their way into files: read, laid out, rounded and written piece by piece, and looked at beside that.

Each weight is looked at once in the order of the schema, in another thread than the one that writes: for its hash, for
what the dtype cannot hold, for NaN and infinities.
"""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import IO

import numpy as np

from conversion.background import Background
from conversion.blocks import cast, row_major_blocks
from conversion.formats import Place
from conversion.layout import to_stored
from conversion.manifest import Record, Seen, as_bytes, look_at
from conversion.plan import Planned, Source, whole_shape
from conversion.safetensors_file import PlannedTensor
from conversion.stored import DTYPES
from opt_core.errors import CheckpointError, raise_if

logger = logging.getLogger(__name__)


class Stream:
    """Writes one planned tensor after the other, and keeps count of them."""

    def __init__(
        self,
        source: Source,
        planned: list[Planned],
        parts: int,
        background: Background,
        advance: Callable[[int], None],
    ):
        self.parts = parts
        self._source, self._background, self._advance = source, background, advance
        self._planned = {item.tensor.name: item for item in planned}
        self._left = {(name, part) for name in self._planned for part in range(parts)}
        self._looks: dict[str, tuple[str, Future[Seen]]] = {}  # of each weight its dtype, and what is found

    def writer(self, part: int = 0) -> Callable[[IO[bytes], PlannedTensor], None]:
        """What a container calls for each of its tensors."""

        def write(file: IO[bytes], tensor: PlannedTensor) -> None:
            self._left.remove((tensor.name, part))
            _, names, places = self._planned[tensor.name]
            for name, place in zip(names, places, strict=True):
                self._write_weight(file, name, place, part, tensor.dtype)
            self._advance(tensor.nbytes)

        return write

    def _write_weight(self, file: IO[bytes], name: str, place: Place, part: int, dtype: str) -> None:
        self._background.make_room()
        array = self._read(name, place)
        if name not in self._looks:
            look = (array, DTYPES[dtype], place.layout.skip_rows)
            self._looks[name] = dtype, self._background.submit([array], look_at, *look)
        for block in row_major_blocks(to_stored(_cut(array, place.axis, part, self.parts), place.layout)):
            file.write(as_bytes(cast(block, DTYPES[dtype])))

    def _read(self, name: str, place: Place) -> np.ndarray:
        array, expected = self._source.read(name), whole_shape(place, self.parts)
        if array.shape != expected or str(array.dtype) not in DTYPES:
            text = f"expected {expected} of a float dtype, got {array.shape} of {array.dtype}"
            raise CheckpointError("write_checkpoint", [f"{name}: {text}"])
        return array

    def finish(self, *, allow_nonfinite: bool) -> dict[str, Record]:
        """What the manifest says of each weight, once all are written; warns of matrices of zeros.

        Raises:
            CheckpointError: lists all weights that overflow their dtype, or have NaN or infinities without leave.
        """
        assert not self._left, f"not written: {sorted(self._left)}"
        seen = {name: (dtype, look.result()) for name, (dtype, look) in self._looks.items()}
        return records_of(seen, self._shapes(), allow_nonfinite=allow_nonfinite)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: whole_shape(place, self.parts)
            for item in self._planned.values()
            for name, place in zip(item.weights, item.places, strict=True)
        }


def records_of(
    seen: Mapping[str, tuple[str, Seen]], shapes: Mapping[str, tuple[int, ...]], *, allow_nonfinite: bool
) -> dict[str, Record]:
    """As `Stream.finish`, of weights whose dtypes and values were `seen`."""
    problems = [
        f"{name}: its largest magnitude {it.overflow:g} overflows {dtype}"
        for name, (dtype, it) in seen.items()
        if it.overflow
    ]
    problems += [
        f"{name}: expected finite values, got {it.not_finite} NaN or infinite ones; allow_nonfinite keeps them"
        for name, (_, it) in seen.items()
        if it.not_finite and not allow_nonfinite
    ]
    raise_if(CheckpointError, "write_checkpoint", problems)
    zeros = [name for name, (_, it) in seen.items() if it.is_zero and len(shapes[name]) > 1]
    if zeros:
        logger.warning("matrices of zeros alone: %s", ", ".join(zeros))
    return {name: Record(shapes[name], dtype, it.blake3) for name, (dtype, it) in seen.items()}


def _cut(array: np.ndarray, axis: int | None, part: int, parts: int) -> np.ndarray:
    """One of so many equal pieces along an axis, as a view."""
    if axis is None or parts == 1:
        return array
    return np.split(array, parts, axis)[part]
