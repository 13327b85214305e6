"""tf.train.Checkpoint and `conversion.tf_checkpoint.tensor_bundle`: each reads what the other writes."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from harness import config_of, token_ids

from conversion.safetensors_file import PlannedTensor
from conversion.tf_checkpoint.tensor_bundle import open_file, write_folder
from opt_core.schema import published_name, shapes
from opt_tf import TFOPTForCausalLM, TFOPTForQuestionAnswering, TFOPTModel

DTYPES = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def weights_of(model, prefix: str = "model/") -> dict[str, np.ndarray]:
    """The weights by the names that they have in a checkpoint."""
    names = shapes(model.config, model.task)
    paths = {name: prefix + published_name(name, model.task).replace(".", "/") for name in names}
    return {path: model.weight(name).value.numpy() for name, path in paths.items()}


def write(folder: Path, tensors: dict[str, np.ndarray]) -> str:
    planned = [PlannedTensor(name, array.dtype.name, array.shape) for name, array in tensors.items()]
    write_folder(folder, planned, lambda file, tensor: file.write(tensors[tensor.name].tobytes()))
    return str(folder / "ckpt-1")


def assert_holds(index: Path, tensors: dict[str, np.ndarray]) -> None:
    file = open_file(index, verify=True)
    assert file.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        got = file.read(name)
        assert (got.dtype, got.shape, got.tobytes()) == (expected.dtype, expected.shape, expected.tobytes()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorflow_reads_every_dtype_that_is_written(tmp_path, dtype):
    random = np.random.default_rng(3)
    tensors = {f"model/layers/{i}/weight": random.normal(size=(7, 5)).astype(DTYPES[dtype]) for i in range(11)}
    write(tmp_path, tensors)
    prefix = tf.train.latest_checkpoint(tmp_path)
    reader = tf.train.load_checkpoint(prefix)
    for name, expected in tensors.items():
        assert reader.get_tensor(f"{name}/.ATTRIBUTES/VARIABLE_VALUE").tobytes() == expected.tobytes()
    layers = []
    for _ in range(11):
        layers.append(tf.Module())
        layers[-1].weight = tf.Variable(tf.zeros((7, 5), dtype))
    model = tf.Module()
    model.layers = layers
    tf.train.Checkpoint(model=model).restore(prefix).assert_consumed()
    assert all(np.array_equal(layers[i].weight, tensors[f"model/layers/{i}/weight"]) for i in range(11))


@pytest.mark.parametrize(
    ("model_class", "variant"),
    [
        (TFOPTForCausalLM, "350m style"),
        (TFOPTForCausalLM, "untied head"),
        (TFOPTForQuestionAnswering, "galactica style"),
        (TFOPTModel, "pre-norm"),
    ],
)
def test_a_models_checkpoint_has_published_names_and_goes_both_ways(tmp_path, model_class, variant):
    model, other = model_class(config_of(variant)), model_class(config_of(variant))
    prefix = tf.train.Checkpoint(model=model).write(str(tmp_path / "theirs"))
    assert_holds(Path(f"{prefix}.index"), weights_of(model))
    tf.train.Checkpoint(model=other).restore(write(tmp_path, weights_of(model))).assert_consumed()
    for name, expected in weights_of(model).items():
        np.testing.assert_array_equal(weights_of(other)[name], expected, err_msg=name)


def test_the_weights_of_a_model_that_was_trained_have_the_names_of_one_that_was_not(tmp_path):
    """The keys lead through the optimizer."""
    model, ids = TFOPTForCausalLM(config_of(num_hidden_layers=1)), token_ids(config_of())
    model.compile("adam", jit_compile=False)
    model.fit({"input_ids": ids, "labels": ids}, verbose=0)
    prefix = tf.train.Checkpoint(net=model, optimizer=model.optimizer).save(str(tmp_path / "ckpt"))
    keys = [name for name, _ in tf.train.list_variables(prefix)]
    assert "net/model/decoder/layers/0/fc1/weight/.ATTRIBUTES/VARIABLE_VALUE" not in keys
    assert_holds(Path(f"{prefix}.index"), weights_of(model, "net/"))
    assert len(open_file(Path(f"{prefix}.index")).skipped) > 2 * len(weights_of(model))


def test_from_pretrained_reads_what_tensorflow_saved(tmp_path):
    model = TFOPTForQuestionAnswering(config_of("350m style"))
    tf.train.Checkpoint(model=model).save(str(tmp_path / "ckpt"))
    model.config.replace(architectures=["OPTForQuestionAnswering"]).to_json(tmp_path / "config.json")
    again = TFOPTForQuestionAnswering.from_pretrained(tmp_path)
    for name, expected in weights_of(model).items():
        np.testing.assert_array_equal(weights_of(again)[name], expected, err_msg=name)


def test_data_files_that_tensorflow_merged_are_read(tmp_path):
    random = np.random.default_rng(3)
    tensors = {name: random.normal(size=shape) for name, shape in {"a": (7, 5), "b": (3,), "c": (2, 11)}.items()}
    parts = []
    for names in (["a"], ["b", "c"]):
        parts.append(str(tmp_path / f"part-{names[0]}"))
        data = [tf.constant(tensors[name]) for name in names]
        tf.raw_ops.SaveV2(prefix=parts[-1], tensor_names=names, shape_and_slices=[""] * len(names), tensors=data)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(tmp_path / "merged"))
    assert len(list(tmp_path.glob("merged.data-*-of-00002"))) == 2
    assert_holds(tmp_path / "merged.index", tensors)
