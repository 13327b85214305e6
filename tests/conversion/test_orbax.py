"""Checkpoints of Orbax: it restores what we write, we read what it writes, and damage is refused before it is read."""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from flax import nnx

from conversion import crc32c
from conversion.orbax import chunk_store, ocdbt, orbax_folder, zstd_frame
from conversion.safetensors_file import PlannedTensor
from opt_core.errors import CheckpointError

KERNEL, BIAS = "decoder.layers.1.fc1.kernel", "decoder.layers.1.fc1.bias"
SHAPES = {
    "decoder.embed_tokens.embedding": (101, 13),
    "decoder.layers.0.fc1.kernel": (11, 31),
    KERNEL: (11, 31),
    BIAS: (31,),
    "decoder.layers.10.fc1.bias": (31,),
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def tensors_of(dtype: str = "float32") -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    return {name: generator.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in SHAPES.items()}


def tree_of(tensors: dict) -> dict:
    tree: dict = {}
    for name, value in tensors.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def flat(tree, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name


def assert_holds(path: Path, expected: dict) -> orbax_folder.OrbaxFolder:
    found = orbax_folder.open_folder(path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()} == {
        name: (str(array.dtype), array.shape) for name, array in expected.items()
    }
    assert_same({name: found.read(name) for name in found.tensors}, expected)
    return found


def write(path: Path, tensors: dict[str, np.ndarray], piece: int = 77) -> Path:
    def write_tensor(file, tensor):
        data = tensors[tensor.name].tobytes()
        for start in range(0, len(data), piece):
            file.write(data[start : start + piece])

    path.mkdir()
    planned = [PlannedTensor(name, str(array.dtype), array.shape) for name, array in tensors.items()]
    orbax_folder.write_folder(path, planned, write_tensor)
    return path


def save(path: Path, tree, **options) -> Path:
    """Saves as Orbax does where nothing is said, or with options of its handler."""
    if options:
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(path, tree)
        return path
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def on_device(tensors: dict) -> dict:
    return tree_of({name: jnp.asarray(array) for name, array in tensors.items()})


# -- Orbax reads what we write ----------------------------------------------------------------------------------------


@pytest.fixture(params=[None, 300], ids=["one chunk", "many chunks"])
def chunk_bytes(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(orbax_folder, "MAX_CHUNK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_restores_what_we_write(tmp_path, dtype, chunk_bytes):
    tensors = tensors_of(dtype)
    path = write(tmp_path / "ours", tensors)
    assert_same(dict(flat(ocp.StandardCheckpointer().restore(path))), tensors)
    assert_same(dict(flat(ocp.PyTreeCheckpointer().restore(path))), tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_orbax_restores_what_we_write_into_a_target_of_jax_arrays(tmp_path, dtype, chunk_bytes):
    tensors = tensors_of(dtype)
    target = jax.tree.map(jnp.zeros_like, on_device(tensors))
    restored = ocp.StandardCheckpointer().restore(write(tmp_path / "ours", tensors), target)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
    assert_same(dict(flat(restored)), tensors)


def test_orbax_sees_the_shapes_and_dtypes_of_what_we_write(tmp_path):
    tensors = tensors_of("bfloat16")
    tree = ocp.StandardCheckpointer().metadata(write(tmp_path / "ours", tensors)).item_metadata.tree
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in flat(tree)} == {
        name: (array.shape, array.dtype) for name, array in tensors.items()
    }


@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
def test_what_we_write_comes_back_bit_for_bit(tmp_path, monkeypatch, dtype, chunk_bytes):
    monkeypatch.setitem(DTYPES, "float64", np.float64)
    tensors = tensors_of(dtype)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, -0.0, 1e-40, 1e-7], DTYPES[dtype])
    tensors[BIAS][: special.size] = special
    assert_holds(write(tmp_path / "ours", tensors), tensors)


@pytest.mark.parametrize("piece", [1, 1000, 10**6])
def test_bytes_may_come_in_pieces_of_any_size(tmp_path, piece, chunk_bytes):
    tensors = {BIAS: np.arange(31, dtype=np.float32), KERNEL: np.arange(341, dtype=np.float32).reshape(11, 31)}
    assert_holds(write(tmp_path / "ours", tensors, piece), tensors)


def test_no_chunk_is_larger_than_the_bound_and_none_is_much_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(orbax_folder, "MAX_CHUNK_BYTES", 3000)
    found = orbax_folder.open_folder(write(tmp_path / "ours", {KERNEL: np.ones((101, 13), np.float32)}))
    ((_, array),) = found._arrays.values()
    assert array.chunk_bytes <= 3000
    assert array.chunk_counts == (2, 1)
    assert array.chunk == (51, 13)


@pytest.mark.parametrize("names", [["a.b", "a.b.c"], ["a..b"], ["a/b"], ["a...."], [""]])
def test_names_that_make_no_tree_are_refused(tmp_path, names):
    with pytest.raises(CheckpointError, match=r"array too|without separators"):
        write(tmp_path / "ours", {name: np.ones(3, np.float32) for name in names})


# -- we read what Orbax writes ----------------------------------------------------------------------------------------

FORMS = [dict(use_ocdbt=ocdbt, use_zarr3=zarr3) for ocdbt in (True, False) for zarr3 in (False, True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_orbax_writes(tmp_path, dtype):
    tensors = tensors_of(dtype)
    found = assert_holds(save(tmp_path / "theirs", on_device(tensors)), tensors)
    assert found.skipped == {}


@pytest.mark.parametrize("form", [*FORMS, *({**form, "use_compression": False} for form in FORMS)], ids=str)
def test_we_read_every_form_of_leaves(tmp_path, form):
    tensors = {**tensors_of("float32"), **{"half.bias": np.arange(7, dtype=ml_dtypes.bfloat16)}}
    assert_holds(save(tmp_path / "theirs", on_device(tensors), **form), tensors)


@pytest.mark.parametrize("zarr3", [False, True])
def test_we_read_arrays_that_orbax_cut_into_chunks(tmp_path, zarr3):
    tensors = {KERNEL: np.arange(44 * 26, dtype=np.float32).reshape(44, 26), BIAS: np.ones(31, np.float32)}
    arguments = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=400), tree_of(tensors))
    handler = ocp.PyTreeCheckpointHandler(use_zarr3=zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "theirs", on_device(tensors), save_args=arguments)
    found = assert_holds(tmp_path / "theirs", tensors)
    assert len(list(found._arrays[KERNEL][1].chunk_keys())) > 10


def test_numpy_leaves_are_read_too(tmp_path):
    assert_holds(save(tmp_path / "theirs", tree_of(tensors_of())), tensors_of())


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 7, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


def parameters_of(model) -> dict[str, np.ndarray]:
    return {
        f"layers.{number}.{name}": np.asarray(getattr(layer, name)[...])
        for number, layer in enumerate(model.layers)
        for name in ("kernel", "bias")
    }


@pytest.mark.parametrize("form", ["state", "pure dict", "params", "nested params"])
def test_states_and_pure_dicts_of_nnx_have_the_same_names(tmp_path, form):
    model = Model()
    state = nnx.state(model, nnx.Param)
    tree = state if form == "state" else nnx.to_pure_dict(state)
    for _ in range({"params": 1, "nested params": 2}.get(form, 0)):
        tree = {"params": tree}
    path = save(tmp_path / "theirs", tree)
    assert (".value" in (path / "_METADATA").read_text().replace("', '", ".")) == (form == "state")
    assert_holds(path, parameters_of(model))


def test_the_random_state_of_a_whole_module_is_left_out(tmp_path):
    model = Model()
    found = assert_holds(save(tmp_path / "theirs", nnx.split(model)[1]), parameters_of(model))
    assert found.skipped == {
        "dropout.rngs.count.value": "a scalar",
        "dropout.rngs.key.value": "a key of random numbers",
    }


def test_beside_params_everything_is_left_out(tmp_path):
    state = {"params": on_device(tensors_of()), "step": 3, "more": {"mu": jnp.ones(3)}, "empty": None}
    found = assert_holds(save(tmp_path / "theirs", state), tensors_of())
    assert found.skipped == {
        "step": "a scalar, no array",
        "more.mu": "beside params",
        "empty": "a None, no array",
    }


def test_without_params_the_state_of_training_is_left_out(tmp_path):
    state = {**on_device(tensors_of()), "step": jnp.array(3), "opt_state": [{"mu": jnp.ones(3)}], "rng": jnp.ones(2)}
    found = assert_holds(save(tmp_path / "theirs", state), tensors_of())
    assert found.skipped == {"step": "below step", "opt_state.0.mu": "below opt_state", "rng": "below rng"}


def test_lists_and_dicts_of_layers_have_the_same_names(tmp_path):
    layers = [{"bias": jnp.full(3, number, jnp.float32)} for number in range(3)]
    expected = {f"layers.{number}.bias": np.full(3, number, np.float32) for number in range(3)}
    assert_holds(save(tmp_path / "list", {"layers": layers}), expected)
    assert_holds(save(tmp_path / "dict", {"layers": {str(n): layer for n, layer in enumerate(layers)}}), expected)


def test_an_array_that_was_read_is_writable_and_its_own(tmp_path):
    found = assert_holds(write(tmp_path / "ours", tensors_of()), tensors_of())
    array = found.read(KERNEL)
    assert array.flags.c_contiguous
    array[:] = 7
    assert not np.array_equal(found.read(KERNEL), array)


def test_integers_in_the_place_of_weights_are_listed_but_not_read(tmp_path):
    found = orbax_folder.open_folder(save(tmp_path / "theirs", tree_of({KERNEL: jnp.ones((3, 5), jnp.int8)})))
    assert found.tensors[KERNEL].dtype not in orbax_folder.DTYPES
    with pytest.raises(CheckpointError, match=f"{KERNEL}: expected a dtype of"):
        found.read(KERNEL)


# -- where a checkpoint may lie ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    root = tmp_path_factory.mktemp("manager") / "root"
    with ocp.CheckpointManager(root) as manager:
        for step in (7, 11):
            tree = on_device({name: array + step for name, array in tensors_of().items()})
            manager.save(step, args=ocp.args.StandardSave(tree))
    return root


@pytest.fixture
def steps(manager, tmp_path):
    return Path(shutil.copytree(manager, tmp_path / "root"))


def of_step(step: int) -> dict[str, np.ndarray]:
    return {name: array + step for name, array in tensors_of().items()}


def test_a_step_an_item_and_the_latest_step_of_a_manager_are_found(steps):
    assert_holds(steps / "7", of_step(7))
    assert_holds(steps / "7" / "default", of_step(7))
    assert_holds(steps, of_step(11))


def test_a_newer_step_that_is_temporary_is_passed_over(steps):
    (steps / "7").rename(steps / "13.orbax-checkpoint-tmp-5")
    assert_holds(steps, of_step(11))


def test_steps_may_have_a_prefix_but_no_two_the_same_number(steps):
    (steps / "7").rename(steps / "step_12")
    assert_holds(steps, of_step(7))
    (steps / "11").rename(steps / "012")
    assert "expected _METADATA of a checkpoint of Orbax, or one latest step, got 012, step_12" in refusal(steps)


def test_a_single_item_is_found_by_any_name_and_of_two_the_default(steps):
    (steps / "11" / "default").rename(steps / "11" / "state")
    assert_holds(steps / "11", of_step(11))
    shutil.copytree(steps / "7" / "default", steps / "11" / "other")
    assert "expected one item, or one called default, got other, state" in refusal(steps)
    shutil.copytree(steps / "7" / "default", steps / "11" / "default")
    assert_holds(steps, of_step(7))


def unfinish(step: Path) -> None:
    path = step / "_CHECKPOINT_METADATA"
    path.write_text(json.dumps({**json.loads(path.read_text()), "commit_timestamp_nsecs": None}))


def test_an_unfinished_step_is_refused(steps):
    unfinish(steps / "11")
    assert "it is unfinished" in refusal(steps)
    assert "it is unfinished" in refusal(steps / "11")
    (steps / "11").rename(steps / "11.orbax-checkpoint-tmp-99")
    assert "temporary" in refusal(steps / "11.orbax-checkpoint-tmp-99")
    (steps / "7" / "default").rename(steps / "7" / "default.orbax-checkpoint-tmp-3")
    assert "this step has none" in refusal(steps)


def test_a_link_to_another_step_is_not_followed(steps, tmp_path):
    (steps / "11").rename(tmp_path / "outside")
    (steps / "11").symlink_to(tmp_path / "outside")
    assert_holds(steps, of_step(7))


@pytest.mark.parametrize("content", ["nothing", "files", "no folder"])
def test_a_folder_without_a_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / "x"
    if content != "no folder":
        path.mkdir()
    if content == "files":
        (path / "checkpoint").write_bytes(b"\x81")  # what Orbax wrote before it had _METADATA
    assert "expected" in refusal(path)


# -- damaged and hostile ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    big = {**tensors_of(), "big.kernel": np.random.default_rng(5).standard_normal((53, 97)).astype(np.float32)}
    return {
        "ours": write(root / "ours", big),
        "ocdbt": save(root / "ocdbt", on_device(big)),
        "zarr": save(root / "zarr", on_device(big), use_ocdbt=False, use_zarr3=False),
        "zarr3": save(root / "zarr3", on_device(big), use_ocdbt=False, use_zarr3=True),
        "ocdbt3": save(root / "ocdbt3", on_device(big), use_ocdbt=True, use_zarr3=True),
    }


@pytest.fixture
def copy(good, tmp_path) -> Callable[[str], Path]:
    return lambda form: Path(shutil.copytree(good[form], tmp_path / form))


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refusal(path: Path, read: str | None = None) -> str:
    """The error, which must come soon and from little memory; of opening, or of reading a tensor."""
    started, before = time.monotonic(), peak_bytes()
    if read:
        found = orbax_folder.open_folder(path)
        with pytest.raises(CheckpointError) as raised:
            found.read(read)
    else:
        with pytest.raises(CheckpointError) as raised:
            orbax_folder.open_folder(path)
    assert time.monotonic() - started < 5
    assert peak_bytes() - before < 200e6
    assert str(path) in str(raised.value)
    return str(raised.value)


def database(path: Path):
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{path}/"}}).result()


def set_value(path: Path, key: str, value: bytes | None) -> None:
    """Replaces or removes (None) the value of a key, in a database or as a file."""
    if (path / "manifest.ocdbt").exists():
        database(path).write(key, value).result()
    elif value is None:
        (path / key).unlink()
    else:
        (path / key).write_bytes(value)


def get_value(path: Path, key: str) -> bytes:
    if (path / "manifest.ocdbt").exists():
        return database(path).read(key).result().value
    return (path / key).read_bytes()


def edit_array(path: Path, name: str = KERNEL, **fields) -> None:
    """Changes the metadata of one array; None removes a field."""
    key = f"{name}/{'zarr.json' if '3' in path.name else '.zarray'}"
    metadata = {**json.loads(get_value(path, key)), **fields}
    set_value(path, key, json.dumps({k: v for k, v in metadata.items() if v is not ...}).encode())


def edit_tree(path: Path, change: Callable[[dict], None]) -> None:
    fields = json.loads((path / "_METADATA").read_text())
    change(fields)
    (path / "_METADATA").write_text(json.dumps(fields))


def entry_of(fields: dict, name: str = KERNEL) -> dict:
    return fields["tree_metadata"][str(tuple(name.split(".")))]


FORMS_OF_ONE = ["ours", "ocdbt", "zarr", "zarr3", "ocdbt3"]
ZARR_2 = ["ours", "ocdbt", "zarr"]
DATABASES = ["ours", "ocdbt", "ocdbt3"]


def test_the_good_checkpoints_of_these_tests_are_good(good):
    for path in good.values():
        found = orbax_folder.open_folder(path)
        assert_same({name: found.read(name) for name in SHAPES}, tensors_of())


def chunk_key(form: str, name: str = "big.kernel") -> str:
    return f"{name}/{'c/0/0' if '3' in form else '0.0'}"


@pytest.mark.parametrize("form", FORMS_OF_ONE)
def test_a_missing_chunk_is_never_read_as_zeros(copy, form):
    path = copy(form)
    set_value(path, chunk_key(form), None)
    message = refusal(path)
    assert f"big.kernel: {chunk_key(form)}: missing, one of 1 chunks of (53, 97); it would be read as zeros" in message


@pytest.mark.parametrize("form", FORMS_OF_ONE)
def test_all_missing_arrays_are_listed(copy, form):
    path = copy(form)
    for name in (KERNEL, BIAS):
        set_value(path, f"{name}/{'zarr.json' if '3' in form else '.zarray'}", None)
    message = refusal(path)
    assert all(f"{name}: {'zarr.json' if '3' in form else '.zarray'} is missing" in message for name in (KERNEL, BIAS))


@pytest.mark.parametrize("form", FORMS_OF_ONE)
@pytest.mark.parametrize("kept", [0, 5, 100])
def test_a_chunk_cut_short_is_refused(copy, form, kept):
    path = copy(form)
    set_value(path, chunk_key(form), get_value(path, chunk_key(form))[:kept])
    try:
        orbax_folder.open_folder(path)
    except CheckpointError:
        assert "big.kernel/" in refusal(path)
    else:
        assert "big.kernel: damaged" in refusal(path, read="big.kernel")


def repeated(size: int, declared: int, blocks: int) -> bytes:
    """A Zstandard frame of `blocks` blocks, each one byte that stands for `size`."""
    head = b"\x28\xb5\x2f\xfd" + bytes([0b10000000, 0x38]) + struct.pack("<I", declared)  # a window of 128 KB
    block = [(size << 3 | 1 << 1 | (number == blocks - 1)).to_bytes(3, "little") + b"\0" for number in range(blocks)]
    return head + b"".join(block)


@pytest.mark.parametrize("form", ["ocdbt", "zarr"])
def test_a_chunk_that_unpacks_to_gigabytes_is_refused_before(copy, form):
    path = copy(form)
    declared = 4 * 53 * 97
    set_value(path, chunk_key(form), repeated(1 << 17, declared, blocks=50_000))
    assert "blocks that may hold 6553600000" in refusal(path, read="big.kernel")
    set_value(path, chunk_key(form), repeated(1 << 17, 6_553_600_000 % 2**32, blocks=50_000))
    assert f"expected {declared} bytes for float32 (53, 97)" in refusal(path, read="big.kernel")


def test_many_chunks_of_few_bytes_are_refused_as_one_is(copy):
    path = copy("ocdbt")
    frame, entries = (
        repeated(1 << 17, 1 << 20, blocks=8),
        one_array(path, shape=[3 << 18], chunks=[1 << 18], compressor={"id": "zstd"}),
    )
    (path / "chunk").write_bytes(frame * 3)
    entries |= {f"bias/{number}": ("chunk", number * len(frame), len(frame)) for number in range(3)}
    with_root(path, leaf(entries))
    assert f"one byte for 1000 of float32 (786432,), got {3 * len(frame)} bytes" in refusal(path)


def test_the_bomb_of_these_tests_is_a_good_frame(copy):
    path = copy("ocdbt")
    set_value(path, chunk_key("ocdbt"), repeated(4 * 53 * 97, 4 * 53 * 97, blocks=1))
    assert not orbax_folder.open_folder(path).read("big.kernel").any()


def test_the_size_of_a_frame_is_bounded_by_the_heads_of_its_blocks():
    frame = repeated(70_000, 140_000, blocks=2)
    assert zstd_frame.largest_size(memoryview(frame)) == zstd_frame.declared_size(memoryview(frame)) == 140_000
    for damaged in (frame + b"x", frame[:-1], frame[:8], b"x" + frame[1:], b""):
        with pytest.raises(ValueError, match="Zstandard frame"):
            zstd_frame.largest_size(memoryview(damaged))


@pytest.mark.parametrize("form", ["zarr3", "ocdbt3"])
def test_a_shard_whose_index_leaves_its_chunk_out_is_refused(copy, form):
    path = copy(form)
    data = get_value(path, chunk_key(form))
    set_value(path, chunk_key(form), data[:-20] + b"\xff" * 16 + data[-4:])
    assert "it would be read as zeros" in refusal(path, read="big.kernel")


@pytest.mark.parametrize("form", FORMS_OF_ONE)
def test_a_giant_shape_is_refused_before_anything_is_allocated(copy, form):
    path = copy(form)
    if "3" in form:
        edit_array(path, shape=[2**40, 2**40])
    else:
        edit_array(path, shape=[2**40, 2**40], chunks=[2**40, 2**40])
    edit_tree(path, lambda fields: entry_of(fields)["value_metadata"].update(write_shape=[2**40, 2**40]))
    message = refusal(path)
    assert KERNEL in message
    assert "missing" in message or "bytes for" in message or "at least one byte" in message


@pytest.mark.parametrize("form", FORMS_OF_ONE)
@pytest.mark.parametrize(
    "shape", [[31, 11], [11, 31, 1], [341], [11, 32], [10, 31], [0, 31], [-11, 31], [11.0, 31], []]
)
def test_shapes_of_the_array_that_disagree_with_the_tree_are_refused(copy, form, shape):
    path = copy(form)
    edit_array(path, shape=shape)
    assert KERNEL in refusal(path)


@pytest.mark.parametrize("form", FORMS_OF_ONE)
@pytest.mark.parametrize(
    "shape", [[31, 11], [341], [11, 30], [11, 32], [2**40, 2**40], [11, 31, 1], [-1, 31], "11", [True, 31]]
)
def test_shapes_of_the_tree_that_disagree_with_the_array_are_refused(copy, form, shape):
    path = copy(form)
    edit_tree(path, lambda fields: entry_of(fields)["value_metadata"].update(write_shape=shape))
    assert "_METADATA" in refusal(path)


@pytest.mark.parametrize("form", ZARR_2)
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(compressor={"id": "blosc", "cname": "lz4"}), "compressor: expected zstd or none"),
        (dict(compressor={"id": "gzip", "level": 1}), "compressor: expected zstd or none"),
        (dict(filters=[{"id": "delta", "dtype": "<f4"}]), "filters"),
        (dict(order="F"), "order"),
        (dict(zarr_format=3), "zarr_format"),
        (dict(dimension_separator="../"), "dimension_separator"),
        (dict(chunks=[2**40, 31]), "expected chunks no larger than"),
        (dict(chunks=[0, 31]), "positive length"),
        (dict(chunks=[11]), "positive length"),
        (dict(dtype="<f8"), "bytes"),
        (dict(dtype="bfloat16"), "bytes"),
        (dict(kvstore="https://example.com/"), "unexpected ['kvstore']"),
        (dict(compressor=...), "missing ['compressor']"),
    ],
)
def test_metadata_of_zarr_2_that_orbax_does_not_write_is_refused(copy, form, fields, problem):
    path = copy(form)
    edit_array(path, **fields)
    if "dtype" in fields and form != "ours":  # what is packed tells its size only in its head
        assert "bytes for" in refusal(path, read=KERNEL)
        return
    message = refusal(path)
    assert KERNEL in message
    assert problem in message


