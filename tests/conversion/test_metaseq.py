"""metaseq's checkpoints: whatever the layout, the parts hold the truth bit for bit, and what is written is read."""

import collections
import subprocess
import sys

import metaseq_files as files
import numpy as np
import pytest
import torch
from metaseq_files import LAYOUTS, assert_holds, bytes_of

from conversion import open_checkpoint, write_checkpoint
from conversion.metaseq import metaseq_checkpoint as metaseq
from conversion.metaseq.metaseq_config import cfg_of
from conversion.safetensors_file import PlannedTensor
from opt_core.errors import CheckpointError

# -- every layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_truth_and_its_config(tmp_path, layout, parts):
    save, options = LAYOUTS[layout]
    config = files.config_of(parts)
    truth = files.truth_of(config)
    save(tmp_path, config, truth, parts, **options)
    opened = metaseq.open_parts(tmp_path, verify=True)
    assert_holds(opened, files.parts_of(truth, config, parts))
    assert metaseq.config_of(opened) == config.replace(attention_dropout=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_of_other_dtypes_are_joined(tmp_path, dtype):
    config = files.config_of(2)
    truth = files.truth_of(config, dtype)
    files.save_raw(tmp_path, config, truth, 2)
    assert_holds(metaseq.open_parts(tmp_path), files.parts_of(truth, config, 2))


@pytest.mark.parametrize("switches", [dict(enable_bias=False), dict(layer_norm_elementwise_affine=False), {}])
@pytest.mark.parametrize("save", [files.save_flat, files.save_unflattened, files.save_raw])
def test_models_without_biases_or_with_plain_norms_are_read(tmp_path, save, switches):
    config = files.config_of(2, **switches)
    truth = files.truth_of(config)
    save(tmp_path, config, truth, 2)
    opened = metaseq.open_parts(tmp_path)
    assert_holds(opened, files.parts_of(truth, config, 2))
    assert metaseq.config_of(opened) == config.replace(attention_dropout=0.1)


def test_restored_files_have_their_settings_in_omegaconf_and_keys_values_and_queries_apart(tmp_path):
    config = files.config_of()
    truth = files.truth_of(config)
    files.save_restored(tmp_path, config, truth)
    opened = metaseq.open_parts(tmp_path)
    assert_holds(opened, files.parts_of(truth, config, 1, joint=False))
    assert metaseq.config_of(opened) == config.replace(attention_dropout=0.1)
    assert opened.settings["lr"] == [0.0006]


def test_the_350m_file_is_read_with_norms_after_and_projections(tmp_path):
    config = files.config_of_350m()
    truth = files.truth_of(config)
    files.save_350m(tmp_path, config, truth)
    opened = metaseq.open_parts(tmp_path)
    assert_holds(opened, files.parts_of(truth, config, 1, joint=False))
    assert metaseq.config_of(opened) == config.replace(attention_dropout=0.1)
    assert np.array_equal(
        opened.parts[0].read("decoder.output_projection.weight"), truth["decoder.embed_tokens.weight"]
    )


@pytest.mark.parametrize("per_layer", [True, False])
def test_a_flat_350m_has_the_order_of_its_modules(tmp_path, per_layer):
    config = files.config_of_350m()
    truth = files.truth_of(config)
    files.save_flat(tmp_path, config, truth, joint=False, per_layer=per_layer)
    assert_holds(metaseq.open_parts(tmp_path), files.parts_of(truth, config, 1, joint=False))


def test_a_state_dict_alone_is_read_and_has_no_config(tmp_path):
    config = files.config_of()
    truth = files.truth_of(config)
    files.save_bare(tmp_path, config, truth)
    opened = metaseq.open_parts(tmp_path)
    assert_holds(opened, files.parts_of(truth, config, 1))
    with pytest.raises(CheckpointError, match="number of heads"):
        metaseq.config_of(opened)


def test_old_settings_stand_in_args(tmp_path):
    config = files.config_of()
    (named,) = files.parts_of(files.truth_of(config), config, 1)
    torch.save({"args": files.namespace_of(config), "cfg": None, "model": named}, tmp_path / "reshard.pt")
    assert metaseq.config_of(metaseq.open_parts(tmp_path)).num_attention_heads == 6


def test_a_given_config_stands_for_the_settings_of_a_flat_file(tmp_path):
    config = files.config_of(2, vocab_size=94)  # which no dictionary of metaseq has
    truth = files.truth_of(config)
    files.save_flat(tmp_path, config, truth, 2)
    assert_holds(metaseq.open_parts(tmp_path, config), files.parts_of(truth, config, 2))
    with pytest.raises(CheckpointError, match="a multiple of 8 rows more"):
        metaseq.open_parts(tmp_path)


def test_a_weight_in_one_shard_is_a_view_and_one_across_shards_a_copy(tmp_path):
    config = files.config_of()
    truth = files.truth_of(config)
    files.save_raw(tmp_path, config, truth)
    (part,) = metaseq.open_parts(tmp_path).parts
    arrays = {name: part.read(name) for name in part.tensors}
    assert {array.flags.owndata or array.base.flags.owndata for array in arrays.values()} == {True, False}
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    for array in arrays.values():
        assert array.flags.writeable
        array += 1
    part.close()
    assert before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert arrays["decoder.layers.0.fc1.bias"].tobytes() == bytes_of(truth["decoder.layers.0.fc1.bias"] + 1)


def test_equal_places_in_different_groups_are_different_tensors(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    (part,) = metaseq.open_parts(tmp_path).parts
    assert len(set(part.tensors.values())) == len(part.tensors)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_opens_as_a_checkpoint(tmp_path, layout, parts):
    save, options = LAYOUTS[layout]
    config = files.config_of(parts)
    truth = files.truth_of(config)
    save(tmp_path, config, truth, parts, **options)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert (checkpoint.format, checkpoint.task) == ("metaseq", "causal-lm")
        assert checkpoint.config == config.replace(attention_dropout=0.1, torch_dtype="float16")
        assert_is(checkpoint, truth)


@pytest.mark.parametrize("save", [files.save_restored, files.save_350m, files.save_bare])
def test_every_single_file_opens_as_a_checkpoint(tmp_path, save):
    config = files.config_of_350m() if save is files.save_350m else files.config_of()
    truth = files.truth_of(config)
    save(tmp_path, config, truth)
    config.to_json(tmp_path)  # which a state dict alone needs
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_is(checkpoint, truth)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("layout", ["raw shards", "flat by layer"])
def test_a_checkpoint_is_written_from_another_layout_and_number_of_parts(tmp_path, layout, parts):
    save, options = LAYOUTS[layout]
    config = files.config_of(2, vocab_size=8 * 6, ffn_dim=6 * 5)
    truth = files.truth_of(config)
    (tmp_path / "a").mkdir()
    save(tmp_path / "a", config, truth, 2, **options)
    with open_checkpoint(tmp_path / "a") as source:
        write_checkpoint(tmp_path / "b", source.config, source, format="metaseq", parts=parts)
    assert_holds(metaseq.open_parts(tmp_path / "b"), files.parts_of(truth, config, parts))
    with open_checkpoint(tmp_path / "b") as checkpoint:
        assert_is(checkpoint, truth)


def assert_is(checkpoint, truth: dict[str, torch.Tensor]) -> None:
    assert checkpoint.shapes.keys() == truth.keys()
    for name, tensor in truth.items():
        assert checkpoint.shapes[name] == tuple(tensor.shape), name
        assert checkpoint.read(name).tobytes() == bytes_of(tensor), name


def test_no_framework_is_loaded(tmp_path):
    config = files.config_of()
    files.save_restored(tmp_path, config, files.truth_of(config))
    code = f"""if True:
        import sys
        from pathlib import Path
        from conversion.metaseq import metaseq_checkpoint as metaseq
        opened = metaseq.open_parts(Path({str(tmp_path)!r}))
        assert opened.parts[0].read("decoder.embed_tokens.weight").shape == (56, 66)
        print(sorted({{"torch", "omegaconf", "metaseq", "tensorflow", "jax"}} & set(sys.modules)))"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- which files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["raw shards", "unflattened", "flat"])
def test_any_file_of_a_set_stands_for_all(tmp_path, layout):
    save, options = LAYOUTS[layout]
    config = files.config_of(2)
    truth = files.truth_of(config)
    save(tmp_path, config, truth, 2, **options)
    for path in tmp_path.iterdir():
        assert_holds(metaseq.open_parts(path), files.parts_of(truth, config, 2))


def test_parts_and_shards_of_one_stem_are_two_sets(tmp_path):
    config = files.config_of(2)
    truth = files.truth_of(config)
    files.save_raw(tmp_path, config, truth, 2, stem="reshard")
    files.save_unflattened(tmp_path, config, truth, 2)
    for path in tmp_path.iterdir():
        assert_holds(metaseq.open_parts(path), files.parts_of(truth, config, 2))
    with pytest.raises(CheckpointError, match="give one of their files"):
        metaseq.open_parts(tmp_path)


def test_parts_are_counted_not_spelled(tmp_path):
    config = files.config_of(12, hidden_size=24, num_attention_heads=12)
    truth = files.truth_of(config)
    files.save_unflattened(tmp_path, config, truth, 12)
    assert_holds(metaseq.open_parts(tmp_path), files.parts_of(truth, config, 12))


def test_a_file_of_any_name_is_read_alone(tmp_path):
    config = files.config_of()
    truth = files.truth_of(config)
    files.save_bare(tmp_path, config, truth)
    (tmp_path / "reshard.pt").rename(tmp_path / "mine.pt")
    for path in (tmp_path, tmp_path / "mine.pt"):
        assert_holds(metaseq.open_parts(path), files.parts_of(truth, config, 1))


# -- writing ----------------------------------------------------------------------------------------------------------


def write(path, named: dict[str, torch.Tensor], cfg) -> None:
    dtype = str(next(iter(named.values())).dtype).removeprefix("torch.")
    planned = [PlannedTensor(name, dtype, tuple(tensor.shape)) for name, tensor in named.items()]
    with open(path, "wb") as file:
        metaseq.write_part(file, planned, lambda file, t: file.write(bytes_of(named[t.name])), cfg=cfg)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_written_is_read_back(tmp_path, parts, dtype):
    config = files.config_of(parts)
    expected = files.parts_of(files.truth_of(config, dtype), config, parts)
    for number, named in enumerate(expected):
        write(tmp_path / f"reshard-model_part-{number}.pt", named, cfg_of(config, parts))
    opened = metaseq.open_parts(tmp_path, verify=True)
    assert_holds(opened, expected)
    assert metaseq.config_of(opened) == config
    assert opened.unknown == ()
    assert not opened.parts[0].read("decoder.layer_norm.weight").flags.owndata  # aligned, hence a view


def test_torch_loads_what_is_written_as_metaseq_would(tmp_path):
    config = files.config_of()
    (named,) = files.parts_of(files.truth_of(config), config, 1)
    write(tmp_path / "reshard.pt", named, cfg_of(config))
    state = torch.load(tmp_path / "reshard.pt", weights_only=False)
    assert isinstance(state["model"], collections.OrderedDict)
    assert state["model"].keys() == named.keys() | {"decoder.version"}
    assert torch.equal(state["model"]["decoder.version"], torch.tensor([3.0], dtype=torch.float16))
    assert all(torch.equal(state["model"][name], tensor) for name, tensor in named.items())
    assert state["cfg"]["model"].decoder_attention_heads == 6
    assert state["cfg"]["common"]["model_parallel_size"] == 1
    history = state["optimizer_history"][-1]  # without which metaseq takes a file for one of its oldest
    assert {"num_updates", "lr_scheduler_state"} <= history.keys()
    assert "train_iterator" in state["extra_state"]


def test_omegaconf_takes_the_settings_that_are_written(tmp_path):
    from omegaconf import OmegaConf

    config = files.config_of(2)
    write(tmp_path / "x.pt", files.parts_of(files.truth_of(config), config, 2)[0], cfg_of(config, 2))
    cfg = OmegaConf.create(torch.load(tmp_path / "x.pt", weights_only=False)["cfg"], flags={"allow_objects": True})
    assert cfg.model.arch == "transformer_lm_megatron"
    assert cfg.common.model_parallel_size == cfg.model.model_parallel_size == 2


@pytest.mark.parametrize(("joint", "arch"), [(True, "transformer_lm_megatron"), (False, "transformer_lm")])
def test_the_class_that_is_named_has_the_tensors_that_are_written(tmp_path, joint, arch):
    config = files.config_of()
    (named,) = files.parts_of(files.truth_of(config), config, 1, joint=joint)
    write(tmp_path / "x.pt", named, cfg_of(config))
    model = torch.load(tmp_path / "x.pt", weights_only=False)["cfg"]["model"]
    assert (model.arch, model._name) == (arch, arch)
    assert metaseq.config_of(metaseq.open_parts(tmp_path)) == config


def test_equal_weights_give_equal_files(tmp_path):
    config = files.config_of()
    (named,) = files.parts_of(files.truth_of(config), config, 1)
    for name in ("a.pt", "b.pt"):
        write(tmp_path / name, named, cfg_of(config))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
