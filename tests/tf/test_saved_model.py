"""A SavedModel gives the model's outputs without this package, refuses what it cannot take, and keeps the names."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from harness import MASKS, config_of, mask_named, token_ids

from conversion.tf_checkpoint.tensor_bundle import open_file
from opt_core import OPTConfig
from opt_core.errors import CheckpointError, InputError
from opt_core.schema import published_name, shapes
from opt_tf import (
    TFOPTForCausalLM,
    TFOPTForQuestionAnswering,
    TFOPTForSequenceClassification,
    TFOPTModel,
)
from opt_tf.saved_model import save_saved_model

LOADED = """
import sys
import numpy as np, tensorflow as tf
sys.modules.update(dict.fromkeys(["opt_core", "conversion", "opt_tf"]))  # an import of them fails, installed or not
inputs = np.load("inputs.npz")
serve = tf.saved_model.load("model").signatures["serving_default"]
count = len(inputs) // 2
outputs = {
    str(i): serve(input_ids=tf.constant(inputs[f"ids{i}"]), attention_mask=tf.constant(inputs[f"mask{i}"]))["logits"]
    for i in range(count)
}
np.savez("outputs.npz", **outputs)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = TFOPTForCausalLM(config_of("350m style", max_position_embeddings=311))
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_saved_model(model, folder)
    return model, folder


@pytest.fixture(scope="module")
def serve(saved):
    return serving(saved[1])


def serving(folder):
    function = tf.saved_model.load(str(folder)).signatures["serving_default"]
    return lambda ids, mask: function(input_ids=tf.constant(ids, tf.int32), attention_mask=tf.constant(mask, tf.int32))


def test_a_program_without_this_package_gets_the_logits_of_the_model(saved):
    """Every kind of padding, one token, and rows that are longer than a block of attention."""
    model, folder = saved
    cases = [(token_ids(model.config), mask_named(name)) for name in MASKS if name != "none"]
    cases += [(token_ids(model.config, 3, length), np.ones((3, length), int)) for length in (1, 300)]
    arrays = {}
    for i, (ids, mask) in enumerate(cases):
        arrays |= {f"ids{i}": ids.astype(np.int32), f"mask{i}": mask.astype(np.int32)}
    np.savez(folder.parent / "inputs.npz", **arrays)
    subprocess.run([sys.executable, "-I", "-c", LOADED], cwd=folder.parent, check=True, capture_output=True)
    outputs = np.load(folder.parent / "outputs.npz")
    for i, (ids, mask) in enumerate(cases):
        np.testing.assert_allclose(outputs[str(i)], model(ids, mask).logits, atol=1e-6)
        assert not outputs[str(i)][mask == 0].any()


@pytest.mark.parametrize(
    ("model_class", "variant", "outputs", "dtype"),
    [
        (TFOPTModel, "pre-norm", {"last_hidden_state"}, "float32"),
        (TFOPTForCausalLM, "untied head", {"logits"}, "bfloat16"),
        (TFOPTForSequenceClassification, "galactica style", {"logits"}, "float16"),
        (TFOPTForQuestionAnswering, "no final norm", {"start_logits", "end_logits"}, "float32"),
    ],
)
def test_each_class_has_its_outputs_by_name_and_its_weights_by_their_published_names(
    tmp_path, model_class, variant, outputs, dtype
):
    model = model_class(config_of(variant, num_hidden_layers=1), dtype=dtype)
    ids, mask = token_ids(model.config), mask_named("left")
    save_saved_model(model, tmp_path / "model")
    got, want = serving(tmp_path / "model")(ids, mask), model(ids, mask)
    assert got.keys() == outputs
    for name in outputs:
        assert got[name].dtype == dtype
        tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(
            tf.cast(got[name], tf.float32), tf.cast(getattr(want, name), tf.float32), atol=tolerance
        )
    file = open_file(tmp_path / "model" / "variables" / "variables.index", verify=True)
    names = {name: published_name(name, model.task).replace(".", "/") for name in shapes(model.config, model.task)}
    assert file.tensors.keys() == {*names.values()}
    for name, stored in names.items():
        assert file.read(stored).tobytes() == model.weight(name).value.numpy().tobytes(), name


def test_the_config_lies_beside_the_weights_and_variables_are_attributes(saved):
    model, folder = saved
    config = OPTConfig.from_json(folder / "config.json")
    assert config == model.config.replace(architectures=["OPTForCausalLM"], torch_dtype="float32")
    loaded = tf.saved_model.load(str(folder))
    np.testing.assert_array_equal(
        loaded.model.decoder.layers[1].fc1.weight, model.weight("decoder.layers.1.fc1.weight").value
    )


def test_from_pretrained_reads_the_weights_of_a_saved_model(saved):
    model, folder = saved
    again = TFOPTForCausalLM.from_pretrained(folder)
    for name in shapes(model.config):
        np.testing.assert_array_equal(again.weight(name), model.weight(name), err_msg=name)


