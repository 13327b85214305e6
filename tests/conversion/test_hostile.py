"""Damaged and hostile files: each is refused in one error that names file and fault, and nothing is executed."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from checkpoints import config_of, tensors_of

from conversion import open_checkpoint, write_checkpoint
from opt_core.errors import CheckpointError, ConfigError

CONFIG = config_of()
TENSORS = tensors_of(CONFIG)
NAME = "model.decoder.layers.1.fc1.weight"


@pytest.fixture
def folder(tmp_path):
    write_checkpoint(tmp_path, CONFIG, TENSORS)
    return tmp_path


@pytest.fixture
def bin_folder(tmp_path):
    write_checkpoint(tmp_path, CONFIG, TENSORS, format="torch-bin")
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    files = write_checkpoint(tmp_path, CONFIG, TENSORS, max_shard_size="25KB")
    assert sum(path.suffix == ".safetensors" for path in files) == 3
    return tmp_path


def refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path, **options)
    assert str(path) in str(raised.value)
    return str(raised.value)


# -- safetensors ------------------------------------------------------------------------------------------------------


def rewrite_header(folder, change, *, pad=0):
    """Replaces the header by `change` of its text; the tensors stay."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = change(data[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :] + b"\0" * pad)


def edit_entry(folder, **fields):
    def change(text):
        header = json.loads(text)
        header[NAME].update(fields)
        return json.dumps(header)

    rewrite_header(folder, change)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "got 0 bytes"),
        (b"\1\2\3", "got 3 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "expected at most"),
        (struct.pack("<Q", 99) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "expected a JSON object"),
        (struct.pack("<Q", 2) + b"{]", "not valid JSON"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
    ],
)
def test_a_broken_safetensors_header_is_named(folder, data, problem):
    (folder / "model.safetensors").write_bytes(data)
    assert problem in refusal(folder)


@pytest.mark.parametrize("cut", [1, 1000, 30_000])
def test_a_truncated_safetensors_file_is_refused_before_a_tensor_is_read(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    assert "truncated" in refusal(folder)


def test_duplicate_names_in_a_safetensors_header_are_refused(folder):
    entry = '"%s":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    rewrite_header(folder, lambda text: "{" + entry % NAME + text[1:])
    assert f"duplicate key '{NAME}'" in refusal(folder)


def test_two_tensors_on_the_same_bytes_are_refused(folder):
    def change(text):
        header = json.loads(text)
        header["model.decoder.layers.9.fc1.weight"] = header[NAME]
        return json.dumps(header)

    rewrite_header(folder, change)
    assert "a gap or an overlap" in refusal(folder)


def test_bytes_after_the_last_tensor_are_refused(folder):
    rewrite_header(folder, str, pad=5)
    assert "5 bytes follow" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(shape=[31, 23]), "expected 2852 bytes"),
        (dict(shape=[2**40, 2**40]), "bytes for F32"),
        (dict(shape=[-31, -22]), "positive integers"),
        (dict(shape=[31.0, 22]), "positive integers"),
        (dict(shape=[True, 682]), "positive integers"),
        (dict(shape=[0, 2**62], data_offsets=[0, 0]), "positive integers"),
        (dict(shape=[1] * 9), "at most 8"),
        (dict(data_offsets=[0, 2728]), "a gap or an overlap"),
        (dict(data_offsets=[10**15, 10**15 + 2728]), "truncated"),
        (dict(data_offsets=[8, 4]), "a start and an end"),
        (dict(dtype="I64", shape=[341]), "expected a dtype of"),
        (dict(dtype="F8_E4M3", shape=[2728]), "expected a dtype of"),
        (dict(dtype=7), "expected a word"),
        (dict(extra=1), "expected an object of"),
    ],
)
def test_an_entry_that_disagrees_with_the_file_is_named(folder, fields, problem):
    edit_entry(folder, **fields)
    message = refusal(folder)
    assert problem in message
    assert NAME in message or "overlap" in problem


@pytest.mark.parametrize("framework", ["tf", "flax", "mlx"])
def test_safetensors_of_another_framework_are_refused_by_their_metadata(folder, framework):
    rewrite_header(folder, lambda text: text.replace('"format":"pt"', f'"format":"{framework}"'))
    assert framework in refusal(folder)


