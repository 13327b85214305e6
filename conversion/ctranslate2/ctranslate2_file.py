"""The `model.bin` of CTranslate2, for reading: variables by name, settings among them, names that stand for others.

After a version and the name of a specification come the variables, each with its header before its bytes, then pairs of
an alias and the variable that it stands for. Quantised variables are refused: their rounding cannot be undone. What the
names mean is the business of the table of formats, what the settings mean that of `ctranslate2_config`; no such file is
written here, since CTranslate2's own converter takes the published layout.
Sources: `ctranslate2.specs.model_spec` and `src/models/model.cc` of CTranslate2 4.8.
"""

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from conversion.stored import DTYPES, MappedFile, StoredTensor
from opt_core.errors import CheckpointError, raise_if

SPECIFICATION = "TransformerDecoderSpec"
_VERSIONS = range(4, 7)  # of the binary layout: 4 has the types of variables, 6 is the last
_REVISIONS = range(1, 9)  # of the specification
_TYPES = ("float32", "int8", "int16", "int32", "float16", "bfloat16")
_INTEGERS: dict[str, np.dtype] = {"int8": np.dtype("<i1"), "int16": np.dtype("<i2"), "int32": np.dtype("<i4")}
_LONGEST_NAME = 255
_SMALLEST_VARIABLE = 2 + 1 + 1 + 1 + 4  # bytes of an empty name and of no values
_SMALLEST_ALIAS = 2 * 3


class Variable(NamedTuple):
    dtype: str  # one of _TYPES
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class CTranslate2File(MappedFile):
    """A mapped `model.bin`.

    Attributes:
        tensors: variables with axes; an alias has the entry of what it stands for.
        scalars: variables without axes, which are settings, by name.
    """

    def __init__(self, path: Path, tensors: dict[str, StoredTensor], scalars: dict[str, int | float]):
        super().__init__(path, tensors)
        self.scalars = scalars


def open_file(path: Path) -> CTranslate2File:
    """Reads the headers and the settings of a file; no weights.

    Raises:
        CheckpointError: names the variable and what is wrong with it; lists those that are quantised.
    """
    with open(path, "rb") as file:
        reader = _Reader(file, path)
        _check_versions(reader)
        variables = _read_variables(reader)
        aliases = _read_aliases(reader, variables)
        if reader.left:
            raise reader.error(f"{reader.left} bytes follow the last alias")
        scalars = {name: _scalar(file, found) for name, found in variables.items() if not found.shape}
    arrays = {name: found for name, found in variables.items() if found.shape}
    raise_if(CheckpointError, str(path), _quantised(arrays))
    tensors = {name: StoredTensor(found.dtype, found.shape, found.offset) for name, found in arrays.items()}
    return CTranslate2File(path, tensors | {alias: tensors[name] for alias, name in aliases.items()}, scalars)


class _Reader:
    """Takes fields from a file, and never more than it has."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self.left = os.fstat(file.fileno()).st_size

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(str(self._path), [text])

    def take(self, length: int, what: str) -> bytes:
        self.skip(length, what)
        self._file.seek(-length, os.SEEK_CUR)
        return self._file.read(length)

    def skip(self, length: int, what: str) -> int:
        """The offset of the skipped bytes."""
        if length > self.left:
            raise self.error(f"{what}: truncated, expected {length} bytes, {self.left} are left in the file")
        self.left -= length
        start = self._file.tell()
        self._file.seek(length, os.SEEK_CUR)
        return start

    def number(self, format: str, what: str) -> int:
        (value,) = struct.unpack(f"<{format}", self.take(struct.calcsize(f"<{format}"), what))
        return value

    def name(self, what: str) -> str:
        length = self.number("H", what)
        text = self.take(length, what) if 1 <= length <= _LONGEST_NAME else b""
        if not text.endswith(b"\0") or not text[:-1].isascii() or not text[:-1].decode().isprintable():
            raise self.error(f"{what}: expected up to {_LONGEST_NAME} bytes of text and a zero, got {length} bytes")
        return text[:-1].decode()


def _check_versions(reader: _Reader) -> None:
    version = reader.number("I", "version")
    if version not in _VERSIONS:
        raise reader.error(f"version: expected one of {', '.join(map(str, _VERSIONS))}, got {version}")
    specification, revision = reader.name("specification"), reader.number("I", "revision")
    if specification != SPECIFICATION:
        raise reader.error(f"specification: expected {SPECIFICATION}, got {specification}: not a decoder such as OPT")
    if revision not in _REVISIONS:
        raise reader.error(f"revision: expected 1 to {_REVISIONS[-1]}, got {revision}")


def _read_variables(reader: _Reader) -> dict[str, Variable]:
    variables: dict[str, Variable] = {}
    for number in range(_count(reader, "variables", _SMALLEST_VARIABLE)):
        name = reader.name(f"variable {number}")
        if name in variables:
            raise reader.error(f"{name}: two variables of this name")
        variables[name] = _read_variable(reader, name)
    return variables


def _count(reader: _Reader, what: str, smallest: int) -> int:
    count = reader.number("I", what)
    if count * smallest > reader.left:
        raise reader.error(f"{what}: expected at most {reader.left // smallest} for what is left, got {count}")
    return count


def _read_variable(reader: _Reader, name: str) -> Variable:
    rank = reader.number("B", name)
    if rank > 8:
        raise reader.error(f"{name}: expected at most 8 axes, got {rank}")
    shape = tuple(reader.number("I", name) for _ in range(rank))
    type_number, nbytes = reader.number("B", name), reader.number("I", name)
    if type_number >= len(_TYPES) or 0 in shape:
        raise reader.error(f"{name}: expected axes of positive length and a type below {len(_TYPES)}, "
                           f"got {shape} and {type_number}")  # fmt: skip
    dtype = _TYPES[type_number]
    expected = math.prod(shape) * _numpy_dtype(dtype).itemsize
    if nbytes != expected:
        raise reader.error(f"{name}: expected {expected} bytes for {dtype} {shape}, got {nbytes}")
    return Variable(dtype, shape, reader.skip(nbytes, name), nbytes)


def _read_aliases(reader: _Reader, variables: dict[str, Variable]) -> dict[str, str]:
    aliases: dict[str, str] = {}
    for number in range(_count(reader, "aliases", _SMALLEST_ALIAS)):
        alias, name = reader.name(f"alias {number}"), reader.name(f"alias {number}")
        if alias in variables or alias in aliases:
            raise reader.error(f"{alias}: stored twice, once as an alias of {name}")
        if name not in variables or not variables[name].shape:
            raise reader.error(f"{alias}: an alias of {name}, which is not a variable with axes")
        aliases[alias] = name
    return aliases


def _scalar(file: BinaryIO, variable: Variable) -> int | float:
    file.seek(variable.offset)
    (value,) = np.frombuffer(file.read(variable.nbytes), _numpy_dtype(variable.dtype))
    return float(value) if variable.dtype in DTYPES else int(value)


def _quantised(arrays: dict[str, Variable]) -> list[str]:
    problems = [
        f"{name}: expected a dtype of float32, float16, bfloat16, got {found.dtype}"
        for name, found in arrays.items()
        if found.dtype not in DTYPES
    ]
    advice = "quantised weights cannot be taken back: convert the original again, with float32, float16 or bfloat16"
    return [*problems, advice] if problems else []


def _numpy_dtype(name: str) -> np.dtype:
    return DTYPES[name] if name in DTYPES else _INTEGERS[name]
