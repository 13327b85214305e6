"""Weights put together from stored tensors: found by name, cut from joint tensors, joined over model-parallel parts.

Knows the schema and the tables of the formats, and no container: files come opened, as `conversion.stored.TensorFile`.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from conversion.formats import Format, Place, place_of, published_of
from conversion.layout import block, schema_shape, stored_shape, to_schema
from conversion.names import canonical_names
from conversion.stored import DTYPES, StoredTensor, TensorFile
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, raise_if
from opt_core.schema import SCHEMA

logger = logging.getLogger(__name__)

EMBEDDING = "decoder.embed_tokens.weight"
HEAD = next(row.name for row in SCHEMA if row.tied_to == EMBEDDING)
_COMPARED_BYTES = 1 << 24
_LARGEST_DRIFT = 1e-3  # between copies of one weight in parts that were trained side by side


class StoredWeight(NamedTuple):
    """One weight: the files that hold it or its pieces, its name there, and how a piece is laid out."""

    files: tuple[TensorFile, ...]
    name: str
    place: Place
    published: str

    @property
    def tensors(self) -> list[StoredTensor]:
        return [file.tensors[self.name] for file in self.files]

    @property
    def dtype(self) -> str:
        return self.tensors[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """In the schema's terms, of all pieces together; of what does not fit, as near as can be told."""
        first, *others = [self._shape_of_piece(tensor.shape) for tensor in self.tensors]
        axis = self.place.axis
        if axis is None or any(len(shape) <= axis for shape in (first, *others)):
            return first
        return (*first[:axis], first[axis] + sum(shape[axis] for shape in others), *first[axis + 1 :])

    def _shape_of_piece(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        slots = self.place.layout.slot[1] if self.place.layout.slot else 1
        if shape and shape[0] % slots == 0:
            shape = (shape[0] // slots, *shape[1:])
        return schema_shape(shape, self.place.layout)

    def read(self) -> np.ndarray:
        """The whole weight: row-major, writable, in the stored dtype.

        Raises:
            CheckpointError: a piece has another shape than it must, or copies of one weight disagree.
        """
        if len(self.files) == 1:
            return np.ascontiguousarray(self._piece(self.files[0]))
        if self.place.axis is not None:
            return np.concatenate([self._piece(file) for file in self.files], self.place.axis)
        first, *others = (self._piece(file) for file in self.files)
        for file, other in zip(self.files[1:], others, strict=True):
            self._check_copy(first, other, file)
        return np.ascontiguousarray(first)

    def pieces(self) -> tuple[list[np.ndarray], int]:
        """The weight's pieces, and the axis along which they follow each other: views of any strides where possible.

        Raises:
            CheckpointError: as `read`.
        """
        return self._pieces([file.read for file in self.files])

    def views(self) -> tuple[list[np.ndarray], int]:
        """As `pieces`, before any value is read where that is possible: of any alignment too, on maps of the files."""
        return self._pieces([file.view for file in self.files])

    def _pieces(self, reads: Sequence[Callable[[str], np.ndarray]]) -> tuple[list[np.ndarray], int]:
        if self.place.axis is not None or len(self.files) == 1:
            pieces = [self._piece(file, read) for file, read in zip(self.files, reads, strict=True)]
            return pieces, self.place.axis or 0
        return [self.read()], 0

    def _piece(self, file: TensorFile, read: Callable[[str], np.ndarray] | None = None) -> np.ndarray:
        layout, got = self.place.layout, file.tensors[self.name].shape
        read = read or file.read
        if layout.is_identity and layout.slot is None and len(self.files) == 1:
            return read(self.name)
        rows, *rest = stored_shape(layout)
        expected = (rows * (layout.slot[1] if layout.slot else 1), *rest)
        if got != expected:
            raise CheckpointError(str(file.path), [f"{self.name}: expected {expected}, got {got}"])
        return to_schema(block(read(self.name), layout.slot), layout)

    def _check_copy(self, first: np.ndarray, other: np.ndarray, file: TensorFile) -> None:
        if first.tobytes() == other.tobytes():
            return
        drift = float(np.abs(first.astype(np.float64) - other.astype(np.float64)).max())
        text = f"{self.name}: expected the values of {self.files[0].path.name}, got others in {file.path.name}"
        if not drift <= _LARGEST_DRIFT:
            raise CheckpointError(str(file.path), [f"{text} (largest difference {drift:.3g})"])
        logger.warning("%s (largest difference %.3g); those of the first part are used", text, drift)


def find_weights(
    files: Sequence[TensorFile], format: Format, config: OPTConfig, source: str
) -> dict[str, StoredWeight]:
    """Every weight in the opened files by the schema's name; a tied head is compared with the embedding and left out.

    Raises:
        CheckpointError: lists what is stored twice, what is no weight of OPT, dtypes that are not read, and parts that
            lack a tensor.
    """
    holders = _holders(files)
    published = {stored: published_of(format, stored) for stored in holders}
    stored_of = {name: stored for stored, names in published.items() for name in names}
    found, problems = canonical_names(stored_of)
    problems += _naming_problems(published, stored_of, format)
    problems += _dtype_problems(holders)
    parts = len(files) if format.is_parallel else 1
    problems += [
        f"{stored}: expected in all {parts} parts, got in {', '.join(file.path.name for file in having)}"
        for stored, having in holders.items()
        if format.is_parallel and len(having) != parts
    ]
    raise_if(CheckpointError, source, problems)
    weights = {
        name: StoredWeight(
            tuple(holders[stored_of[known]]), stored_of[known], place_of(format, name, config, parts=parts), known
        )
        for name, known in found.items()
    }
    return _without_tied_head(weights, source) if config.tie_word_embeddings and HEAD in weights else weights


def _holders(files: Sequence[TensorFile]) -> dict[str, list[TensorFile]]:
    holders = defaultdict(list)
    for file in files:
        for stored in file.tensors:
            holders[stored].append(file)
    return holders


def _naming_problems(published: dict[str, tuple[str, ...]], stored_of: dict[str, str], format: Format) -> list[str]:
    problems = [
        f"{name}: stored twice, as {stored} and as {stored_of[name]}"
        for stored, names in published.items()
        for name in names
        if stored_of[name] != stored
    ]
    return problems + [
        f"{stored[:200]}: not a weight of OPT in {format.name}" for stored, names in published.items() if not names
    ]


def _dtype_problems(holders: dict[str, list[TensorFile]]) -> list[str]:
    problems = []
    for stored, files in holders.items():
        dtypes = list(dict.fromkeys(file.tensors[stored].dtype for file in files))
        problems += [
            f"{stored}: expected a dtype of {', '.join(DTYPES)}, got {it}" for it in dtypes if it not in DTYPES
        ]
        if len(dtypes) > 1:
            problems.append(f"{stored}: expected one dtype in all parts, got {', '.join(dtypes)}")
    return problems


def _without_tied_head(weights: dict[str, StoredWeight], source: str) -> dict[str, StoredWeight]:
    head = weights.pop(HEAD)
    embedding = weights.setdefault(EMBEDDING, head)  # safetensors' save_model keeps one name of the two
    if not _same_values(embedding, head):
        text = f"{HEAD}: expected the values of {EMBEDDING}, to which the config ties it, got others"
        raise CheckpointError(source, [f"{text}; a config with tie_word_embeddings=false keeps both"])
    return weights


def _same_values(embedding: StoredWeight, head: StoredWeight) -> bool:
    if embedding.files == head.files and embedding.tensors == head.tensors and embedding.place == head.place:
        return True
    if (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
        return False
    of_embedding, of_head = (stored.read().reshape(-1).view(np.uint8) for stored in (embedding, head))
    starts = range(0, of_head.size, _COMPARED_BYTES)
    return all(np.array_equal(of_embedding[i : i + _COMPARED_BYTES], of_head[i : i + _COMPARED_BYTES]) for i in starts)
