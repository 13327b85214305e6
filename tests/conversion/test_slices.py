"""Parts of tensors: together they are the tensor, in every format, and no byte of the rest is asked of a file."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import NUMPY_DTYPES, config_of, tensors_of
from test_any_to_any import WRITTEN, holds, without_unused_rows

from conversion import open_checkpoint, write_checkpoint
from conversion.parameters import read_parameters
from conversion.slices import _fill, read_part, read_slice
from conversion.stored import MappedFile, StoredTensor
from conversion.training_state import read_training_state, write_training_state
from opt_core.errors import CheckpointError, InputError
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.schema import shapes
from opt_core.sharding import Mesh, partition, shard_bytes, shard_slices

MESHES = [Mesh(("tensor",), (2,)), Mesh(("fsdp",), (2,)), Mesh(("fsdp", "tensor"), (2, 2))]
EVEN = dict(vocab_size=102, ffn_dim=38, num_hidden_layers=1)
FC1, FC2 = "decoder.layers.0.fc1.weight", "decoder.layers.0.fc2.weight"


def even_config(variant: str = "pre-norm"):
    return config_of(variant, **EVEN, **({"word_embed_proj_dim": 14} if variant == "350m-style" else {}))


def parts_of(config, mesh: Mesh) -> list[dict[str, tuple[slice, ...]]]:
    """The part of every weight that each device of the mesh holds."""
    specs = partition(config, mesh)
    return [
        {name: shard_slices(shape, specs[name], mesh, mesh.coordinates(rank)) for name, shape in shapes(config).items()}
        for rank in range(mesh.devices)
    ]


def assert_parts_are(checkpoint, tensors: dict[str, np.ndarray], mesh: Mesh) -> None:
    """The parts of all devices together are `tensors`, bit for bit."""
    joined = {name: np.zeros_like(array) for name, array in tensors.items()}
    for slices in parts_of(checkpoint.config, mesh):
        for name, index in slices.items():
            part = read_slice(checkpoint, name, index)
            assert part.dtype == tensors[name].dtype
            assert part.flags.c_contiguous
            assert part.flags.aligned
            assert part.flags.writeable
            joined[name][index] = part
    for name, array in tensors.items():
        assert joined[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [("pre-norm", "float32"), ("pre-norm", "bfloat16"), ("350m-style", "float16"), ("untied", "float32")],
)
@pytest.mark.parametrize("format", WRITTEN, ids=lambda format: format.name)
def test_the_parts_of_all_devices_are_the_tensor_in_every_format(tmp_path, format, variant, dtype):
    config = even_config(variant)
    if not holds(format, config, dtype):
        return
    tensors = without_unused_rows(tensors_of(config, dtype=dtype))
    write_checkpoint(tmp_path, config, tensors, format=format.name)
    with open_checkpoint(tmp_path) as checkpoint:
        for mesh in MESHES:
            assert_parts_are(checkpoint, tensors, mesh)


@pytest.mark.parametrize("format", ["safetensors", "torch-bin", "flax-safetensors"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_each_device_asks_the_file_for_its_share_alone(tmp_path, format, mesh):
    config = even_config()
    write_checkpoint(tmp_path, config, tensors_of(config), format=format)
    for slices in parts_of(config, mesh):
        with open_checkpoint(tmp_path) as checkpoint:
            dict(read_parameters(checkpoint, slices, "float32", slices=slices))
            assert checkpoint.bytes_read == shard_bytes(config, mesh, item_bytes=4)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_parts_of_devices_reach_over_model_parallel_parts(tmp_path, parts):
    config = config_of(vocab_size=102, ffn_dim=42, hidden_size=18, num_attention_heads=6)
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, format="metaseq", parts=parts)
    for mesh in (Mesh(("tensor",), (3,)), Mesh(("fsdp", "tensor"), (3, 2))):
        with open_checkpoint(tmp_path) as checkpoint:
            assert_parts_are(checkpoint, tensors, mesh)


@pytest.mark.parametrize("asked", NUMPY_DTYPES)
@pytest.mark.parametrize("stored", NUMPY_DTYPES)
def test_parameters_in_part_are_the_values_rounded_once(tmp_path, stored, asked):
    config, mesh = even_config(), MESHES[2]
    tensors = tensors_of(config, dtype=stored)
    write_checkpoint(tmp_path, config, tensors)
    for alignment in (1, 64):
        for slices in parts_of(config, mesh):
            arrays = dict(
                read_parameters(open_checkpoint(tmp_path), shapes(config), asked, alignment=alignment, slices=slices)
            )
            assert arrays.keys() == tensors.keys()
            for name, array in arrays.items():
                assert array.ctypes.data % alignment == 0
                expected = tensors[name][slices[name]].astype(NUMPY_DTYPES[asked])
                assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
                assert array.tobytes() == expected.tobytes(), name


def test_weights_without_a_slice_come_whole(tmp_path):
    config = even_config()
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors)
    arrays = dict(
        read_parameters(open_checkpoint(tmp_path), tensors, "float32", slices={FC1: (slice(2, 5), slice(None))})
    )
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, tensors[name][2:5] if name == FC1 else tensors[name])


def test_a_value_beyond_the_range_is_named_by_the_device_that_has_it_alone(tmp_path):
    config = even_config()
    tensors = tensors_of(config)
    tensors[FC2][3, 30] = 1e6
    write_checkpoint(tmp_path, config, tensors)
    first, second = parts_of(config, MESHES[0])
    assert len(dict(read_parameters(open_checkpoint(tmp_path), tensors, "float16", slices=first))) == len(tensors)
    with pytest.raises(CheckpointError, match=rf"{FC2}: expected values within the range of float16, got 1e\+06"):
        dict(read_parameters(open_checkpoint(tmp_path), tensors, "float16", slices=second))


def test_the_whole_is_a_view_and_a_part_is_not_and_none_reaches_the_file(tmp_path):
    config = even_config()
    file, *_ = write_checkpoint(tmp_path, config, tensors_of(config))
    before = file.read_bytes()
    with open_checkpoint(tmp_path) as checkpoint:
        rows = read_slice(checkpoint, FC1, (slice(3, 8), slice(None)))
        columns = read_slice(checkpoint, FC1, (slice(None), slice(3, 8)))
        whole = checkpoint.read(FC1)
        same = read_slice(checkpoint, FC1, (slice(None), slice(0, 22)))
    assert np.shares_memory(same, whole)
    assert not np.shares_memory(rows, whole)
    assert not np.shares_memory(columns, whole)
    rows[...] = columns[...] = same[...] = 7
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ((slice(0, 3),), "expected 2 slices, got 1"),
        ((slice(0, 39), slice(None)), r"dim 0: expected a slice within 0 and 38 by steps of 1, got slice\(0, 39, None"),
        ((slice(0, 3), slice(-2, None)), "dim 1: expected a slice within 0 and 22"),
        ((slice(0, 30, 2), slice(5, 5)), "dim 0: .*\n.*dim 1: "),
    ],
)
def test_an_index_that_does_not_fit_is_refused_with_each_dimension(tmp_path, index, problem):
    config = even_config()
    write_checkpoint(tmp_path, config, tensors_of(config))
    with pytest.raises(InputError, match=problem):
        read_slice(open_checkpoint(tmp_path), FC1, index)


def shorten(file) -> None:
    os.truncate(file, 4000)


def replace(file) -> None:
    write_checkpoint(file.parent, even_config(), tensors_of(even_config()), overwrite=True)


@pytest.mark.parametrize("change", [shorten, replace])
def test_a_file_that_was_changed_meanwhile_is_an_error_and_no_zeros(tmp_path, change):
    config = even_config()
    file, *_ = write_checkpoint(tmp_path, config, tensors_of(config))
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.views(FC2)  # which maps the file
        change(file)
        with pytest.raises(CheckpointError, match=f"{file.name}: it was written to or replaced since it was opened"):
            read_slice(checkpoint, FC2, (slice(None), slice(1, 3)))
        checkpoint.close()
        with pytest.raises(CheckpointError, match=f"{file.name}: it was written to or replaced since it was opened"):
            checkpoint.read(FC2)


def test_a_file_that_ends_within_a_part_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(7)))
    with (
        open(tmp_path / "file", "rb", buffering=0) as file,
        pytest.raises(CheckpointError, match="truncated: expected 4 bytes at byte 7"),
    ):
        _fill(file, memoryview(bytearray(11)))


def test_moments_are_read_in_part(tmp_path):
    moments = {FC2: Moments(*np.random.default_rng(3).standard_normal((2, 14, 22), np.float32))}
    write_training_state(tmp_path, 3, 7, TrainingRecipe(), moments)
    state = read_training_state(tmp_path, {FC2: (14, 22)})
    for index in ((slice(2, 7), slice(None)), (slice(None), slice(11, 22)), (slice(3, 5), slice(2, 13))):
        for part, whole in zip(state.read_slice(FC2, index), moments[FC2], strict=True):
            np.testing.assert_array_equal(part, whole[index])


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_parts_of_any_order_of_dimensions_are_read(tmp_path, order):
    values = np.arange(5 * 7 * 11, dtype=np.float32).reshape(5, 7, 11)
    (tmp_path / "file").write_bytes(b"head" + values.tobytes())
    array = MappedFile(tmp_path / "file", {"x": StoredTensor("float32", (5, 7, 11), 4)}).view("x").transpose(order)
    for index in (np.s_[1:3, 2:, :4], np.s_[:, 1:2, :], np.s_[2:4, :, :], np.s_[:, :, 3:]):
        part = read_part(array, index)
        np.testing.assert_array_equal(part, values.transpose(order)[index])
        assert part.flags.c_contiguous


def test_a_part_of_other_memory_lets_go_of_it():
    array = np.arange(35.0).reshape(5, 7)
    part = read_part(array, np.s_[:, 2:4])
    np.testing.assert_array_equal(part, array[:, 2:4])
    assert not np.shares_memory(part, array)


# -- memory and bytes, as the system counts them ----------------------------------------------------------------------

READ_PARTS = """
import json, sys
from pathlib import Path
from conversion import open_checkpoint
from conversion.parameters import read_parameters
from conversion.slices import read_slice