def codecs(inner, **more) -> list:
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    configuration = {"chunk_shape": [11, 31], "codecs": inner, "index_codecs": index, **more}
    return [{"name": "sharding_indexed", "configuration": configuration}]


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize("form", ["zarr3", "ocdbt3"])
@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        (dict(codecs=codecs([LITTLE, {"name": "blosc"}])), "expected zstd or none"),
        (dict(codecs=codecs([{"name": "bytes", "configuration": {"endian": "big"}}])), "little-endian"),
        (dict(codecs=codecs([{"name": "transpose"}, LITTLE])), "little-endian"),
        (dict(codecs=codecs([LITTLE], chunk_shape=[1, 31])), "sharding_indexed"),
        (dict(codecs=codecs([LITTLE], index_location="start")), "sharding_indexed"),
        (dict(codecs=codecs([LITTLE], more=1)), "sharding_indexed"),
        (dict(codecs=[]), "codecs"),
        (dict(codecs=[{"name": "sharding_indexed"}]), "sharding_indexed"),
        (dict(codecs="zstd"), "codecs"),
        (dict(chunk_grid={"name": "rectilinear"}), "chunk_grid"),
        (dict(chunk_key_encoding={"name": "v2"}), "chunk_key_encoding"),
        (dict(storage_transformers=[{"name": "x"}]), "storage_transformers"),
        (dict(node_type="group"), "node_type"),
        (dict(shape="11"), "positive length"),
        (dict(url="file:///etc/passwd"), "unexpected ['url']"),
    ],
)
def test_metadata_of_zarr_3_that_orbax_does_not_write_is_refused(copy, form, fields, problem):
    path = copy(form)
    edit_array(path, **fields)
    message = refusal(path)
    assert KERNEL in message
    assert problem in message


