"""`opt-zoo convert`: formats, shards, dtypes, and what it refuses."""

import json

import ml_dtypes
import numpy as np
import pytest
from harness import config_of, save_random

from conversion import open_checkpoint


def tensors_of(folder):
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.read(name).copy() for name in checkpoint.shapes}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and np.array_equal(a[name], b[name]) for name in a)


def test_to_sharded_bin_and_back_is_the_identity(opt_zoo, checkpoint, tmp_path):
    sharded, back = tmp_path / "sharded", tmp_path / "back"
    assert opt_zoo("convert", checkpoint, sharded, "--to", "bin", "--max-shard-size", "31KB")[0] == 0
    assert (sharded / "pytorch_model.bin.index.json").is_file()
    assert len(list(sharded.glob("pytorch_model-*.bin"))) > 2
    assert opt_zoo("convert", sharded, back)[0] == 0
    assert sorted(path.name for path in back.iterdir()) == ["config.json", "model.safetensors"]
    assert_same(tensors_of(back), tensors_of(checkpoint))


@pytest.mark.parametrize("to", ["flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors"])
def test_to_the_formats_of_flax_and_tensorflow_and_back_is_the_identity(opt_zoo, checkpoint, tmp_path, to):
    there, back = tmp_path / "there", tmp_path / "back"
    assert opt_zoo("convert", checkpoint, there, "--to", to, "--max-shard-size", "31KB")[0] == 0
    assert opt_zoo("convert", there, back, "--to", "safetensors")[0] == 0
    assert_same(tensors_of(back), tensors_of(checkpoint))


def test_a_model_that_a_format_cannot_hold_is_refused_with_the_reason(opt_zoo, tmp_path):
    source = save_random(tmp_path / "source", config_of("untied head"))
    code, _, err = opt_zoo("convert", source, tmp_path / "target", "--to", "tf-h5")
    assert code == 2
    assert "the format has no place for a head" in " ".join(err.split())
    assert not (tmp_path / "target").exists()


def test_a_dtype_rounds_every_weight_and_is_written_into_the_config(opt_zoo, checkpoint, tmp_path):
    target = tmp_path / "target"
    assert opt_zoo("convert", checkpoint, target, "--dtype", "bfloat16")[0] == 0
    expected = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors_of(checkpoint).items()}
    assert_same(tensors_of(target), expected)
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("task", ["sequence-classification", "question-answering", "base"])
def test_the_head_of_another_class_is_kept(opt_zoo, tmp_path, task):
    source = save_random(tmp_path / "source", config_of(num_labels=5), task)
    assert opt_zoo("convert", source, tmp_path / "target", "--to", "bin")[0] == 0
    assert_same(tensors_of(tmp_path / "target"), tensors_of(source))


def test_tokenizer_and_generation_config_come_along(opt_zoo, checkpoint_with_tokenizer, tmp_path):
    (checkpoint_with_tokenizer / "generation_config.json").write_text("{}")
    code, out, _ = opt_zoo("convert", checkpoint_with_tokenizer, tmp_path / "target", "--json")
    assert code == 0
    source = {path.name for path in checkpoint_with_tokenizer.iterdir()}
    assert {path.name for path in (tmp_path / "target").iterdir()} == source >= {"vocab.json", "merges.txt"}
    assert {file["name"] for file in json.loads(out)["files"]} == source


def test_a_target_that_holds_a_checkpoint_is_kept_unless_told(opt_zoo, checkpoint, tmp_path):
    target = save_random(tmp_path / "target", config_of(num_hidden_layers=1))
    before = tensors_of(target)
    code, out, err = opt_zoo("convert", checkpoint, target)
    assert (code, out) == (2, "")
    assert "--overwrite" in err
    assert_same(tensors_of(target), before)
    assert opt_zoo("convert", checkpoint, target, "--overwrite")[0] == 0
    assert_same(tensors_of(target), tensors_of(checkpoint))


def test_a_checkpoint_is_never_converted_onto_itself(opt_zoo, checkpoint):
    before = tensors_of(checkpoint)
    code, _, err = opt_zoo("convert", checkpoint, checkpoint, "--dtype", "float16", "--overwrite")
    assert code == 2
    assert "expected another folder than SOURCE" in err
    assert_same(tensors_of(checkpoint), before)


def test_a_checkpoint_that_does_not_fit_its_config_is_not_converted(opt_zoo, checkpoint, tmp_path):
    config_of(num_hidden_layers=2).to_json(checkpoint)
    code, _, err = opt_zoo("convert", checkpoint, tmp_path / "target")
    assert code == 2
    assert f"{checkpoint}:" in err
    assert "decoder.layers.2.fc1.weight: unexpected" in err
    assert not (tmp_path / "target").exists()


def test_a_shard_size_that_is_none_exits_with_2(opt_zoo, checkpoint, tmp_path):
    code, _, err = opt_zoo("convert", checkpoint, tmp_path / "target", "--max-shard-size", "a lot")
    assert code == 2
    assert "a lot" in err
    assert "Traceback" not in err