def test_metadata_that_is_not_text_is_refused(folder):
    rewrite_header(folder, lambda text: text.replace('"format":"pt"', '"format":1'))
    assert "__metadata__" in refusal(folder)


# -- torch .bin -------------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def save_bin(folder, state, **options):
    torch.save(state, folder / "pytorch_model.bin", **options)


def rebuild(folder, change, **options):
    """Copies the members of the zip through `change(name, data)`, which may return several."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in members:
            for new_name, new_data in change(name, data):
                archive.writestr(new_name, new_data)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_in_the_pickle_is_named_and_never_executed(bin_folder, protocol):
    canary = bin_folder / "executed"
    for payload in (Payload(os.system, f"touch {canary}"), Payload(exec, f"open({str(canary)!r}, 'w')")):
        save_bin(bin_folder, {"decoder.embed_tokens.weight": payload}, pickle_protocol=protocol)
        message = refusal(bin_folder)
        assert "posix.system" in message or ".exec, which" in message
        assert not canary.exists()


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"a": pickle.PickleBuffer}, "pickle asks for"),
        ({"a": torch.nn.Linear(2, 3)}, "torch.nn.modules.linear.Linear"),
        ([torch.zeros(2)], "expected a state dict, got list"),
        ({"step": 3}, "step: expected a named tensor, got int"),
        ({"model": {"decoder.version": torch.ones(1)}}, "model: expected a named tensor"),
        ({7: torch.zeros(2)}, "expected names of tensors"),
        ({"decoder.layers.0.fc1.bias": torch.zeros(31, dtype=torch.int64)}, "expected a dtype of"),
        ({"decoder.layers.0.fc1.bias": torch.zeros(31, dtype=torch.complex64)}, "expected a dtype of"),
        ({"decoder.layers.0.fc1.bias": torch.zeros(0)}, "empty tensor"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "zero or overlapping strides"),
        ({"a": torch.zeros(9).as_strided((5, 5), (1, 1))}, "zero or overlapping strides"),
        ({"a": torch.zeros(20).as_strided((4, 4), (2, 3))}, "zero or overlapping strides"),
        ({"a": torch.zeros(3).to_sparse()}, "pickle asks for"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_bin_that_is_no_state_dict_of_float_tensors_is_refused(bin_folder, state, problem):
    save_bin(bin_folder, state)
    assert problem in refusal(bin_folder)


def state_pickle(size="(J\x1f\x00\x00\x00t", offset="K\x00", stride="(K\x01t", count=31, key="0") -> bytes:
    """`data.pkl` of one bias, with parts to break."""
    storage = f"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00{key}X\x03\x00\x00\x00cpuJ".encode(
        "latin-1"
    )
    storage += struct.pack("<i", count) + b"tQ"
    name = b"decoder.layers.0.fc1.bias"
    return (
        b"\x80\x02ccollections\nOrderedDict\n)R(X" + struct.pack("<I", len(name)) + name
        + b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage
        + (offset + size + stride).encode("latin-1") + b"\x89ccollections\nOrderedDict\n)RtRu."
    )  # fmt: skip


def with_pickle(folder, data):
    rebuild(
        folder,
        lambda name, old: [
            (name, data if name.endswith("data.pkl") else b"\0" * 124 if name.endswith("data/0") else old)
        ],
    )


def test_the_hand_made_pickle_of_these_tests_is_a_good_one(bin_folder):
    with_pickle(bin_folder, state_pickle())
    with open_checkpoint(bin_folder, verify=True) as checkpoint:
        assert checkpoint.shapes == {"decoder.layers.0.fc1.bias": (31,)}


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (state_pickle(offset="K\x01"), "reaches past its storage"),
        (state_pickle(size="(K\x20t"), "reaches past its storage"),
        (state_pickle(size="(J\xff\xff\xff\xfft"), "a tensor of shape (-1,)"),
        (state_pickle(offset="J\xff\xff\xff\xff"), "a tensor of shape"),
        (state_pickle(size="(K\x1fK\x01t"), "a tensor of shape"),
        (state_pickle(size="(G?\xf0\0\0\0\0\0\0t"), "a tensor of shape"),
        (state_pickle(stride="(K\x00t"), "zero or overlapping"),
        (state_pickle(count=32), "expected a storage of 128 bytes, got 124"),
        (state_pickle(count=-1), "describes no storage"),
        (state_pickle(key="?"), "is not in the file"),
        (state_pickle()[:-2], "damaged pickle"),
        (b"\x80\x02N.", "expected a state dict"),
        (b"", "damaged pickle"),
        (b"\x80\x02}r\xff\xff\xff\xff.", ""),  # a memo index that would take 32 GB in a list
        (b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"Nu.", "expected names"),  # a hash as deep as the stack
        (b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR.", "posix.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
        (b"\x80\x02(S'id'\niposix\nsystem\n.", "damaged pickle"),  # INST, which calls without GLOBAL
        (b"\x80\x02\x82\x01.", "damaged pickle"),  # EXT1: a name from the copyreg registry
    ],
)
def test_damage_in_the_pickle_is_refused(bin_folder, data, problem):
    with_pickle(bin_folder, data)
    if problem:
        assert problem in refusal(bin_folder)
    else:
        assert open_checkpoint(bin_folder).shapes == {}


def test_compressed_members_are_refused(bin_folder):
    rebuild(bin_folder, lambda name, data: [(name, data)], compression=zipfile.ZIP_DEFLATED)
    assert "data.pkl: expected a member stored as it is" in refusal(bin_folder)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(bin_folder):
    rebuild(bin_folder, lambda name, data: [(name, data)] * (1 + name.endswith("data/3")))
    assert "data/3: two members of this name" in refusal(bin_folder)


def test_a_missing_storage_is_named_with_its_tensor(bin_folder):
    rebuild(bin_folder, lambda name, data: [] if name.endswith("data/0") else [(name, data)])
    assert "model.decoder.embed_tokens.weight: its storage archive/data/0 is not in the file" in refusal(bin_folder)


def test_big_endian_files_are_refused(bin_folder):
    rebuild(bin_folder, lambda name, data: [(name, b"big" if name.endswith("byteorder") else data)])
    assert "byteorder" in refusal(bin_folder)


def test_a_zip_that_torch_did_not_write_is_refused(bin_folder):
    rebuild(bin_folder, lambda name, data: [(name.replace(".pkl", ".txt"), data)])
    assert "expected one data.pkl" in refusal(bin_folder)


@pytest.mark.parametrize("cut", [1, 100, 40_000])
def test_a_truncated_bin_is_refused(bin_folder, cut):
    path = bin_folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    assert "damaged or truncated" in refusal(bin_folder)


def test_a_flipped_bit_of_a_weight_is_found_by_its_crc_when_asked(bin_folder):
    path = bin_folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    data[data.index(TENSORS["decoder.layers.1.fc1.weight"].tobytes()) + 100] ^= 4
    path.write_bytes(data)
    open_checkpoint(bin_folder).check()
    assert "the bytes are damaged" in refusal(bin_folder, verify=True)


def test_files_from_before_torch_1_6_are_refused_with_what_to_do(bin_folder):
    save_bin(bin_folder, {"a": torch.zeros(3)}, _use_new_zipfile_serialization=False)
    assert "save it again" in refusal(bin_folder)


@pytest.mark.parametrize(
    "data", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x89HDF\r\n\x1a\n"]
)
def test_a_bin_that_is_something_else_is_refused(bin_folder, data):
    (bin_folder / "pytorch_model.bin").write_bytes(data)
    assert "expected a zip as torch.save writes it" in refusal(bin_folder)


def test_no_single_damaged_byte_does_more_than_raise_our_error(bin_folder):
    path = bin_folder / "pytorch_model.bin"
    good = path.read_bytes()
    generator = np.random.default_rng(3)
    ends = len(good) - 9000 + generator.integers(9000, size=150)
    starts = generator.integers(6000, size=150)
    refused = 0
    for position in [*starts, *ends]:
        path.write_bytes(good[:position] + bytes([generator.integers(256)]) + good[position + 1 :])
        try:
            with open_checkpoint(bin_folder, verify=True) as checkpoint:
                for name in checkpoint.shapes:
                    checkpoint.read(name)
        except CheckpointError:
            refused += 1
    assert refused > 200


# -- index and folder -------------------------------------------------------------------------------------------------


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    "shard",
    ["../other/w.safetensors", "/etc/w.safetensors", "a/w.safetensors", "a\\w.safetensors", "C:w.safetensors", "..", "",
     "w\0.safetensors", 7, None, ["model-00001-of-00003.safetensors"]],
)  # fmt: skip
def test_a_shard_that_is_not_a_plain_name_is_refused(sharded, shard):
    edit_index(sharded, lambda weight_map: weight_map.update({NAME: shard}))
    assert "expected the plain name of a file" in refusal(sharded)


def test_a_shard_of_another_kind_is_refused(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update({NAME: "config.json"}))
    assert "config.json: expected a name that ends in .safetensors" in refusal(sharded)


def test_a_link_that_leaves_the_folder_is_refused(sharded, tmp_path_factory):
    shard = sharded / "model-00002-of-00003.safetensors"
    outside = tmp_path_factory.mktemp("outside") / shard.name
    shard.rename(outside)
    shard.symlink_to(outside)
    assert "a link that leaves the folder" in refusal(sharded)


def test_links_inside_the_folder_are_followed(sharded):
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.rename(sharded / "blob")
    shard.symlink_to("blob")
    open_checkpoint(sharded).check()


def test_all_missing_shards_are_listed(sharded):
    for number in (1, 3):
        (sharded / f"model-0000{number}-of-00003.safetensors").unlink()
    message = refusal(sharded)
    assert "model-00001-of-00003.safetensors: missing" in message
    assert "model-00003-of-00003.safetensors: missing" in message


def test_an_index_that_omits_a_tensor_or_a_shard_is_refused(sharded):
    index = (sharded / "model.safetensors.index.json").read_text()
    edit_index(sharded, lambda weight_map: weight_map.pop(NAME))
    assert f"{NAME}: stored in model-0000" in refusal(sharded / "model.safetensors.index.json")
    (sharded / "model.safetensors.index.json").write_text(index)
    last = "model-00003-of-00003.safetensors"
    edit_index(sharded, lambda wm: [wm.pop(name) for name in list(wm) if wm[name] == last])
    assert "expected 3 shards, the index names 2" in refusal(sharded / "model.safetensors.index.json")


def test_a_tensor_that_the_index_puts_into_the_wrong_shard_is_named(sharded):
    edit_index(sharded, lambda wm: wm.update({"model.decoder.embed_tokens.weight": "model-00003-of-00003.safetensors"}))
    message = refusal(sharded / "model.safetensors.index.json")
    assert "embed_tokens.weight: the index says model-00003-of-00003.safetensors, where it is not, but in" in message


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, third = (sharded / f"model-0000{number}-of-00003.safetensors" for number in (1, 3))
    third.write_bytes(first.read_bytes())
    message = refusal(sharded / "model.safetensors.index.json")
    assert "stored in model-00001-of-00003.safetensors and model-00003-of-00003.safetensors" in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key 'a'"),
    ],
)
def test_a_broken_index_is_named(sharded, text, problem):
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    assert problem in refusal(index)


def test_an_index_over_ten_megabytes_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text(" " * (10 * 2**20 + 1))
    assert "bytes of JSON" in refusal(index)


def test_shards_without_an_index_and_a_single_file_beside_an_index_are_refused(sharded):
    (sharded / "model.safetensors").write_bytes((sharded / "model-00001-of-00003.safetensors").read_bytes())
    assert "holds both" in refusal(sharded)
    (sharded / "model.safetensors").unlink()
    (sharded / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json: missing" in refusal(sharded)


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("tf_model.h5", "Keras"),
        ("flax_model.msgpack", "Flax"),
        ("adapter_model.safetensors", "LoRA"),
    ],
)
def test_a_folder_of_another_format_is_refused_by_name(tmp_path, file, what):
    CONFIG.to_json(tmp_path)
    (tmp_path / file).write_bytes(b"x")
    assert f"{file}: " in refusal(tmp_path)
    assert what in refusal(tmp_path)


def test_a_missing_config_or_source_is_named(folder):
    assert "no such file or folder" in refusal(folder / "nowhere")
    (folder / "config.json").unlink()
    assert "config.json: missing" in refusal(folder)
    assert open_checkpoint(folder, config=CONFIG).shapes


def test_a_config_that_is_no_opt_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match="model_type"):
        open_checkpoint(folder)