@pytest.mark.parametrize("form", FORMS_OF_ONE)
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object"),
        (b'{"shape": [1], "shape": [2]}', "duplicate key 'shape'"),
        (b"[" * 60_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b" " * 70_000, "at most 65536 bytes of metadata"),
    ],
    ids=["empty", "a list", "twice", "deep", "no text", "long"],
)
def test_metadata_of_an_array_that_is_no_json_object_is_refused(copy, form, text, problem):
    path = copy(form)
    set_value(path, f"{KERNEL}/{'zarr.json' if '3' in form else '.zarray'}", text)
    assert problem in refusal(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected tree_metadata"),
        ('{"tree_metadata": []}', "expected tree_metadata"),
        ('{"tree_metadata": {"(\'a\',)": 3}}', "expected key_metadata and value_metadata"),
        ('{"tree_metadata": {"(\'a\',)": {"key_metadata": 3, "value_metadata": {}}}}', "expected key_metadata"),
        ('{"tree_metadata": {}, "tree_metadata": {}}', "duplicate key 'tree_metadata'"),
        ('{"tree_metadata": {"x": NaN}}', "NaN"),
        ('{"tree_metadata": {"x": 1e999}}', "finite"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (10 * 2**20 + 1), "bytes of JSON"),
    ],
    ids=range(11),
)
def test_a_broken_tree_is_refused(copy, text, problem):
    path = copy("ours")
    (path / "_METADATA").write_text(text)
    assert problem in refusal(path)


