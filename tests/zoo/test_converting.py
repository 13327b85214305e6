"""`opt-zoo convert`: formats, shards, dtypes, and what it refuses."""

import io
import json

import ml_dtypes
import numpy as np
import pytest
from harness import config_of, save_random
from rich.console import Console

from conversion import open_checkpoint, write_checkpoint
from opt_core import OPTTokenizer
from opt_zoo.backends import BACKENDS
from opt_zoo.console import byte_progress


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
    assert sorted(path.name for path in back.iterdir()) == ["config.json", "model.safetensors", "opt_manifest.json"]
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
    source = {path.name for path in checkpoint_with_tokenizer.iterdir()} | {"opt_manifest.json"}
    assert {path.name for path in (tmp_path / "target").iterdir()} == source >= {"vocab.json", "merges.txt"}
    assert {file["name"] for file in json.loads(out)["files"]} == source


@pytest.mark.parametrize("older", ["keras-hub", "safetensors"])
def test_the_tokenizer_of_a_replaced_checkpoint_does_not_stay_beside_the_new_one(
    opt_zoo, checkpoint_with_tokenizer, tmp_path, older
):
    target, source = tmp_path / "target", checkpoint_with_tokenizer
    assert opt_zoo("convert", "opt-tiny", target, "--to", older)[0] == 0
    (target / "generation_config.json").write_text('{"do_sample": true}')
    (source / "tokenizer.json").unlink()  # the hub's folders have none
    assert opt_zoo("convert", source, target, "--overwrite")[0] == 0
    new, want = (OPTTokenizer.from_pretrained(folder) for folder in (target, source))
    assert new("abc")["input_ids"] == want("abc")["input_ids"]
    assert not (target / "generation_config.json").exists()


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


def test_a_checkpoint_is_never_converted_onto_the_folder_that_it_is_the_inside_of(opt_zoo, checkpoint, tmp_path):
    assert opt_zoo("convert", checkpoint, tmp_path / "runs" / "orbax", "--to", "orbax")[0] == 0
    source = tmp_path / "runs" / "orbax" / "orbax"
    before = tensors_of(source)
    for target in (source.parent, source.parent.parent):
        code, _, err = opt_zoo("convert", source, target, "--dtype", "float16", "--overwrite")
        assert code == 2
        assert "expected another folder than SOURCE" in err
    assert_same(tensors_of(source), before)
    assert opt_zoo("convert", source, tmp_path)[0] == 0  # which only holds it


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


def test_parts_of_metaseq_and_back_is_the_identity(opt_zoo, tmp_path):
    source = save_random(
        tmp_path / "source", config_of(vocab_size=102, ffn_dim=54, hidden_size=36, num_attention_heads=6)
    )
    assert opt_zoo("convert", source, tmp_path / "parts", "--to", "metaseq", "--parts", "2")[0] == 0
    assert len(list((tmp_path / "parts").glob("*.pt"))) == 2
    assert opt_zoo("convert", tmp_path / "parts", tmp_path / "back")[0] == 0
    assert opt_zoo("diff", source, tmp_path / "back")[0] == 0


def test_a_preset_of_kerashub_gets_the_tokenizer_and_what_changes_is_said(opt_zoo, checkpoint_with_tokenizer, tmp_path):
    (checkpoint_with_tokenizer / "generation_config.json").write_text("{}")
    code, out, _ = opt_zoo("convert", checkpoint_with_tokenizer, tmp_path / "preset", "--to", "keras-hub")
    assert code == 0
    assert "what changes: decoder.embed_positions.weight: keras-hub has no place for rows 0 to 1" in " ".join(
        out.split()
    )
    assert (tmp_path / "preset" / "assets" / "tokenizer" / "vocabulary.json").is_file()
    assert "class_name" in json.loads((tmp_path / "preset" / "tokenizer.json").read_text())  # KerasHub's own
    assert (tmp_path / "preset" / "generation_config.json").is_file()


