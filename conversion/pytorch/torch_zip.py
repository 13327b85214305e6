"""The zip container that `torch.save` writes since torch 1.6, read and written without torch.

A `.bin` is a zip of uncompressed members: `<stem>/data.pkl` (see `torch_pickle`, and `torch_records` for files that
hold more than a state dict) and one `<stem>/data/<key>` per storage, so that a tensor's bytes lie in one run of the
file and can be mapped. Compressed members, and files from before 1.6, are refused.
Sources: `caffe2/serialize/inline_container.cc` of torch 2.13; APPNOTE.TXT 6.3.10 (local headers).
"""

import itertools
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from conversion.pytorch import torch_pickle, torch_records
from conversion.safetensors_file import ALIGNMENT, PlannedTensor
from conversion.stored import DTYPES, StoredTensor, row_major_strides
from opt_core.errors import CheckpointError, raise_if
from opt_core.json_file import MAX_JSON_BYTES

MAX_PICKLE_BYTES = MAX_JSON_BYTES  # OPT's largest, 1540 tensors, takes 0.3 MB
MAX_RECORDS_BYTES = 1 << 25  # the state of an optimizer and of the data beside them
_LEGACY_MAGIC = (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.", b"\x80\x02}", b"\x80\x02c")
MAX_DIRECTORY_BYTES = 1 << 23  # a storage takes 0.1 KB of it
_DIRECTORY_END = struct.Struct("<12xI6x")  # of which the length of the directory is read
_LOCATOR = struct.Struct("<8xQ4x")  # before it in large zips: where the record with the length is
_LARGE_END = struct.Struct("<40xQ8x")
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_CHUNK_BYTES = 1 << 22


def read_tensors(path: Path, *, verify: bool = False) -> dict[str, StoredTensor]:
    """The tensors of a state dict, by stored name; reads no weights unless `verify`, which checks every member's CRC.

    Raises:
        CheckpointError: names the member or the tensor and what is wrong with it.
    """
    state, place = _read_archive(path, torch_pickle.loads, MAX_PICKLE_BYTES, verify)
    if not isinstance(state, dict):
        raise CheckpointError(str(path), [f"expected a state dict, got {type(state).__name__}"])
    return place.locate(state)


class Records(NamedTuple):
    """What a file holds beside tensors, and where its tensors are."""

    content: dict[Any, Any]  # for `torch_records.plain`
    unknown: tuple[str, ...]  # names that the pickle asks for and that were not obeyed
    place: "_Place"

    def locate(self, state: dict) -> dict[str, StoredTensor]:
        """The tensors of a plain dict of views.

        Raises:
            CheckpointError: names each that is not in the file, or no tensor.
        """
        return self.place.locate(state)


def read_records(path: Path, *, verify: bool = False) -> Records:
    """A dict of anything, as training programs save it; reads no weights unless `verify`, as in `read_tensors`.

    Raises:
        CheckpointError: the file is damaged, or holds no dict.
    """
    pickled, place = _read_archive(path, torch_records.loads, MAX_RECORDS_BYTES, verify)
    if not isinstance(pickled.content, dict):
        raise CheckpointError(str(path), [f"expected a dict, got {type(pickled.content).__name__.lstrip('_')}"])
    return Records(pickled.content, pickled.unknown, place)


def _read_archive(path: Path, loads: Callable[[bytes], Any], max_bytes: int, verify: bool) -> tuple[Any, "_Place"]:
    with open(path, "rb") as file:
        _check_magic(file, path)
        try:
            _check_directory(file, path)
            with zipfile.ZipFile(file) as archive:
                members = _checked_members(archive, path)
                stem = _stem(members, path)
                _check_byteorder(archive, members.get(f"{stem}/byteorder"), path)
                content = _unpickle(archive, members[f"{stem}/data.pkl"], path, loads, max_bytes)
                stored = {name: info for name, info in members.items() if name.startswith(f"{stem}/data/")}
                spans = _spans(file, stored, path)
                if verify:
                    _check_crc(file, spans, members, path)
                return content, _Place(path, stem, spans)
        except CheckpointError:
            raise
        except (
            Exception
        ) as error:  # of damaged fields `zipfile` makes BadZipFile, but also ValueError, OverflowError, ...
            raise CheckpointError(str(path), [f"damaged or truncated zip: {str(error)[:200]}"]) from None