@pytest.mark.parametrize("form", ["ours", "zarr"])
@pytest.mark.parametrize("key", ["..", ".", "", "a/b", "../../etc", "a\\b", "a\0b", "/etc", 7, None])
def test_keys_that_are_no_plain_names_are_refused(copy, form, key):
    path = copy(form)

    def change(fields):
        entry = entry_of(fields)
        entry["key_metadata"][-1]["key"] = key
        fields["tree_metadata"] = {str(tuple(item["key"] for item in entry["key_metadata"])): entry}

    edit_tree(path, change)
    assert "expected keys without separators" in refusal(path)


def test_keys_that_differ_from_their_text_and_names_that_occur_twice_are_refused(copy):
    path = copy("ours")
    edit_tree(path, lambda fields: entry_of(fields)["key_metadata"][-1].update(key="bias"))
    message = refusal(path)
    assert "the same twice" in message

    def change(fields):
        entry = entry_of(fields, BIAS)
        keys = ["decoder.layers", "1", "fc1", "bias"]
        fields["tree_metadata"][str(tuple(keys))] = {**entry, "key_metadata": [{"key": k, "key_type": 2} for k in keys]}

    path = copy("zarr")
    edit_tree(path, change)
    assert f"{BIAS}: 2 leaves of this name" in refusal(path)