def test_nan_is_refused_unless_allowed(opt_zoo, checkpoint, tmp_path):
    tensors = tensors_of(checkpoint)
    tensors["decoder.layers.0.fc1.bias"][1] = np.nan
    with open_checkpoint(checkpoint) as opened:
        write_checkpoint(tmp_path / "source", opened.config, tensors, allow_nonfinite=True)
    code, _, err = opt_zoo("convert", tmp_path / "source", tmp_path / "target", "--to", "bin")
    assert code == 2
    assert "decoder.layers.0.fc1.bias: expected finite values" in err
    arguments = ["convert", tmp_path / "source", tmp_path / "target", "--to", "bin", "--allow-nonfinite"]
    assert opt_zoo(*arguments)[0] == 0


def test_no_verify_leaves_out_the_second_look(opt_zoo, checkpoint, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("conversion.write.verify_written", lambda *arguments: looked.append(arguments))
    assert opt_zoo("convert", checkpoint, tmp_path / "a", "--no-verify")[0] == 0
    assert looked == []
    assert opt_zoo("convert", checkpoint, tmp_path / "b")[0] == 0
    assert len(looked) == 1


def test_a_saved_model_without_tensorflow_names_the_extra(opt_zoo, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(BACKENDS, "tf", BACKENDS["tf"]._replace(frameworks=("no_such_framework",)))
    code, _, err = opt_zoo("convert", checkpoint, tmp_path / "target", "--to", "saved-model")
    assert code == 2
    assert "pip install opt-zoo[tf]" in err
    code, _, err = opt_zoo("convert", checkpoint, tmp_path / "target", "--to", "saved-model", "--parts", "2")
    assert code == 2
    assert "--parts: not an option of saved-model" in err


@pytest.mark.parametrize("task", ["causal-lm", "question-answering"])
def test_a_saved_model_is_written_and_its_weights_read_back(opt_zoo, tmp_path, backends, task):
    if "tf" not in [backend.name for backend in backends]:
        pytest.skip("--backends leaves out tf")
    source = save_random(tmp_path / "source", config_of(), task)
    assert opt_zoo("convert", source, tmp_path / "target", "--to", "saved-model")[0] == 0
    code, out, err = opt_zoo("diff", source, tmp_path / "target")
    assert (code, err) == (0, ""), out
    assert opt_zoo("convert", source, tmp_path / "copy")[0] == 0
    assert opt_zoo("diff", tmp_path / "copy", tmp_path / "target", "--manifest")[0] == 0


def test_a_saved_model_of_float64_says_that_it_holds_float32(opt_zoo, checkpoint, tmp_path, backends):
    if "tf" not in [backend.name for backend in backends]:
        pytest.skip("--backends leaves out tf")
    wide = {name: tensor.astype(np.float64) for name, tensor in tensors_of(checkpoint).items()}
    with open_checkpoint(checkpoint) as opened:
        write_checkpoint(tmp_path / "wide", opened.config, wide)
    out = opt_zoo("convert", tmp_path / "wide", tmp_path / "target", "--to", "saved-model")[1]
    assert f"what changes: {len(wide)} weights: float64 becomes float32" in out


def test_a_saved_model_gets_the_tokenizer_and_is_written_again(opt_zoo, checkpoint_with_tokenizer, tmp_path, backends):
    if "tf" not in [backend.name for backend in backends]:
        pytest.skip("--backends leaves out tf")
    arguments = ["convert", checkpoint_with_tokenizer, tmp_path / "target", "--to", "saved-model"]
    assert opt_zoo(*arguments)[0] == 0
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "target").iterdir()}
    assert opt_zoo(*arguments)[0] == 2
    assert opt_zoo(*arguments, "--overwrite")[0] == 0


def test_the_bar_shows_bytes_speed_and_time_left_over_writing_and_reading_again(monkeypatch, checkpoint, tmp_path):
    stream = io.StringIO()
    terminal = Console(file=stream, force_terminal=True, width=200)
    monkeypatch.setattr("opt_zoo.console.stderr_console", lambda: terminal)
    shown = []
    with byte_progress("writing") as progress, open_checkpoint(checkpoint) as opened:
        report = lambda done, total: (shown.append((done, total)), progress(done, total))  # noqa: E731
        write_checkpoint(tmp_path / "target", opened.config, opened, progress=report)
    total = 2 * sum(array.nbytes for array in tensors_of(checkpoint).values())
    assert shown[-1] == (total, total)
    assert all(unit in stream.getvalue() for unit in ("writing", "kB", "/s", ":"))
