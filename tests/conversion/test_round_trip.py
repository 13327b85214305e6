"""Writing and reading back is the identity: variants x dtypes x containers x shards, lazily, without a second copy."""

import json
import subprocess
import sys

import numpy as np
import pytest
from checkpoints import NUMPY_DTYPES, VARIANTS, assert_holds, config_of, tensors_of

from conversion import open_checkpoint, write_checkpoint
from opt_core.config import DTYPES
from opt_core.errors import CheckpointError, InputError
from opt_core.schema import TASKS

FORMATS = ("safetensors", "torch-bin")


def lazily(tensors):
    return {name: lambda array=array: array for name, array in tensors.items()}


@pytest.mark.parametrize("shard_size", ["5GB", "11KB"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_bit_for_bit(tmp_path, variant, format, shard_size):
    for dtype in DTYPES:
        config = config_of(variant, torch_dtype=dtype)
        tensors = tensors_of(config, dtype=dtype)
        folder = tmp_path / dtype
        files = write_checkpoint(folder, config, lazily(tensors), format=format, max_shard_size=shard_size)
        with open_checkpoint(folder, verify=True) as checkpoint:
            checkpoint.check()
            assert checkpoint.format == format
            assert checkpoint.task == "causal-lm"
            assert checkpoint.config == config.replace(architectures=["OPTForCausalLM"])
            assert set(checkpoint.dtypes.values()) == {dtype}
            assert_holds(checkpoint, tensors)
        assert sorted(files) == sorted(folder.iterdir())
        assert (len(files) > 3) == (shard_size == "11KB")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_the_task_is_known_by_the_names(tmp_path, task, format):
    config = config_of("untied", num_labels=5)
    tensors = tensors_of(config, task)
    write_checkpoint(tmp_path, config, tensors, task=task, format=format)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert checkpoint.task == task
        assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_arrays_are_writable_views_that_never_reach_the_file_and_outlive_the_checkpoint(tmp_path, format):
    config = config_of("350m-style")
    tensors = tensors_of(config)
    weights, *_ = write_checkpoint(tmp_path, config, tensors, format=format)
    before = weights.read_bytes()
    with open_checkpoint(tmp_path) as checkpoint:
        arrays = {name: checkpoint.read(name) for name in checkpoint.shapes}
    for name, array in arrays.items():
        assert (array.flags.writeable, array.flags.owndata) == (True, False), name
        assert np.array_equal(array, tensors[name])
        array += 1
    assert weights.read_bytes() == before


def test_tensors_of_mixed_dtypes_keep_them(tmp_path):
    config = config_of()
    dtypes = [*NUMPY_DTYPES.values(), np.float64]
    tensors = {name: array.astype(dtypes[i % 4]) for i, (name, array) in enumerate(tensors_of(config).items())}
    for format in FORMATS:
        write_checkpoint(tmp_path / format, config, tensors, format=format)
        with open_checkpoint(tmp_path / format) as checkpoint:
            assert_holds(checkpoint, tensors)
            assert not any(checkpoint.read(name).flags.owndata for name in tensors)  # aligned, hence views


@pytest.mark.parametrize("format", ["safetensors", "flax-msgpack", "keras-hub"])
def test_what_other_programs_load_is_a_dtype_that_rounds_none_of_the_weights(tmp_path, format):
    config = config_of()
    tensors = tensors_of(config)
    tensors["decoder.embed_tokens.weight"] = tensors["decoder.embed_tokens.weight"].astype(np.float16)
    write_checkpoint(tmp_path, config, tensors, format=format)
    fields = json.loads((tmp_path / "config.json").read_text())
    policy = fields["config"]["dtype"]["config"]["name"] if format == "keras-hub" else fields["torch_dtype"]
    assert policy == "float32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_change_rounds_to_nearest_and_says_so_in_the_config(tmp_path, dtype):
    config = config_of(torch_dtype="float32")
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, dtype=dtype)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.torch_dtype == dtype
        assert_holds(checkpoint, {name: array.astype(NUMPY_DTYPES[dtype]) for name, array in tensors.items()})


def test_overflow_lists_every_tensor_with_its_largest_value_and_writes_nothing(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    tensors["decoder.layers.1.fc1.weight"][3, 5] = -70001.0
    tensors["decoder.layers.2.fc2.bias"][1] = 1e6
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(tmp_path / "new", config, tensors, dtype="float16")
    assert len(raised.value.problems) == 2
    assert "layers.1.fc1.weight" in str(raised.value)
    assert "70001" in str(raised.value)
    assert "1e+06" in str(raised.value)
    assert not (tmp_path / "new").exists()


def test_infinities_and_nans_are_kept_where_asked_for_and_are_no_overflow(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    tensors["decoder.layers.0.fc1.bias"][:3] = np.inf, -np.inf, np.nan
    write_checkpoint(tmp_path, config, tensors, dtype="float16", allow_nonfinite=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert np.array_equal(
            checkpoint.read("decoder.layers.0.fc1.bias")[:3], np.float16([np.inf, -np.inf, np.nan]), equal_nan=True
        )


def test_one_checkpoint_is_written_from_another_one_tensor_at_a_time(tmp_path):
    config = config_of("untied")
    tensors = tensors_of(config, dtype="bfloat16")
    write_checkpoint(tmp_path / "a", config, tensors, max_shard_size="7KB")
    seen = []
    with open_checkpoint(tmp_path / "a") as source:
        progress = lambda done, total: seen.append((done, total))  # noqa: E731
        write_checkpoint(tmp_path / "b", source.config, source, format="torch-bin", progress=progress)
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert_holds(checkpoint, tensors)
    total = 2 * sum(array.nbytes for array in tensors.values())  # written, and read again
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) == 2 * len(tensors)
    assert seen[-1] == (total, total)


def test_a_function_is_called_when_its_turn_comes_and_only_once_with_a_dtype(tmp_path):
    config = config_of()
    calls = []

    def function(name, array):
        return lambda: (calls.append(name), array)[1]

    tensors = {name: function(name, array) for name, array in tensors_of(config).items()}
    write_checkpoint(tmp_path, config, tensors, dtype="float32")
    assert sorted(calls) == sorted(tensors)


@pytest.mark.parametrize("format", FORMATS)
def test_equal_weights_give_equal_files(tmp_path, format):
    config = config_of()
    first, second = (
        write_checkpoint(tmp_path / name, config, tensors_of(config), format=format)[0] for name in ("first", "second")
    )
    assert first.read_bytes() == second.read_bytes()


def test_an_existing_checkpoint_is_refused_and_its_leftovers_go_when_it_is_replaced(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    write_checkpoint(tmp_path, config, tensors, max_shard_size="11KB")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match=r"config\.json"):
        write_checkpoint(tmp_path, config, tensors)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_checkpoint(tmp_path, config, tensors, format="torch-bin", overwrite=True)
    names = {"config.json", "opt_manifest.json", "pytorch_model.bin", "tokenizer.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_folder_by_the_name_of_a_file_of_a_checkpoint_is_never_deleted(tmp_path):
    config = config_of()
    write_checkpoint(tmp_path, config, tensors_of(config))
    (tmp_path / "checkpoint").mkdir()  # TensorFlow has a file of this name
    (tmp_path / "checkpoint" / "notes").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FileExistsError, match="checkpoint: in the way"):
        write_checkpoint(tmp_path, config, tensors_of(config), format="tf-checkpoint", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    open_checkpoint(tmp_path).check()
    write_checkpoint(tmp_path, config, tensors_of(config), format="torch-bin", overwrite=True)
    assert (tmp_path / "checkpoint" / "notes").read_text() == "mine"


def test_a_checkpoint_can_replace_itself(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors)
    with open_checkpoint(tmp_path) as checkpoint:
        write_checkpoint(tmp_path, config, checkpoint, max_shard_size="11KB", overwrite=True)
    with open_checkpoint(tmp_path) as checkpoint:
        assert_holds(checkpoint, tensors)


def test_a_failure_leaves_the_old_checkpoint_as_it_was(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    broken = {**lazily(tensors), "decoder.layers.2.fc2.weight": lambda: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path, config, broken, dtype="float16", max_shard_size="11KB", overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_that_is_killed_leaves_nothing_that_opens(tmp_path):
    script = f"""
import os, sys
sys.path[:0] = {sys.path!r}
from checkpoints import config_of, tensors_of
from conversion import write_checkpoint
tensors = {{name: (lambda a=a: a) for name, a in tensors_of(config_of()).items()}}
tensors["decoder.layers.2.fc2.weight"] = lambda: os._exit(9)
write_checkpoint({str(tmp_path / "new")!r}, config_of(), tensors, dtype="float32", max_shard_size="11KB")
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    left, *more = tmp_path.iterdir()
    assert left.name.startswith(".opt-zoo-")
    assert not more
    write_checkpoint(tmp_path / "new", config_of(), tensors_of(config_of()))  # and is no obstacle to a second try


def test_tensors_that_are_not_those_of_the_config_are_all_listed_before_anything_is_written(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    del tensors["decoder.layers.1.fc1.bias"], tensors["decoder.embed_positions.weight"]
    tensors["lm_head.weight"] = tensors["decoder.embed_tokens.weight"]
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(tmp_path / "new", config, tensors)
    assert len(raised.value.problems) == 3
    assert not (tmp_path / "new").exists()


def test_a_tensor_of_the_wrong_shape_is_never_reshaped(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    tensors["decoder.layers.1.fc1.weight"] = tensors["decoder.layers.1.fc1.weight"].T
    with pytest.raises(CheckpointError, match=r"fc1.weight: expected \(31, 22\).*got \(22, 31\)"):
        write_checkpoint(tmp_path / "new", config, tensors)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "wrong", [dict(format="h5"), dict(dtype="int8"), dict(max_shard_size="five"), dict(max_shard_size=0)]
)
def test_wrong_arguments_are_named(tmp_path, wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        write_checkpoint(tmp_path, config_of(), tensors_of(config_of()), **wrong)


def test_shards_respect_their_size_and_the_index_counts_what_is_there(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    write_checkpoint(tmp_path, config, tensors, max_shard_size="11KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {
        "total_parameters": sum(array.size for array in tensors.values()),
        "total_size": sum(array.nbytes for array in tensors.values()),
    }
    assert {f"model.{name}" for name in tensors} == set(index["weight_map"])
    sizes = [
        sum(tensors[name.removeprefix("model.")].nbytes for name, file in index["weight_map"].items() if file == shard)
        for shard in set(index["weight_map"].values())
    ]
    assert max(sizes) <= 11000
    assert len(sizes) > 2


def test_neither_reading_nor_writing_imports_a_framework_or_the_hub_client(tmp_path):
    script = f"""
import sys
sys.path[:0] = {sys.path!r}
from checkpoints import config_of, tensors_of
from conversion import open_checkpoint, write_checkpoint
write_checkpoint({str(tmp_path)!r}, config_of(), tensors_of(config_of()), format="torch-bin")
open_checkpoint({str(tmp_path)!r}).read("decoder.embed_tokens.weight")
print(sorted({{"torch", "tensorflow", "jax", "transformers", "huggingface_hub"}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"
