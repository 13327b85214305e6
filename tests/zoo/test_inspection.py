"""`opt-zoo inspect`."""

import json
import os
import subprocess
import sys

import pytest
from harness import PRUNED_HEADS, config_of, save_random

from conversion.index import plan_shards, shard_name
from conversion.safetensors_file import PlannedTensor, write_file
from opt_core import OPTConfig
from opt_core.schema import parameter_count, published_name, shapes


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


def test_inspect_says_how_many_heads_are_pruned_and_shows_the_shapes_that_are_left(opt_zoo, tmp_path):
    folder = save_random(tmp_path, config_of(pruned_heads=PRUNED_HEADS))
    code, out, _ = opt_zoo("inspect", folder, "--tensors")
    assert code == 0
    assert "5 heads (5 of them pruned in 2 layers)" in out
    assert "14 x 35" in out


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


def test_with_verify_a_weight_that_is_not_as_the_manifest_says_is_named(opt_zoo, tmp_path):
    folder = save_random(tmp_path / "checkpoint", config_of())
    assert opt_zoo("inspect", folder, "--verify")[0] == 0
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert opt_zoo("inspect", folder)[0] == 0  # no weight is read
    text = opt_zoo("inspect", folder, "--verify")[1]
    assert "tensors fit the config  yes" in text
    assert "problem: " in text
    code, out, _ = opt_zoo("inspect", folder, "--verify", "--json")
    (problem,) = json.loads(out)["problems"]
    assert (code, problem.partition(": ")[2]) == (2, "expected what its hash in the manifest says, got other values")
    (folder / "opt_manifest.json").unlink()
    assert opt_zoo("inspect", folder, "--verify")[0] == 2


@pytest.fixture
def folder_of_66b(tmp_path):
    """Shards of 5 GB as they are published, whose weights are holes in the files."""
    config = OPTConfig.preset("opt-66b", torch_dtype="float16", architectures=["OPTForCausalLM"])
    tensors = [
        PlannedTensor(published_name(name, "causal-lm"), "float16", shape) for name, shape in shapes(config).items()
    ]
    shards = plan_shards({tensor: tensor.nbytes for tensor in tensors}, 5 * 10**9)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = shard_name("model", ".safetensors", number, len(shards))
        weight_map.update({tensor.name: name for tensor in shard})
        with open(tmp_path / name, "wb") as file:
            write_file(file, shard, lambda file, tensor: file.seek(tensor.nbytes, os.SEEK_CUR))
            file.truncate()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.to_json(tmp_path)
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs os.wait4")
def test_a_66b_checkpoint_takes_less_than_a_second_in_a_new_process(folder_of_66b):
    command = [sys.executable, "-m", "opt_zoo", "inspect", str(folder_of_66b)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        out = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert f"{parameter_count(OPTConfig.preset('opt-66b')):,}" in out
    assert used.ru_utime + used.ru_stime < 1.0  # of its own, whatever else the machine does