@pytest.mark.parametrize(
    ("ids", "mask", "problem"),
    [
        ([[5, 97, 6]], [[1, 1, 1]], "input_ids: expected 0 to 96"),
        ([[5, -1, 6]], [[1, 1, 1]], "input_ids: expected 0 to 96"),
        ([[5, 97, 6]], [[1, 0, 1]], "input_ids: expected 0 to 96"),
        ([[5, 5, 6]], [[1, 1]], "attention_mask: expected the shape of input_ids"),
        ([[5, 5, 6]], [[1, 1, 1]] * 2, "attention_mask: expected the shape of input_ids"),
        ([[5] * 312] * 2, [[1] * 311 + [0], [1] * 312], "sequence: expected at most 311 real tokens a row"),
    ],
)
def test_what_the_model_cannot_take_is_an_error_and_not_a_number(serve, ids, mask, problem):
    with pytest.raises(tf.errors.InvalidArgumentError, match=problem):
        serve(ids, mask)


def test_more_columns_than_positions_are_taken_where_the_rest_is_padding(saved, serve):
    model, ids = saved[0], token_ids(saved[0].config, 2, 330)
    mask = np.ones_like(ids)
    mask[:, :29] = 0
    want = model(ids[:, 29:], mask[:, 29:]).logits
    np.testing.assert_allclose(serve(ids, mask)["logits"][:, 29:], want, atol=1e-6)


# -- the folder -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small():
    return TFOPTModel(config_of("no layers"))


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_older_saved_model_is_replaced_only_on_request(small, tmp_path):
    save_saved_model(small, tmp_path)  # an empty folder is none
    before = (tmp_path / "variables" / "variables.data-00000-of-00001").read_bytes()
    other = TFOPTModel(config_of("no layers"))
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_saved_model(other, tmp_path)
    assert (tmp_path / "variables" / "variables.data-00000-of-00001").read_bytes() == before
    written = save_saved_model(other, tmp_path, overwrite=True)
    assert {path.name for path in written} == entries(tmp_path)
    assert written[-1].name == "saved_model.pb"
    loaded = tf.saved_model.load(str(tmp_path))
    np.testing.assert_array_equal(loaded.decoder.embed_tokens.weight, other.weight("decoder.embed_tokens.weight").value)


def test_a_checkpoint_of_another_format_is_replaced_only_on_request_and_other_files_stay(small, tmp_path):
    for name in ("model.safetensors", "config.json", "notes"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match=r"config.json, model.safetensors; pass overwrite=True"):
        save_saved_model(small, tmp_path)
    assert entries(tmp_path) == {"model.safetensors", "config.json", "notes"}
    written = save_saved_model(small, tmp_path, overwrite=True)
    assert entries(tmp_path) == {"notes", *(path.name for path in written)}


def test_nan_is_refused_unless_allowed(small, tmp_path):
    bias = small.weight("decoder.final_layer_norm.bias")
    bias.assign(np.full(bias.shape, np.nan))
    with pytest.raises(CheckpointError, match=r"decoder.final_layer_norm.bias: expected finite values"):
        save_saved_model(small, tmp_path / "model")
    assert entries(tmp_path) == set()
    save_saved_model(small, tmp_path / "model", allow_nonfinite=True)


def test_a_variable_that_does_not_read_back_is_named_and_nothing_is_left(small, tmp_path, monkeypatch):
    save = tf.saved_model.save

    def damage(module, path, **options):
        save(module, path, **options)
        data = Path(path) / "variables" / "variables.data-00000-of-00001"
        weights = open_file(data.with_name("variables.index")).tensors
        content = bytearray(data.read_bytes())
        content[weights["decoder/embed_positions/weight"].offset] ^= 1
        data.write_bytes(content)

    monkeypatch.setattr(tf.saved_model, "save", damage)
    with pytest.raises(CheckpointError, match=r"decoder.embed_positions.weight: expected the values that were written"):
        save_saved_model(small, tmp_path / "model")
    assert entries(tmp_path) == set()
    save_saved_model(small, tmp_path / "model", verify=False)


@pytest.mark.parametrize("error", [OSError("disk full"), tf.errors.ResourceExhaustedError(None, None, "disk full")])
def test_a_save_that_fails_leaves_nothing_behind(small, tmp_path, monkeypatch, error):
    def fail(module, path, **options):
        (Path(path) / "saved_model.pb").write_text("half")
        raise error

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_saved_model(small, tmp_path / "model")
    assert entries(tmp_path) == set()


def test_keras_export_writes_the_same_and_refuses_other_formats(tmp_path):
    model = TFOPTForCausalLM(config_of())
    with pytest.raises(InputError, match="tf_saved_model"):
        model.export(tmp_path / "model", format="onnx")
    assert not (tmp_path / "model").exists()
    model.export(tmp_path / "model")
    ids = token_ids(model.config)
    got = serving(tmp_path / "model")(ids, np.ones_like(ids))["logits"]
    np.testing.assert_allclose(got, model(ids).logits, rtol=1e-5, atol=1e-6)
