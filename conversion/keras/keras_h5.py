"""The container that Keras 3 saves (`.weights.h5`, and inside a `.keras` archive): HDF5 whose paths are the names.

A layer's weights are the datasets `0`, `1`, ... of its group `vars`, whose attribute `name` is what the program called
that layer; what training keeps lies beside the layers and is left out. Which datasets may be read, and how, is `hdf5`'s
business; what the paths mean is `keras_hub`'s.
Sources: `saving_lib.H5IOStore` of Keras 3.15; APPNOTE.TXT 6.3.10 (local headers of a zip).
"""

import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, BinaryIO

from conversion.keras.hdf5 import H5File, Part, create, make_dataset, open_datasets, write_values
from conversion.safetensors_file import PlannedTensor
from opt_core.config import CONFIG_NAME
from opt_core.errors import CheckpointError, raise_if
from opt_core.json_file import MAX_JSON_BYTES, unique_keys

_WEIGHTS_NAME = "model.weights.h5"  # in an archive
_STATE_OF_TRAINING = ("optimizer/", "metrics/")  # the latter of Keras 2 alone
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_ZIP_MAGIC = b"PK\x03\x04"


def open_file(path: Path, rename: Callable[[str], str] = str) -> H5File:
    """Finds the weights of a `.weights.h5` or a `.keras` archive; reads none.

    Args:
        rename: from the path of a dataset to the name of its tensor.

    Raises:
        CheckpointError: lists every link and dataset that is not as Keras writes it.
    """

    def names_of(file, locations: list[str]) -> dict[str, str]:
        return _names(locations, rename)

    return open_datasets(path, names_of, _part_of_archive(path, _WEIGHTS_NAME) if is_archive(path) else None)


def _names(locations: list[str], rename: Callable[[str], str]) -> dict[str, str]:
    found: dict[str, str] = {}
    problems = []
    for location in locations:
        name = rename(location)
        if is_state_of_training(name):
            continue
        if name in found:
            problems.append(f"{name}: stored twice, as {found[name]} and as {location}")
        found[name] = location
    raise_if(CheckpointError, "", problems)
    return {location: name for name, location in found.items()}


def is_state_of_training(path: str) -> bool:
    """True for what an optimizer or a metric has stored."""
    return path.startswith(_STATE_OF_TRAINING)


# -- archives ---------------------------------------------------------------------------------------------------------


def is_archive(path: Path) -> bool:
    """True for a zip, as a `.keras` file is."""
    with open(path, "rb") as file:
        return file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC


def read_config(path: Path) -> dict[str, Any]:
    """The config.json in a `.keras` archive: a serialized object, not checked further.

    Raises:
        CheckpointError: the archive is damaged, or its config is no JSON object.
    """
    start, length = _part_of_archive(path, CONFIG_NAME)
    if length > MAX_JSON_BYTES:
        raise CheckpointError(str(path), [f"{CONFIG_NAME}: expected at most {MAX_JSON_BYTES} bytes, got {length}"])
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(length)
    try:
        fields = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), [f"{CONFIG_NAME}: not valid JSON: {error}"]) from None
    if not isinstance(fields, dict):
        raise CheckpointError(str(path), [f"{CONFIG_NAME}: expected a JSON object, got {type(fields).__name__}"])
    return fields


def _part_of_archive(path: Path, name: str) -> Part:
    """Where a member lies, which Keras stores uncompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename == name]
    except Exception as error:  # of damaged fields `zipfile` makes half a dozen types
        raise CheckpointError(str(path), [f"damaged or truncated zip: {str(error)[:200]}"]) from None
    if len(members) != 1:
        raise CheckpointError(str(path), [f"{name}: expected one such member in the archive, got {len(members)}"])
    return _part(path, members[0])


def _part(path: Path, member: zipfile.ZipInfo) -> Part:
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size or member.flag_bits & 1:
        text = f"{member.filename}: expected a member stored as it is, got a compressed or encrypted one"
        raise CheckpointError(str(path), [text])
    start, size = _start_of(path, member), path.stat().st_size
    if start is None or start + member.file_size > size:
        raise CheckpointError(str(path), [f"{member.filename}: damaged or truncated, {size} bytes in all"])
    return Part(start, member.file_size)


def _start_of(path: Path, member: zipfile.ZipInfo) -> int | None:
    """Where a member's bytes begin, by its local header; None where that is damaged."""
    if member.header_offset not in range(path.stat().st_size):
        return None
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        header = file.read(_LOCAL_HEADER.size).ljust(_LOCAL_HEADER.size)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        name = file.read(name_length)
    if magic != _ZIP_MAGIC or name != member.filename.encode():
        return None
    return member.header_offset + _LOCAL_HEADER.size + name_length + extra_length


# -- writing ----------------------------------------------------------------------------------------------------------


def write_file(
    file: BinaryIO,
    tensors: Iterable[PlannedTensor],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
    layer_name: Callable[[str], str],
) -> None:
    """Writes groups and empty datasets for all `tensors`, then calls `write_tensor(file, tensor)` at the place of each.

    `write_tensor` must write exactly `tensor.nbytes` bytes.

    Args:
        file: a file of the file system, since HDF5 opens it by its name.
        layer_name: from the path of a layer to what the attribute `name` calls it.
    """
    tensors = list(tensors)
    with create(file) as h5:
        offsets = [make_dataset(h5, tensor.name, tensor) for tensor in tensors]
        for group in dict.fromkeys(tensor.name.rpartition("/")[0] for tensor in tensors):
            h5[group].attrs["name"] = layer_name(group.removesuffix("/vars"))
    write_values(file, tensors, offsets, write_tensor)