def test_two_leaves_that_share_a_name_without_value_are_refused(tmp_path):
    path = save(tmp_path / "theirs", {"params": {"a": {"value": jnp.ones(3)}, "params": {"a": jnp.ones(5)}}})
    assert "a second leaf of this name" in refusal(path)


@pytest.mark.parametrize(("form", "says"), [("ours", False), ("zarr", True)])
def test_a_tree_that_names_the_other_form_of_leaves_is_refused(copy, form, says):
    path = copy(form)
    edit_tree(path, lambda fields: fields.update(use_ocdbt=says))
    assert "got the other form" in refusal(path)


@pytest.mark.parametrize("value", [1, "yes", []])
def test_a_switch_of_the_tree_that_is_no_truth_value_is_refused(copy, value):
    path = copy("ours")
    edit_tree(path, lambda fields: fields.update(use_zarr3=value))
    assert "use_zarr3: expected a truth value" in refusal(path)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS_OF_ONE)
def test_a_link_that_leaves_the_folder_is_refused(copy, form, tmp_path):
    path = copy(form)
    largest = max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.rename(tmp_path / "outside")
    largest.symlink_to(tmp_path / "outside")
    assert f"{largest.relative_to(path)}: a link that leaves the folder" in refusal(path)


def test_a_folder_of_an_array_that_is_a_link_is_refused(copy, tmp_path):
    path = copy("zarr")
    (path / KERNEL).rename(tmp_path / "outside")
    (path / KERNEL).symlink_to(tmp_path / "outside")
    assert f"{KERNEL}: a link that leaves the folder" in refusal(path)
    (path / KERNEL).unlink()
    (path / KERNEL).symlink_to(path)
    assert f"{KERNEL}: expected a file or a folder, got a link" in refusal(path)


