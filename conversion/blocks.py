"""Arrays piece by piece: in row-major order, whatever their strides and parts, without a copy of the whole.

Transposing is done in tiles that fit the caches: of a [4096, 16384] matrix it is four to eight times as fast as NumPy's
copy of the whole. Bits are moved as integers, since NumPy copies ml_dtypes' numbers one by one. Buffers are used again:
fresh memory costs as much time, in which Linux clears it, as the transposing. Files are not its business.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import ml_dtypes
import numpy as np

_RUN_BYTES = 1 << 20  # of a piece that is a view
_BUFFER_BYTES = 1 << 21  # of a piece that is a copy: what a core's second cache holds
_TILE = (256, 64)  # rows and columns; a column of the tile is a run of the source
_free_buffers: list[np.ndarray] = []  # as many as there were at work at once
_INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def as_bits(array: np.ndarray) -> np.ndarray:
    """A view of the numbers as unsigned integers."""
    return array.view(_INTEGERS[array.itemsize])


def row_major_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The values in row-major order, in flat pieces of some MB.

    A piece is a view where its values lie in one run, else a copy in a buffer that the next piece overwrites.
    """
    return (block.view(array.dtype) for block in _blocks(_merged(as_bits(array))))


def joined_blocks(pieces: Sequence[np.ndarray], axis: int) -> Iterator[np.ndarray]:
    """As `row_major_blocks`, of arrays that follow each other along an axis."""
    if axis == 0 or len(pieces) == 1:
        for piece in pieces:
            yield from row_major_blocks(piece)
        return
    rows = max(1, _BUFFER_BYTES // sum(piece[:1].nbytes for piece in pieces))
    for start in range(0, len(pieces[0]), rows):
        yield from row_major_blocks(np.concatenate([piece[start : start + rows] for piece in pieces], axis))


def paired(first: Iterable[np.ndarray], second: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Two sequences of flat pieces, of equally many values in all, cut so that their pieces match."""
    rest = np.empty(0)
    others = iter(second)
    for block in first:
        while block.size:
            if not rest.size:
                rest = next(others)
            count = min(block.size, rest.size)
            yield block[:count], rest[:count]
            block, rest = block[count:], rest[count:]


def without_first_rows(array: np.ndarray, count: int) -> np.ndarray:
    """The array with zeros in its first rows: as it reads back from a format that does not store them."""
    return np.concatenate([np.zeros_like(array[:count]), array[count:]]) if count else array


def _merged(array: np.ndarray) -> np.ndarray:
    """The same values in the same order on as few axes as possible, as a view."""
    shape, strides = [1], [array.itemsize]
    for size, stride in zip(array.shape, array.strides, strict=True):
        if size == 1:
            continue
        if shape[-1] == 1 or strides[-1] == stride * size:
            shape[-1], strides[-1] = shape[-1] * size, stride
        else:
            shape.append(size)
            strides.append(stride)
    return np.lib.stride_tricks.as_strided(array, shape, strides, writeable=False)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    if array.ndim == 1:
        step = _RUN_BYTES // array.itemsize
        yield from (np.ascontiguousarray(array[start : start + step]) for start in range(0, array.size, step))
    elif array.ndim == 2:
        yield from _blocks_of_matrix(array)
    else:
        for part in array:
            yield from _blocks(part)


def _blocks_of_matrix(matrix: np.ndarray) -> Iterator[np.ndarray]:
    columns = matrix.shape[1]
    rows = min(len(matrix), max(1, _BUFFER_BYTES // (columns * matrix.itemsize)))
    with _buffer(rows * columns * matrix.itemsize) as memory:
        buffer = memory.view(matrix.dtype).reshape(rows, columns)
        for start in range(0, len(matrix), rows):
            part = matrix[start : start + rows]
            _copy_in_tiles(buffer[: len(part)], part)
            yield buffer[: len(part)].reshape(-1)


@contextlib.contextmanager
def _buffer(nbytes: int) -> Iterator[np.ndarray]:
    """Memory for one iteration alone, of any thread."""
    try:
        buffer = _free_buffers.pop()
    except IndexError:
        buffer = np.empty(_BUFFER_BYTES, np.uint8)
    try:
        yield buffer[:nbytes] if nbytes <= buffer.size else np.empty(nbytes, np.uint8)
    finally:
        _free_buffers.append(buffer)


def _copy_in_tiles(target: np.ndarray, source: np.ndarray) -> None:
    if abs(source.strides[1]) == source.itemsize:
        target[...] = source
        return
    rows, columns = _TILE
    for row in range(0, len(source), rows):
        for column in range(0, source.shape[1], columns):
            tile = np.s_[row : row + rows, column : column + columns]
            target[tile] = source[tile]


# -- values of a piece ------------------------------------------------------------------------------------------------


def cast(block: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values rounded to `dtype`; those beyond its range become infinite. The same array where nothing changes."""
    if block.dtype == dtype:
        return block
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(dtype)


def largest_overflow(block: np.ndarray, rounded: np.ndarray) -> float:
    """The largest finite magnitude that rounding made infinite, or 0."""
    if ml_dtypes.finfo(rounded.dtype).max >= ml_dtypes.finfo(block.dtype).max:  # nothing can overflow
        return 0.0
    overflowed = np.isinf(rounded)
    overflowed[overflowed] = np.isfinite(block[overflowed])
    return float(np.abs(block[overflowed].astype(np.float64)).max()) if overflowed.any() else 0.0


def count_not_finite(block: np.ndarray) -> int:
    """How many values are NaN or infinite: those whose exponent has all bits set, as that of infinity has."""
    infinity = as_bits(np.array(np.inf, block.dtype))[()]
    exponents = np.bitwise_and(as_bits(block), infinity)
    if exponents.max(initial=0) < infinity:
        return 0
    return int(np.count_nonzero(exponents == infinity))


def is_zero(block: np.ndarray) -> bool:
    """True where no bit is set."""
    return not as_bits(block).any()
