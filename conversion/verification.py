"""Reads a checkpoint again that was just written, and compares every weight with what should be there, bit for bit.

What it reads may still lie in the page cache: it is the work of this project that is checked, not the disk.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from conversion.background import Background
from conversion.blocks import cast, joined_blocks, paired, row_major_blocks, without_first_rows
from conversion.checkpoint import Checkpoint, open_checkpoint
from conversion.manifest import Record, blake3_of
from conversion.plan import Source
from conversion.stored import DTYPES
from opt_core.errors import CheckpointError, raise_if


def verify_written(
    folder: Path,
    records: Mapping[str, Record],
    source: Source,
    skipped_rows: Mapping[str, int],
    advance: Callable[[int], None],
) -> None:
    """Compares the checkpoint in `folder` with the weights it was written from.

    They are read a second time where that is cheap; of what a function returned, or had to be unpacked, the hashes are
    compared.

    Args:
        records: what every weight must be.
        skipped_rows: of weights whose first rows the format does not store.
        advance: called with the bytes of each weight.

    Raises:
        CheckpointError: names every weight that is missing, one too many, or another.
    """
    with open_checkpoint(folder) as checkpoint, Background() as background:
        raise_if(CheckpointError, str(folder), _table_problems(checkpoint, records))
        checks = {}
        for name, record in records.items():
            background.make_room()
            expected, (pieces, axis) = source.read_again(name), checkpoint.pieces(name)
            held = [*pieces] if expected is None else [expected, *pieces]
            arguments = (record, expected, skipped_rows.get(name, 0), pieces, axis)
            checks[name] = background.submit(held, _is_as_written, *arguments)
            advance(sum(piece.nbytes for piece in pieces))
        differing = [name for name, check in checks.items() if not check.result()]
    text = "expected the values that were written, got others when read again"
    raise_if(CheckpointError, str(folder), [f"{name}: {text}" for name in differing])


def _table_problems(checkpoint: Checkpoint, records: Mapping[str, Record]) -> list[str]:
    found = {name: (shape, checkpoint.dtypes[name]) for name, shape in checkpoint.shapes.items()}
    written = {name: (record.shape, record.dtype) for name, record in records.items()}
    return [
        f"{name}: expected {written.get(name, 'none')} when read again, got {found.get(name, 'none')}"
        for name in {**written, **found}
        if written.get(name) != found.get(name)
    ]


def _is_as_written(
    record: Record, expected: np.ndarray | None, skipped_rows: int, pieces: Sequence[np.ndarray], axis: int
) -> bool:
    read_back = joined_blocks(pieces, axis)
    if expected is None:
        return blake3_of(read_back) == record.blake3
    blocks = row_major_blocks(without_first_rows(expected, skipped_rows))
    rounded = (cast(block, DTYPES[record.dtype]) for block in blocks)
    return all(np.array_equal(_wide_bits(a), _wide_bits(b)) for a, b in paired(rounded, read_back))


def _wide_bits(block: np.ndarray) -> np.ndarray:
    """The bits of a flat piece as the fewest integers: a comparison takes its time for each."""
    return block.view(np.uint64 if block.nbytes % 8 == 0 else np.uint8)