def status(*names):
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(lines[name].split()[0]) * 1024 for name in names]

def rchar():
    return int(Path("/proc/self/io").read_text().split()[1])

def quarter_of(name):
    index = (slice(n // 4, n // 2) if i == dim else slice(None) for i, n in enumerate(checkpoint.shapes[name]))
    ((_, part),) = read_parameters(checkpoint, [name], dtype, slices={name: tuple(index)})
    part.view("uint8").max()  # has it all in memory
    return part

folder, name, dim, dtype = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
with open_checkpoint(folder) as checkpoint:
    quarter_of("decoder.layers.0.self_attn.q_proj.weight")  # the pages of code that reads: up to 2 MB, by the system
    io, read, (anon, file, peak) = rchar(), checkpoint.bytes_read, status("RssAnon", "RssFile", "VmHWM")
    part = quarter_of(name)
    done = rchar(), *status("RssAnon", "RssFile", "VmHWM")
    print(json.dumps(dict(bytes_read=checkpoint.bytes_read - read, rchar=done[0] - io, anon=done[1] - anon,
                          file=done[2] - file, peak=done[3] - anon - file, nbytes=part.nbytes)))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """One matrix of 64 MB, and little else."""
    config = config_of(num_hidden_layers=1, hidden_size=2048, ffn_dim=16384, num_attention_heads=2, vocab_size=7)
    folder = tmp_path_factory.mktemp("large")
    tensors = {name: np.full(shape, 0.5, NUMPY_DTYPES["bfloat16"]) for name, shape in shapes(config).items()}
    write_checkpoint(folder, config, tensors)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("name", "dim"), [(FC1, 0), (FC1, 1), (FC2, 1)])
def test_a_quarter_of_a_matrix_takes_the_memory_and_the_reads_of_a_quarter(large, name, dim, dtype):
    arguments = [sys.executable, "-c", READ_PARTS, str(large), name, str(dim), dtype]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    seen, share, slack = json.loads(done.stdout), 1 << 24, 1 << 21
    assert seen["bytes_read"] == share
    assert seen["nbytes"] == share * (2 if dtype == "float32" else 1)
    assert seen["rchar"] <= share + slack
    assert seen["rchar"] >= share
    assert seen["anon"] + seen["file"] <= seen["nbytes"] + slack
    assert seen["peak"] <= seen["nbytes"] + (share if dtype == "float32" else 0) + 2 * slack
