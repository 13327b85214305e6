"""TensorFlow's checkpoint without TensorFlow: what is written comes back; damage and hostile files are refused by name.

That TensorFlow itself reads it, and the reverse, is tested in tests/tf/test_tf_checkpoint.py.
"""

import contextlib
import os
import struct
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion import crc32c, resolve
from conversion.safetensors_file import PlannedTensor
from conversion.tf_checkpoint.bundle_entry import text_bytes
from conversion.tf_checkpoint.protobuf_wire import Fixed32, fields, message, varint
from conversion.tf_checkpoint.sstable import MAGIC, MAX_TABLE_BYTES, read_table, table_bytes
from conversion.tf_checkpoint.tensor_bundle import latest_index, open_file, write_folder
from conversion.tf_checkpoint.trackable_graph import graph_bytes, variable_names
from opt_core.errors import CheckpointError, InputError

FC1, BIAS, HEAD = "model/decoder/layers/0/fc1/weight", "model/decoder/layers/0/fc1/bias", "lm_head/weight"
SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"
SHAPES = {FC1: (7, 5), BIAS: (7,), HEAD: (11, 3)}
DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensors_of(dtype: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {name: random.normal(size=shape).astype(DTYPES[dtype]) for name, shape in SHAPES.items()}


def write(folder, tensors, **options):
    """Writes each tensor in two pieces; returns the index."""

    def write_tensor(file, tensor):
        data = tensors[tensor.name].tobytes()
        file.write(memoryview(data)[:3])
        file.write(memoryview(data)[3:])

    planned = [PlannedTensor(name, array.dtype.name, array.shape) for name, array in tensors.items()]
    write_folder(folder, planned, write_tensor, **options)
    return folder / f"{options.get('prefix', 'ckpt-1')}.index"


@pytest.fixture
def index(tmp_path):
    return write(tmp_path, tensors_of("float32"))


def data_file(index):
    return index.with_name("ckpt-1.data-00000-of-00001")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(tmp_path, dtype):
    tensors = tensors_of(dtype)
    file = open_file(write(tmp_path, tensors, prefix="any.name"), verify=True)
    assert file.tensors.keys() == tensors.keys()
    assert [name.partition("/")[0] for name in file.skipped] == [GRAPH.decode(), "save_counter"]
    for name, expected in tensors.items():
        got = file.read(name)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()
        assert got.flags.writeable
        assert got.ctypes.data % 64 == 0
    file.close()
    got[:] = 0  # the map is private
    assert open_file(tmp_path / "any.name.index", verify=True).read(name).tobytes() == expected.tobytes()


def test_equal_tensors_give_equal_files_and_the_state_file_names_the_prefix(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write(folder, tensors_of("float32"))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["checkpoint", "ckpt-1.data-00000-of-00001", "ckpt-1.index"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    assert 'model_checkpoint_path: "ckpt-1"' in (tmp_path / "a" / "checkpoint").read_text()


def test_the_prefix_that_tensorflow_calls_a_checkpoint_is_found(tmp_path, monkeypatch):
    write_folder(tmp_path, [], lambda file, tensor: None)
    monkeypatch.chdir(tmp_path.parent)
    assert resolve(tmp_path / "ckpt-1") == tmp_path / "ckpt-1.index"
    assert resolve(f"{tmp_path.name}/ckpt-1") == Path(tmp_path.name) / "ckpt-1.index"  # and no id of the hub


def test_the_latest_of_several_checkpoints_is_the_one_that_the_state_file_names(tmp_path):
    assert latest_index(tmp_path) is None
    older, newer = (write(tmp_path, tensors_of("float16"), prefix=f"ckpt-{number}") for number in (9, 10))
    assert latest_index(tmp_path) == newer
    state = tmp_path / "checkpoint"
    for path, expected in (("ckpt-9", older), ("/home/someone/run/ckpt-9", older), ("ckpt-11", None), ("..", None)):
        state.write_text(f'model_checkpoint_path: "{path}"\nall_model_checkpoint_paths: "ckpt-10"\n')
        assert latest_index(tmp_path) == expected
    state.write_bytes(b"\xff" * 100)
    assert latest_index(tmp_path) is None


def test_tensors_in_several_data_files_are_read_and_keep_different_places(index):
    """Here the head is moved to a second file, at the offset that the first tensor has in the first."""
    tensors = tensors_of("float32")
    edit(index, {b"": [(1, 2)], (HEAD + SUFFIX).encode(): {3: 1, 4: 0}})
    os.rename(data_file(index), index.with_name("ckpt-1.data-00000-of-00002"))
    index.with_name("ckpt-1.data-00001-of-00002").write_bytes(tensors[HEAD].tobytes())
    file = open_file(index, verify=True)
    assert all(np.array_equal(file.read(name), tensor) for name, tensor in tensors.items())
    assert len({tensor.offset for tensor in file.tensors.values()}) == len(tensors)


def test_a_checkpoint_of_tensorflow_1_has_no_graph_and_its_keys_are_the_names(index):
    table = read_table(index)
    del table[GRAPH]
    index.write_bytes(table_bytes({key.removesuffix(SUFFIX.encode()): value for key, value in table.items()}))
    file = open_file(index)
    assert file.tensors.keys() == SHAPES.keys()
    assert file.skipped == ("save_counter",)


def test_names_follow_the_graph_around_optimizers_and_lists(index):
    """As in a checkpoint of a compiled Keras model: the key is the shortest way to a variable, not the model's."""
    key = f"model/optimizer/_trainable_variables/0{SUFFIX}"
    table = read_table(index)
    table[key.encode()] = table.pop((FC1 + SUFFIX).encode())
    index.write_bytes(table_bytes(table))
    nodes = [
        node([("model", 1), ("variables", 3), ("lm_head", 4)]),
        node([("optimizer", 2), ("layers", 6)]),
        node([("_trainable_variables", 3), ("0", 5)]),
        node([("0", 5)]),
        node([("weight", 7)]),
        node([], [key]),
        node([("3", 5), ("model", 1)]),  # back to where it came from
        node([], [HEAD + SUFFIX]),
    ]
    replace_graph(index, b"".join(nodes))
    file = open_file(index)
    assert file.tensors.keys() == {"model/layers/3", HEAD}
    assert BIAS + SUFFIX in file.skipped
    np.testing.assert_array_equal(file.read("model/layers/3"), tensors_of("float32")[FC1])


def test_the_graph_that_is_written_leads_to_every_name():
    names = ["model/layers/0/weight", "model/layers/10/weight", "model/layers/2/weight", "head/bias"]
    assert variable_names(graph_bytes(names)) == {name + SUFFIX: name for name in names}


def test_checksums_are_those_of_the_standard_with_and_without_the_package(monkeypatch):
    for data, crc in ((b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA)):  # RFC 3720, appendix B.4
        assert crc32c.extend(crc32c.extend(0, data[:4]), data[4:]) == crc
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    assert crc32c.extend(crc32c.extend(0, b"1234"), b"56789") == 0xE3069283


def test_without_google_crc32c_a_checkpoint_is_read_but_neither_verified_nor_written(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    np.testing.assert_array_equal(open_file(index).read(FC1), tensors_of("float32")[FC1])
    for call in (lambda: open_file(index, verify=True), lambda: write(index.parent, {}, prefix="other")):
        with pytest.raises(InputError, match="pip install google-crc32c"):
            call()
    assert not index.with_name("other.data-00000-of-00001").exists()


# -- damage -----------------------------------------------------------------------------------------------------------


def refusal(index, **options) -> str:
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as raised:
        open_file(index, **options)
    assert time.perf_counter() - start < 5
    assert str(index) in str(raised.value)
    return str(raised.value)


def edit(index, changes: dict) -> None:
    """Sets fields of entries: key to a list of fields, which replaces all, or to {field: value, or None to delete}."""
    table = read_table(index)
    for key, change in changes.items():
        if isinstance(change, dict):
            kept = [(number, value) for number, value in fields(table[key]) if number not in change]
            kept = [(number, Fixed32(value) if number == 6 else value) for number, value in kept]
            change = kept + [(number, value) for number, value in change.items() if value is not None]
        table[key] = change if isinstance(change, bytes) else message(change)
    index.write_bytes(table_bytes(table))


def node(children, keys=()) -> bytes:
    """An object of the graph: its attributes, and the keys under which its values are stored."""
    references = [(1, message([(2, name.encode()), (1, number)])) for name, number in children]
    attributes = [(2, message([(1, b"VARIABLE_VALUE"), (3, key.encode())])) for key in keys]
    return message([(1, message(references + attributes))])


def replace_graph(index, graph: bytes) -> None:
    stored, crc = text_bytes(graph)
    start = data_file(index).stat().st_size
    with open(data_file(index), "ab") as file:
        file.write(stored)
    edit(index, {GRAPH: {4: start, 5: len(stored), 6: Fixed32(crc32c.masked(crc))}})


def shape_of(*sizes: int) -> bytes:
    return message((2, message([(1, size)])) for size in sizes)


NEGATIVE = (1 << 64) - 1
ENTRY = (FC1 + SUFFIX).encode()
CHANGES = {
    "no data files": ({b"": [(1, 0)]}, "expected 1 to 9999 data files"),
    "a negative number of data files": ({b"": [(1, NEGATIVE)]}, "got -1"),
    "two billion data files": ({b"": [(1, 1 << 31)]}, "got 2147483648"),
    "a data file that is not there": ({b"": [(1, 2)]}, "ckpt-1.data-00000-of-00002: missing"),
    "big-endian": ({b"": [(1, 1), (2, 1)]}, "big-endian"),
    "a later version": ({b"": [(1, 1), (3, message([(2, 2)]))]}, "version 2"),
    "a header that is no message": ({b"": b"\xff"}, "header: expected a number"),
    "a header with text for a number": ({b"": [(1, b"1")]}, "header: field 1: expected a number"),
    "slices": ({ENTRY: {7: b""}}, f"{FC1}{SUFFIX}: expected a whole tensor, got one in slices"),
    "unknown rank": ({ENTRY: {2: message([(3, 1)])}}, "unknown rank"),
    "a negative size": ({ENTRY: {2: shape_of(7, NEGATIVE)}}, "shape: expected at most 8 sizes, got [7, -1]"),
    "nine axes": ({ENTRY: {2: shape_of(*[1] * 9)}}, "shape: expected at most 8 sizes"),
    "an absurd shape": ({ENTRY: {2: shape_of(1 << 62, 1 << 62)}}, "bytes for float32 (4611686018427387904"),
    "a transposed axis too long": ({ENTRY: {2: shape_of(5, 8)}}, "expected 160 bytes for float32 (5, 8), got 140"),
    "no elements": ({ENTRY: {2: shape_of(0, 5), 5: 0}}, f"{FC1}: expected positive sizes, got (0, 5)"),
    "text for a weight": ({ENTRY: {1: 7}}, f"{FC1}: expected numbers, got a dtype of string"),
    "a dtype that is none": ({ENTRY: {1: 999}}, f"{FC1}: expected numbers, got a dtype of number 999"),
    "a resource": ({ENTRY: {1: 20}}, f"{FC1}: expected numbers, got a dtype of number 20"),
    "a wider dtype": ({ENTRY: {1: 2}}, "expected 280 bytes for float64 (7, 5), got 140"),
    "another data file": ({ENTRY: {3: 1}}, f"{FC1}{SUFFIX}: expected one of 1 data files, got number 1"),
    "a negative data file": ({ENTRY: {3: NEGATIVE}}, "got number -1"),
    "an offset behind the end": ({ENTRY: {4: 1 << 40}}, f"{FC1}{SUFFIX}: truncated, or a wrong place"),
    "a negative offset": ({ENTRY: {4: NEGATIVE}}, "a wrong place: bytes -1 to 139"),
    "a negative length": ({ENTRY: {5: NEGATIVE}}, "got -1"),
    "an offset beyond 64 bits": ({ENTRY: {4: (1 << 63) - 1}}, "a wrong place: bytes 9223372036854775807"),
    "an overlap": ({ENTRY: {4: 60}}, "expected 200 at least: an overlap"),
    "two weights in one place": ({(BIAS + SUFFIX).encode(): {4: 0, 3: 0}}, "an overlap"),
    "a field that ends too late": ({ENTRY: b"\x12\x7f"}, f"{FC1}{SUFFIX}: expected a field"),
    "a group": ({ENTRY: b"\x0b"}, "expected a field of a message"),
    "a number without an end": ({ENTRY: b"\x08" + b"\xff" * 11}, "got one without an end"),
    "a key that is no text": ({b"\xff/weight": b""}, "\\xff/weight: 'utf-8' codec"),
    "a graph that is numbers": ({GRAPH: {1: 1, 5: 4, 2: shape_of(1)}}, "expected one text, got float32 (1,)"),
    "a graph with another checksum": ({GRAPH: {6: Fixed32(5)}}, "with checksum 00000005: the bytes are damaged"),
}


@pytest.mark.parametrize(("changes", "problem"), CHANGES.values(), ids=CHANGES)
def test_an_index_that_disagrees_with_itself_or_its_data_is_named(index, changes, problem):
    edit(index, changes)
    assert problem in refusal(index)


GRAPHS = {
    "no objects": (b"", "expected 1 to 65536 objects, got none"),
    "an object that is not there": (node([("a", 1)]), "expected one of 1 objects, got number 1"),
    "a negative object": (node([("a", NEGATIVE)]), "got number -1"),
    "a variable that is not stored": (node([], ["fc2" + SUFFIX]), f"fc2{SUFFIX}: in the object graph, but not"),
    "two variables in one place": (node([], [FC1 + SUFFIX, HEAD + SUFFIX]), "one variable at each attribute path"),
    "names that grow without end": (b"".join(node([("a" * 99, i + 1)]) for i in range(20)), "at most 1024 letters"),
    "attributes that are no text": (message([(1, message([(1, message([(2, b"\xff")]))]))]), "expected UTF-8"),
    "a number for an object": (message([(1, 1)]), "expected text or a message, got the number 1"),
    "too many objects": (b"\x0a\x00" * 300_000, "expected 1 to 65536 objects"),
    "too many bytes": (b"\x0a\x00" * (1 << 21), "expected at most 4194304 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("graph", "problem"), GRAPHS.values(), ids=GRAPHS)
def test_a_graph_that_leads_astray_is_refused(index, graph, problem):
    replace_graph(index, graph)
    assert problem in refusal(index)


def block(content: bytes, restarts: int = 1, kind: int = 0) -> bytes:
    data = content + struct.pack("<II", 0, restarts)
    return data + struct.pack("<BI", kind, crc32c.masked(crc32c.extend(0, data + bytes([kind]))))


def entry(key: bytes, value: bytes, shared: int = 0) -> bytes:
    return varint(shared) + varint(len(key)) + varint(len(value)) + key + value


def table(data_block: bytes, *, listed: int = 1, size: int | None = None, start: int = 0) -> bytes:
    """A table of one block of entries, which the index block lists so many times, perhaps wrongly."""
    handle = varint(start) + varint(len(data_block) - 5 if size is None else size)
    index_block = block(b"".join(entry(b"%03d" % number, handle) for number in range(listed)))
    footer = varint(0) + varint(0) + varint(len(data_block)) + varint(len(index_block) - 5)
    return data_block + index_block + footer.ljust(40, b"\0") + MAGIC


TABLES = {
    "nothing": (b"", "got another or truncated file of 0 bytes"),
    "another file": (b"PK\x03\x04" + bytes(100), "got another or truncated file of 104 bytes"),
    "only a footer": (bytes(40) + MAGIC, "block at byte 0: truncated"),
    "a place without an end": (b"\xff" * 40 + MAGIC, "expected a number at byte"),
    "a place behind the end": (varint(1 << 50).ljust(40, b"\1") + MAGIC, "truncated"),
    "a table of something else": (table(block(entry(b"a", b"b"))), "a table without its header"),
    "a compressed block": (table(block(entry(b"", b""), kind=1)), "block at byte 0: expected one stored as it is"),
    "a block beyond the file": (table(block(entry(b"", b"")), size=1 << 40), "block at byte 0: truncated"),
    "a block in the footer": (table(block(entry(b"", b"")), start=1 << 63), "truncated"),
    "one block twice": (table(block(entry(b"", b"")), listed=2), "got an overlap"),
    "restarts without end": (table(block(entry(b"", b""), restarts=1 << 31)), "expected a list of restarts"),
    "a block without restarts": (table(struct.pack("<BI", 0, crc32c.masked(crc32c.extend(0, b"\0")))), "restarts"),
    "more shared than there is": (table(block(entry(b"", b"", shared=9))), "got a damaged entry"),
    "a value behind the end": (table(block(entry(b"", b"")[:2] + b"\x7f")), "got a damaged entry"),
    "a key without end": (table(block(entry(b"k" * 2000, b""))), "got a damaged entry"),
    "one key twice": (table(block(entry(b"k", b"") * 2)), "expected keys in ascending order, got b'k'"),
    "keys in disorder": (table(block(entry(b"k", b"") + entry(b"a", b""))), "ascending order, got b'a'"),
    "too many keys": (
        table(block(b"".join(entry(b"%07d" % number, b"") for number in range(131_073)))), "at most 131072 entries"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "problem"), TABLES.values(), ids=TABLES)
def test_a_table_that_is_none_is_refused(index, data, problem):
    index.write_bytes(data)
    assert problem in refusal(index)


def test_an_index_of_giant_size_is_refused_unread(index):
    os.truncate(index, MAX_TABLE_BYTES + 1)
    assert f"at most {MAX_TABLE_BYTES} bytes" in refusal(index)


def test_every_flipped_byte_of_an_index_is_found_or_changes_nothing(index):
    intact, expected = index.read_bytes(), open_file(index).tensors
    for position in range(len(intact)):
        index.write_bytes(intact[:position] + bytes([intact[position] ^ 0x41]) + intact[position + 1 :])
        with contextlib.suppress(CheckpointError):
            assert open_file(index).tensors == expected


def test_values_that_are_damaged_and_signed_again_are_read_or_refused_but_never_crash(index):
    intact, random, refused = read_table(index), np.random.default_rng(5), 0
    for _ in range(500):
        damaged = {key: bytearray(value) for key, value in intact.items()}
        value = damaged[list(damaged)[random.integers(len(damaged))]]
        value[random.integers(len(value))] = random.integers(256)
        index.write_bytes(table_bytes({key: bytes(value) for key, value in damaged.items()}))
        try:
            assert open_file(index).tensors
        except CheckpointError:
            refused += 1
    assert 100 < refused < 500


@pytest.mark.parametrize("cut", [1, 100, 500])
def test_a_truncated_data_file_is_named(index, cut):
    os.truncate(data_file(index), data_file(index).stat().st_size - cut)
    assert "truncated" in refusal(index)


def test_a_missing_data_file_is_named(index):
    data_file(index).unlink()
    assert "ckpt-1.data-00000-of-00001: missing" in refusal(index)


def test_a_data_file_that_is_a_link_out_of_the_folder_is_refused(index, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "data"
    os.rename(data_file(index), elsewhere)
    data_file(index).symlink_to(elsewhere)
    assert "ckpt-1.data-00000-of-00001: a link that leaves the folder" in refusal(index)


def test_a_flipped_byte_of_a_weight_is_found_where_checksums_are_compared(index):
    data = bytearray(data_file(index).read_bytes())
    data[open_file(index).tensors[BIAS].offset + 3] ^= 1
    data_file(index).write_bytes(data)
    open_file(index)
    message = refusal(index, verify=True)
    assert f"{BIAS}{SUFFIX}: expected checksum" in message
    assert FC1 not in message


def test_all_problems_are_listed_at_once(index):
    edit(index, {ENTRY: {1: 2}, (HEAD + SUFFIX).encode(): {4: 1 << 40}})
    message = refusal(index)
    assert "2 problems" in message
    assert FC1 in message
    assert HEAD in message
