"""Commands without SOURCE use the embedded checkpoint; the other one goes by its name."""

import json

import pytest

from opt_zoo.embedded import NAMES

QUICK = ["--dtypes", "float32", "--padding", "left,holes", "--new-tokens", "0"]


def test_inspect_without_source_describes_the_embedded_checkpoint(opt_zoo):
    code, out, _ = opt_zoo("inspect", "--json")
    assert (code, json.loads(out)["source"]) == (0, NAMES[0])


def test_the_two_embedded_checkpoints_are_of_the_two_kinds(opt_zoo):
    configs = [json.loads(opt_zoo("inspect", name, "--json")[1])["config"] for name in NAMES]
    assert [config["do_layer_norm_before"] for config in configs] == [True, False]
    assert [config["word_embed_proj_dim"] == config["hidden_size"] for config in configs] == [True, False]


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_agrees_with_the_reference_on_trained_weights_and_text(backend, opt_zoo, name):
    code, out, _ = opt_zoo("parity", "--model", name, "--backends", backend.name, *QUICK, "--json", "-")
    report = json.loads(out)
    assert (code, report["tokens_from"], report["source"]) == (0, "text", name)


def test_generate_without_source_needs_only_a_prompt(opt_zoo):
    code, out, _ = opt_zoo("generate", "To be, or not", "--backend", "torch", "--max-new-tokens", "5", "--json")
    assert code == 0
    assert json.loads(out)["texts"][0]["new_tokens"] == 5


def test_convert_with_one_argument_writes_the_embedded_checkpoint_there(opt_zoo, tmp_path):
    code, out, _ = opt_zoo("convert", tmp_path / "target", "--to", "bin", "--json")
    assert (code, json.loads(out)["source"]) == (0, NAMES[0])
    assert (tmp_path / "target" / "pytorch_model.bin").is_file()
    assert (tmp_path / "target" / "vocab.json").is_file()


def test_an_installation_without_the_embedded_checkpoint_says_so(opt_zoo, monkeypatch, tmp_path):
    monkeypatch.setattr("opt_zoo.sources.embedded_folder", lambda name: tmp_path / name)
    code, _, err = opt_zoo("inspect")
    assert code == 2
    assert f"{NAMES[0]}: expected the embedded checkpoint in" in err
