"""`opt-zoo inspect`."""

import json

from harness import config_of, save_random

from opt_core.schema import parameter_count, shapes


def test_inspect_counts_what_the_schema_counts(opt_zoo, tmp_path):
    config = config_of("350m style")
    folder = save_random(tmp_path, config, dtype="float16")
    code, out, _ = opt_zoo("inspect", folder, "--json")
    described = json.loads(out)
    assert code == 0
    assert described["parameters"] == parameter_count(config)
    assert described["bytes"] == 2 * parameter_count(config)
    assert described["dtypes"] == {"float16": len(shapes(config))}
    assert {t["name"]: tuple(t["shape"]) for t in described["tensors"]} == shapes(config)
    assert (described["format"], described["task"], described["problems"]) == ("safetensors", "causal-lm", [])


def test_inspect_prints_the_same_as_text(opt_zoo, tmp_path):
    folder = save_random(tmp_path / "a[b]:heart:", config_of("350m style"))
    code, out, _ = opt_zoo("inspect", folder, "--tensors")
    assert code == 0
    assert "a[b]:heart:" in out
    assert f"{parameter_count(config_of('350m style')):,}" in out
    assert "post-norm, word embeddings of 19 projected" in out
    assert all(name in out for name in shapes(config_of("350m style")))


def test_inspect_lists_every_tensor_that_does_not_fit_and_exits_with_2(opt_zoo, tmp_path):
    folder = save_random(tmp_path, config_of())
    config_of(ffn_dim=59, num_hidden_layers=2).to_json(folder)
    code, out, _ = opt_zoo("inspect", folder, "--json")
    described = json.loads(out)
    assert code == 2
    assert "decoder.layers.0.fc1.weight: expected (59, 35), got (53, 35)" in described["problems"]
    assert any(p.startswith("decoder.layers.2.fc1.weight: unexpected") for p in described["problems"])


def test_inspect_names_unknown_fields_of_the_config(opt_zoo, checkpoint):
    path = checkpoint / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "made_up_field": 3}))
    assert json.loads(opt_zoo("inspect", checkpoint, "--json")[1])["unknown_config_fields"] == ["made_up_field"]


def test_inspect_of_a_weight_file_is_inspect_of_its_folder(opt_zoo, checkpoint):
    of_file, of_folder = (json.loads(opt_zoo("inspect", s, "--json")[1])["tensors"] for s in
                          (checkpoint / "model.safetensors", checkpoint))  # fmt: skip
    assert of_file == of_folder