@pytest.mark.parametrize("form", ["ours", "zarr"])
def test_a_pipe_is_refused_and_never_opened(copy, form):
    path = copy(form)
    name = "manifest.ocdbt" if form == "ours" else f"{KERNEL}/0.0"
    (path / name).unlink()
    os.mkfifo(path / name)
    assert f"{name}: expected a file or a folder, got a link, a pipe or a device" in refusal(path)


@pytest.mark.parametrize("form", DATABASES)
@pytest.mark.parametrize("kept", [0, 1, 14, 40, -1])
def test_a_truncated_manifest_is_refused(copy, form, kept):
    path = copy(form)
    manifest = path / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:kept])
    assert "manifest" in refusal(path)


def test_a_manifest_of_another_kind_or_size_is_refused(copy):
    path = copy("ours")
    manifest = path / "manifest.ocdbt"
    good = manifest.read_bytes()
    manifest.write_bytes(b"\x0c\xdb\x20\xde" + good[4:])
    assert "expected a manifest at byte 0" in refusal(path)
    manifest.write_bytes(good[:12] + b"\x07" + good[13:])
    assert "expected a manifest at byte 0" in refusal(path)
    manifest.write_bytes(good + b"\0" * (1 << 20))
    assert "expected a manifest of at most" in refusal(path)
    frame = repeated(1 << 17, 99, blocks=50_000)
    bomb = good[:4] + struct.pack("<Q", 14 + len(frame) + 4) + good[12:14] + frame
    manifest.write_bytes(bomb + struct.pack("<I", crc32c.extend(0, bomb)))
    assert "unpacks to 1048576 bytes at most, got 6553600000" in refusal(path)


@pytest.mark.parametrize("name", ["manifest.ocdbt", "root"])
def test_a_node_with_a_flipped_bit_is_found_by_its_checksum(copy, name):
    path = copy("ours")
    with_root(path, leaf(one_array(path)))
    data = bytearray((path / name).read_bytes())
    data[-12] ^= 4
    (path / name).write_bytes(data)
    assert f"{name}: damaged, its checksum" in refusal(path)


@pytest.mark.parametrize("form", DATABASES)
def test_missing_files_of_a_database_are_named(copy, form):
    path = copy(form)
    for file in [*path.rglob("d/*")]:
        file.unlink()
    message = refusal(path)
    assert "d/" in message
    assert "missing, expected" in message


def test_a_database_without_its_manifest_is_refused(copy):
    path = copy("ours")
    (path / "manifest.ocdbt").unlink()
    assert "got the other form" in refusal(path)


@pytest.mark.parametrize("form", DATABASES)
def test_a_truncated_file_of_a_database_is_named(copy, form):
    path = copy(form)
    for file in path.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)
    assert "truncated, expected" in refusal(path)


def edit_manifest(path: Path, **root) -> None:
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{path}/"}).result()
    manifest = tensorstore.ocdbt.dump(base).result()
    latest = manifest["versions"][-1]
    latest["root_height"] = root.pop("root_height", latest["root_height"])
    latest["root"].update(root)
    (path / "manifest.ocdbt").write_bytes(tensorstore.ocdbt.undump_manifest(manifest))


@pytest.mark.parametrize(
    ("root", "problem"),
    [
        (dict(location="btreenode::../outside:0:99"), "../outside: missing"),
        (dict(location="btreenode:../:outside:0:99"), "../outside: missing"),
        (dict(location="btreenode::/etc/hostname:0:9"), "/etc/hostname: missing"),
        (dict(location="btreenode::_METADATA:0:99"), "expected a node at byte 0"),
        (dict(location="btreenode::_METADATA:0:7"), "expected a node of at most"),
        (dict(location="btreenode::_METADATA:0:999999999"), "truncated, expected 999999999 bytes"),
        (dict(location="btreenode::_METADATA:999999999999:9"), "truncated"),
        (dict(root_height=3), "expected a node of height 3, got 0"),
    ],
)
def test_a_manifest_that_points_elsewhere_is_refused(copy, tmp_path, root, problem):
    path = copy("ours")
    (tmp_path / "outside").write_bytes(b"\0" * 100)
    edit_manifest(path, **root)
    assert problem in refusal(path)


# -- trees of a database, made by hand --------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def node(height: int, files: list[str], body: bytes, count: int, base: int = 0) -> bytes:
    """A node; what its files name is relative to the first `base` characters of their paths."""
    table = varint(len(files)) + b"\0" * (len(files) - 1)  # no prefix is shared
    table += b"".join(varint(len(file)) for file in files) + varint(base) * len(files) + "".join(files).encode()
    payload = b"\0\0" + bytes([height]) + table + varint(count) + body
    whole = struct.pack(">I", 0x0CDB20DE) + struct.pack("<Q", 16 + len(payload)) + payload
    return whole + struct.pack("<I", crc32c.extend(0, whole))