def _check_magic(file: BinaryIO, path: Path) -> None:
    magic = file.read(15)
    if magic.startswith(_LEGACY_MAGIC):
        text = (
            "a file from before torch 1.6, which is not read: save it again with a newer torch (torch.load, torch.save)"
        )
        raise CheckpointError(str(path), [text])
    if not magic.startswith(b"PK\x03\x04"):
        raise CheckpointError(
            str(path), [f"expected a zip as torch.save writes it, got a file that starts with {magic!r}"]
        )
    file.seek(0)


def _check_directory(file: BinaryIO, path: Path) -> None:
    """`zipfile` makes an object of every entry of the directory, which is as long as its end says."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - _DIRECTORY_END.size - (1 << 16)))
    tail = file.read()
    end = len(tail) - _DIRECTORY_END.size
    if not (tail.startswith(b"PK\x05\x06", end) and tail.endswith(b"\0\0")):  # there is a comment behind it
        end = tail.rfind(b"PK\x05\x06")
    lengths = [_DIRECTORY_END.unpack_from(tail, end)[0]]
    if (locator := end - _LOCATOR.size) >= 0 and tail.startswith(b"PK\x06\x07", locator):
        places = (_LOCATOR.unpack_from(tail, locator)[0], size - len(tail) + locator - _LARGE_END.size)
        lengths = [_length_in_record(file, place) for place in places]  # Python's versions differ in where they look
    if max(lengths) > MAX_DIRECTORY_BYTES:
        text = f"directory: expected at most {MAX_DIRECTORY_BYTES} bytes, got {max(lengths)}"
        raise CheckpointError(str(path), [text])
    file.seek(0)


def _length_in_record(file: BinaryIO, place: int) -> int:
    file.seek(max(0, place))
    record = file.read(_LARGE_END.size)
    return _LARGE_END.unpack(record)[0] if record.startswith(b"PK\x06\x06") else 0


def _check_byteorder(archive: zipfile.ZipFile, member: zipfile.ZipInfo | None, path: Path) -> None:
    if member and archive.open(member).read(10).strip() != b"little":
        raise CheckpointError(str(path), ["byteorder: expected little, got another"])


def _checked_members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    members, problems = {}, []
    for info in archive.infolist():
        if info.filename in members:
            problems.append(f"{info.filename}: two members of this name")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            problems.append(f"{info.filename}: expected a member stored as it is, got a compressed or encrypted one")
        members[info.filename] = info
    raise_if(CheckpointError, str(path), problems)
    return members


def _stem(members: dict[str, zipfile.ZipInfo], path: Path) -> str:
    stems = [name.removesuffix("/data.pkl") for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(stems) != 1:
        raise CheckpointError(
            str(path), [f"expected one data.pkl in the zip, got {len(stems)}: not written by torch.save"]
        )
    return stems[0]


def _unpickle(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, loads: Callable[[bytes], Any], max_bytes: int
) -> Any:
    if member.file_size > max_bytes:
        text = f"{member.filename}: expected at most {max_bytes} bytes, got {member.file_size}"
        raise CheckpointError(str(path), [text])
    try:
        return loads(archive.read(member))
    except torch_pickle.Refused as error:
        raise CheckpointError(str(path), [f"{member.filename}: {error}"]) from None


def _spans(file: BinaryIO, members: dict[str, zipfile.ZipInfo], path: Path) -> dict[str, tuple[int, int]]:
    """Member name to (offset of its bytes in the file, their number), checked against local headers and each other."""
    size, spans, problems = os.fstat(file.fileno()).st_size, {}, []
    for name, info in members.items():
        file.seek(info.header_offset)
        magic, name_length, extra_length = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        local_name = file.read(name_length)
        start = info.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        if magic != b"PK\x03\x04" or local_name != name.encode():
            problems.append(f"{name}: its local header is damaged")
        if start + info.file_size > size:
            problems.append(f"{name}: truncated, ends at byte {start + info.file_size} of {size}")
        spans[name] = (start, info.file_size)
    for (start, length), (following, _) in itertools.pairwise(sorted(spans.values())):
        if start + length > following:
            problems.append(f"members overlap at byte {following}")
    raise_if(CheckpointError, str(path), problems)
    return spans


def _check_crc(
    file: BinaryIO, spans: dict[str, tuple[int, int]], members: dict[str, zipfile.ZipInfo], path: Path
) -> None:
    problems = []
    for name, (start, left) in spans.items():
        file.seek(start)
        crc = 0
        while left > 0:
            chunk = file.read(min(left, _CHUNK_BYTES))
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        if crc != members[name].CRC:
            problems.append(f"{name}: expected CRC {members[name].CRC:08x}, got {crc:08x}: the bytes are damaged")
    raise_if(CheckpointError, str(path), problems)


class _Place(NamedTuple):
    """Where the storages of a file are."""

    path: Path
    stem: str
    spans: dict[str, tuple[int, int]]

    def locate(self, state: dict) -> dict[str, StoredTensor]:
        tensors, problems = {}, []
        for name, view in dict.items(state):
            member = f"{self.stem}/data/{view.storage.key}" if isinstance(view, torch_pickle.View) else None
            if member is None or not isinstance(name, str):
                problems.append(f"{str(name)[:100]}: expected a named tensor, got {type(view).__name__.lstrip('_')}")
            elif member not in self.spans:
                problems.append(f"{name}: its storage {member[:200]} is not in the file")
            elif self.spans[member][1] != view.storage.nbytes:
                got = self.spans[member][1]
                problems.append(f"{name}: expected a storage of {view.storage.nbytes} bytes, got {got}")
            else:
                tensors[name] = _stored(view, self.spans[member][0])
        raise_if(CheckpointError, str(self.path), problems)
        return tensors


def _stored(view: torch_pickle.View, storage_start: int) -> StoredTensor:
    if view.dtype not in DTYPES:
        return StoredTensor(view.dtype, view.shape, storage_start)
    offset = storage_start + view.offset * DTYPES[view.dtype].itemsize
    dense = row_major_strides(view.shape)
    is_dense = all(size == 1 or a == b for size, a, b in zip(view.shape, view.strides, dense, strict=True))
    return StoredTensor(view.dtype, view.shape, offset, None if is_dense else view.strides)


# -- writing ----------------------------------------------------------------------------------------------------------


def write_file(
    file: BinaryIO,
    tensors: Iterable[PlannedTensor],
    write_tensor: Callable[[IO[bytes], PlannedTensor], None],
    beside: Mapping[str, Any] | None = None,
) -> None:
    """Writes the zip, calling `write_tensor(file, tensor)` for each; `torch.load(weights_only=True)` reads it.

    `write_tensor` must write exactly `tensor.nbytes` bytes. With `beside`, the file holds a dict of that plain data,
    which has the tensors as "model".
    """
    tensors = list(tensors)
    pickled = torch_pickle.dumps(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), beside)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_member("data.pkl"), pickled)
        archive.writestr(_member("byteorder"), b"little")
        for key, tensor in enumerate(tensors):
            with archive.open(_aligned_member(f"data/{key}", tensor.nbytes, file.tell()), "w") as member:
                write_tensor(member, tensor)
        archive.writestr(_member("version"), b"3\n")
    file.flush()
    os.fsync(file.fileno())


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so that equal weights give equal files


def _aligned_member(name: str, nbytes: int, header_offset: int) -> zipfile.ZipInfo:
    info = _member(name)
    info.file_size = nbytes
    needs_zip64 = nbytes * 1.05 > zipfile.ZIP64_LIMIT  # `zipfile` then adds 20 bytes to the local header
    start = header_offset + _LOCAL_HEADER.size + len(info.filename) + 4 + 20 * needs_zip64
    padding = -start % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # the field that torch pads with
    return info