def keys_of(keys: list[bytes]) -> bytes:
    return b"\0" * (len(keys) - 1) + b"".join(varint(len(key)) for key in keys)


def shared(keys: list[bytes], shares: list[int]) -> bytes:
    """The keys of a leaf of empty values, each without the bytes that it shares with the one before."""
    body = b"".join(map(varint, shares[1:])) + b"".join(varint(len(key)) for key in keys) + b"".join(keys)
    return node(0, [], body + b"\0" * 2 * len(keys), len(keys))


def leaf(entries: dict[str, tuple[str, int, int]]) -> bytes:
    """A leaf of values in files: (file, offset, length) by key."""
    keys = [key.encode() for key in sorted(entries)]
    places = [entries[key] for key in sorted(entries)]
    files = sorted({file for file, _, _ in places})
    body = keys_of(keys) + b"".join(keys) + b"".join(varint(length) for _, _, length in places) + b"\1" * len(keys)
    body += b"".join(varint(files.index(file)) for file, _, _ in places)
    return node(0, files, body + b"".join(varint(offset) for _, offset, _ in places), len(keys))


def inner(height: int, children: list[tuple[bytes, str, int, int]], base: int = 0) -> bytes:
    keys, files = [child[0] for child in children], sorted({child[1] for child in children})
    body = keys_of(keys) + b"".join(varint(len(key)) for key in keys) + b"".join(keys)
    body += b"".join(varint(files.index(file)) for _, file, _, _ in children)
    for column in (2, 3):
        body += b"".join(varint(child[column]) for child in children)
    return node(height, files, body + b"\1" * 3 * len(children), len(children), base)


def with_root(path: Path, data: bytes, height: int = 0, name: str = "root") -> None:
    (path / name).write_bytes(data)
    edit_manifest(path, location=f"btreenode::{name}:0:{len(data)}", root_height=height)


def one_array(path: Path, place: tuple[str, int, int] = ("chunk", 0, 28), **fields) -> dict:
    """Entries of a database with one array of seven numbers; a second chunk where the shape asks for it."""
    metadata = {"shape": [7], "chunks": [7], "dtype": "<f4", "compressor": None, "filters": None, "fill_value": None}
    text = json.dumps({**metadata, "order": "C", "zarr_format": 2, **fields}).encode()
    (path / "array").write_bytes(text)
    (path / "chunk").write_bytes(np.arange(14, dtype=np.float32).tobytes())
    keys = [{"key": "bias", "key_type": 2}]
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    edit_tree(
        path, lambda tree: tree.update(tree_metadata={"('bias',)": {"key_metadata": keys, "value_metadata": value}})
    )
    return {"bias/.zarray": ("array", 0, len(text)), "bias/0": place}


def test_the_trees_of_these_tests_are_good(copy):
    path = copy("ours")
    entries = one_array(path, ("chunk", 8, 28))
    with_root(path, leaf(entries))
    assert_holds(path, {"bias": np.arange(2, 9, dtype=np.float32)})
    (path / "low").write_bytes(leaf({key.removeprefix("bias/"): place for key, place in entries.items()}))
    with_root(path, inner(1, [(b"bias/", "low", 0, (path / "low").stat().st_size)]), height=1)
    assert_holds(path, {"bias": np.arange(2, 9, dtype=np.float32)})


def test_files_are_relative_to_the_base_of_the_node_that_names_them(copy):
    path = copy("ours")
    entries = one_array(path)
    (path / "a" / "b").mkdir(parents=True)
    for name in ("array", "chunk"):
        (path / name).rename(path / "a" / "b" / name)
    low = leaf({key.removeprefix("bias/"): place for key, place in entries.items()})
    (path / "a" / "b" / "low").write_bytes(low)
    middle = inner(1, [(b"/", "b/low", 0, len(low))], base=2)
    (path / "a" / "middle").write_bytes(middle)
    with_root(path, inner(2, [(b"bias", "a/middle", 0, len(middle))], base=2), height=2)
    assert_holds(path, {"bias": np.arange(7, dtype=np.float32)})


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        (("../outside", 0, 28), "../outside: missing"),
        (("/etc/hostname", 0, 28), "/etc/hostname: missing"),
        (("d/../chunk", 0, 28), "d/../chunk: missing"),
        (("./chunk", 0, 28), "./chunk: missing"),
        (("chunk", 40, 28), "chunk: truncated, expected 68 bytes, got 56"),
        (("chunk", 2**62, 28), "chunk: truncated"),
        (("chunk", 0, 2**62), "chunk: truncated"),
        (("chunk", 0, 27), "expected 28 bytes for float32 (7,), got 27"),
        (("chunk", 0, 56), "expected 28 bytes for float32 (7,), got 56"),
    ],
)
def test_values_that_lie_elsewhere_are_refused(copy, tmp_path, place, problem):
    path = copy("ours")
    (tmp_path / "outside").write_bytes(b"\0" * 100)
    with_root(path, leaf(one_array(path, place)))
    assert problem in refusal(path)


def test_chunks_that_lie_on_one_another_are_refused(copy):
    path = copy("ours")
    entries = one_array(path, shape=[14], chunks=[7])
    with_root(path, leaf({**entries, "bias/1": ("chunk", 28, 28)}))
    assert_holds(path, {"bias": np.arange(14, dtype=np.float32)})
    with_root(path, leaf({**entries, "bias/1": ("chunk", 24, 28)}))
    assert "bias/1: lies on bytes of bias/0" in refusal(path)


def test_a_tree_that_leads_to_the_same_leaf_many_times_is_refused(copy):
    path = copy("ours")
    below = leaf({"x": ("chunk", 0, 4)})
    one_array(path)
    for height in range(1, 9):
        (path / f"level{height}").write_bytes(below)
        children = [(bytes([97 + number]), f"level{height}", 0, len(below)) for number in range(20)]
        below = inner(height, children)
    with_root(path, below, height=8)
    message = refusal(path)
    assert "expected at most 4096 nodes" in message


def test_keys_that_are_long_by_what_they_share_are_refused(copy):
    path = copy("ours")
    keys = [b"a", b"b" * 60_000, *(struct.pack(">I", number)[1:] for number in range(100_000))]
    with_root(path, shared(keys, [0, 0, *[60_000] * 100_000]))
    assert (path / "root").stat().st_size < 1e6
    assert "expected keys and paths of at most 16777216 bytes" in refusal(path)
    with_root(path, shared([b"a" * 600, b"b"], [0, 0]))
    assert "expected keys and paths of at most 512 bytes" in refusal(path)


def test_keys_that_grow_from_node_to_node_are_refused(copy):
    path = copy("ours")
    below = shared([b"%05d" % number for number in range(20_000)], [0] * 20_000)
    for height in range(1, 9):
        (path / f"level{height}").write_bytes(below)
        below = inner(height, [(b"k" * 60_000, f"level{height}", 0, len(below))])
    with_root(path, below, height=8)
    assert "expected keys and paths of at most 512 bytes" in refusal(path)


def test_nodes_that_are_small_but_unpack_to_much_together_are_refused(copy, monkeypatch):
    path = copy("ours")
    low = shared([b"%07d" % number for number in range(20_000)], [0] * 20_000)
    (path / "low").write_bytes(low)
    with_root(path, inner(1, [(bytes([97 + number]), "low", 0, len(low)) for number in range(2)]), height=1)
    assert len(chunk_store.open_store(path).values) == 40_000
    monkeypatch.setattr(ocdbt, "_MAX_KEYS", 30_000)
    assert "expected at most 30000 keys, each once" in refusal(path)
    monkeypatch.setattr(ocdbt, "_MAX_NODE_BYTES", 300_000)
    assert "300000 bytes of them together" in refusal(path)


@pytest.mark.parametrize(("node_bytes", "inline"), [(200, 0), (2000, 100), (10**8, 1024)])
@pytest.mark.parametrize("compression", [None, {"id": "zstd"}])
def test_we_find_the_values_that_tensorstore_finds(tmp_path, node_bytes, inline, compression):
    config = {"max_decoded_node_bytes": node_bytes, "max_inline_value_bytes": inline, "compression": compression}
    base = {"driver": "file", "path": f"{tmp_path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    generator = np.random.default_rng(7)
    expected, under_way = {}, []
    for number in range(150):
        key = f"{'abc'[number % 3] * (number % 7)}layers.{number % 11}/{number}"
        expected[key] = generator.bytes(int(generator.integers(1, 300)))
        under_way.append(store.write(key, expected[key]))
        if number % 40 == 0:  # else many go into one commit
            under_way[-1].result()
    for future in under_way:
        future.result()
    found = chunk_store.open_store(tmp_path)
    assert {key: bytes(found.read(key)) for key in found.values} == expected


def test_a_tree_so_large_that_its_frame_does_not_say_its_size_is_read(tmp_path):
    tensors = {f"layers.{number}.bias": np.full(2, number, np.float32) for number in range(1000)}
    found = orbax_folder.open_folder(write(tmp_path / "ours", tensors))
    assert found.tensors.keys() == tensors.keys()
    assert found.read("layers.999.bias").tolist() == [999, 999]


def test_a_database_without_a_key_is_refused(copy):
    path = copy("ours")
    for key in database(path).list().result():
        set_value(path, key.decode(), None)
    assert f"{KERNEL}: .zarray is missing" in refusal(path)


@pytest.mark.parametrize("form", FORMS_OF_ONE)
def test_no_single_damaged_byte_does_more_than_raise_our_error(copy, form):
    path = copy(form)
    generator = np.random.default_rng(3)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in ("_sharding", "process_0"))
    for number in range(60):
        file = files[number % len(files)]
        good = file.read_bytes()
        position = generator.integers(len(good))
        file.write_bytes(good[:position] + bytes([good[position] ^ 1 << generator.integers(8)]) + good[position + 1 :])
        try:
            found = orbax_folder.open_folder(path)
            for name in found.tensors:
                found.read(name)
        except CheckpointError:
            pass
        file.write_bytes(good)
    assert orbax_folder.open_folder(path).read(KERNEL).shape == SHAPES[KERNEL]


# -- what it needs ----------------------------------------------------------------------------------------------------


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_reading_and_writing_import_neither_jax_nor_orbax(good, tmp_path):
    (tmp_path / "out").mkdir()
    done = run(
        "import sys; from pathlib import Path; from conversion.orbax import orbax_folder as o;"
        "from conversion.safetensors_file import PlannedTensor;"
        f"[o.open_folder(Path({str(good['ocdbt'])!r})).read(n) for n in ({KERNEL!r}, {BIAS!r})];"
        f"o.write_folder(Path({str(tmp_path / 'out')!r}), [PlannedTensor('a.b', 'float32', (3,))],"
        " lambda file, tensor: file.write(bytes(12)));"
        "print([name for name in ('jax', 'orbax', 'flax', 'torch', 'tensorflow') if name in sys.modules])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("form", ["ocdbt", "zarr"])
def test_without_tensorstore_the_error_says_what_to_install(good, form):
    done = run(
        "import sys; sys.modules['tensorstore'] = None; from pathlib import Path\n"
        "from conversion.orbax import orbax_folder\n"
        f"try: orbax_folder.open_folder(Path({str(good[form])!r}))\n"
        "except ImportError as error: print(type(error).__name__, error)"
    )
    assert "MissingFrameworkError" in done.stdout
    assert "pip install tensorstore" in done.stdout
