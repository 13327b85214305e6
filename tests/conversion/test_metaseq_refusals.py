"""metaseq's checkpoints that are incomplete, contradictory, damaged or hostile: refused by file and tensor."""

import os
import pickle
import re

import metaseq_files as files
import numpy as np
import pytest
import torch
from metaseq_files import LAYOUTS, assert_holds, bytes_of

from conversion.metaseq import metaseq_checkpoint as metaseq
from opt_core.errors import CheckpointError, ConfigError

NORM, BIAS = "decoder.layer_norm.weight", "decoder.layers.1.fc2.bias"


def refusal(path, **options) -> str:
    with pytest.raises(CheckpointError) as raised:
        metaseq.open_parts(path, **options)
    assert str(path) in str(raised.value) or str(path.parent) in str(raised.value)
    return str(raised.value)


# -- which files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("removed", "problem"),
    [
        ("checkpoint_last-model_part-0-shard0.pt", "checkpoint_last-model_part-0-shard0.pt: missing"),
        ("checkpoint_last-model_part-1-shard1.pt", "checkpoint_last-model_part-1-shard1.pt: missing"),
        ("checkpoint_last-model_part-1-shard2.pt", "checkpoint_last-model_part-1-shard2.pt: missing"),
        ("checkpoint_last-model_part-0-*.pt", "checkpoint_last-model_part-0-shard2.pt: missing"),
        ("checkpoint_last-model_part-1-*.pt", "parts are missing"),
        ("checkpoint_last-model_part-*-shard2.pt", "elements"),
    ],
)
def test_a_part_or_a_shard_that_is_missing_is_named(tmp_path, removed, problem):
    config = files.config_of(2)
    files.save_raw(tmp_path, config, files.truth_of(config), 2)
    for path in list(tmp_path.glob(removed)):
        path.unlink()
    assert problem in refusal(tmp_path)


@pytest.mark.parametrize("layout", ["flat", "flat by layer", "unflattened"])
def test_a_last_part_that_is_missing_is_noticed_by_the_widths(tmp_path, layout):
    save, options = LAYOUTS[layout]
    config = files.config_of(3)
    save(tmp_path, config, files.truth_of(config), 3, **options)
    (tmp_path / "reshard-model_part-2.pt").unlink()
    message = refusal(tmp_path)
    assert "parts are missing" in message or "elements" in message or "multiple of 2 parts" in message


def test_a_number_that_is_there_twice_is_named_with_both_files(tmp_path):
    config = files.config_of(2)
    files.save_unflattened(tmp_path, config, files.truth_of(config), 2)
    (tmp_path / "reshard-model_part-01.pt").write_bytes((tmp_path / "reshard-model_part-1.pt").read_bytes())
    message = refusal(tmp_path)
    assert (
        "reshard-model_part-1.pt: expected one file, got reshard-model_part-01.pt, reshard-model_part-1.pt" in message
    )


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, put):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    path = tmp_path / "checkpoint_last-shard1.pt"
    path.unlink()
    put(path)
    assert "checkpoint_last-shard1.pt: missing" in refusal(tmp_path)
    assert "checkpoint_last-shard1.pt: missing" in refusal(tmp_path / "checkpoint_last-shard0.pt")
    if not path.is_dir():
        assert "expected a file or a folder" in refusal(path)


def test_a_number_far_too_high_does_not_make_a_long_list(tmp_path):
    config = files.config_of(2)
    files.save_unflattened(tmp_path, config, files.truth_of(config), 2)
    (tmp_path / "reshard-model_part-1.pt").rename(tmp_path / "reshard-model_part-9999.pt")
    assert "expected 10000 parts of 1 shards, by the highest numbers, got 2 files" in refusal(tmp_path)


def test_a_folder_of_several_checkpoints_asks_for_one_of_their_files(tmp_path):
    config = files.config_of()
    truth = files.truth_of(config)
    files.save_raw(tmp_path, config, truth)
    files.save_restored(tmp_path, config, truth)
    message = refusal(tmp_path)
    assert "got 2 (checkpoint_last-shard0.pt, restored.pt): give one of their files" in message
    for path in tmp_path.iterdir():
        assert metaseq.open_parts(path).parts[0].tensors


def test_a_folder_without_checkpoints_says_what_was_looked_for(tmp_path):
    assert "no *.pt file" in refusal(tmp_path)


# -- contradictions ---------------------------------------------------------------------------------------------------


def save_changed(folder, change, parts=1, shards=3):
    """Raw shards, of which the last has been changed by `change(saved)`."""
    config = files.config_of(parts)
    files.save_raw(folder, config, files.truth_of(config), parts, shards)
    path = max(folder.iterdir())
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)


def group(saved, number=1) -> dict:
    return saved["shard_metadata"]["param_metadata"][number]["params"]["flat_param_0"]


def test_the_shards_of_these_tests_are_good_ones_unless_changed(tmp_path):
    save_changed(tmp_path, lambda saved: None)
    assert metaseq.open_parts(tmp_path).parts[0].tensors


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: group(s).update(padding=-1), "expected a padding of at least 0, got -1"),
        (lambda s: group(s).update(padding=10**9), "expected a padding of at most"),
        (lambda s: group(s).update(padding=1 + group(s)["padding"]), "decoder.layers.0.flat_param_0: expected"),
        (lambda s: group(s).update(padding=None), "expected a padding of at least 0, got NoneType"),
        (lambda s: group(s)["numels"].append(3), "names, shapes and numels of one length"),
        (lambda s: group(s)["numels"].__setitem__(0, 7), "expected a shape of 7 elements, got (198, 66)"),
        (lambda s: group(s)["shapes"].__setitem__(0, [-66, -198]), "got (-66, -198)"),
        (lambda s: group(s)["shapes"].__setitem__(0, [198, [66]]), "got (198, list)"),
        (lambda s: group(s)["names"].__setitem__(0, group(s)["names"][1]), "expected names that differ"),
        (lambda s: group(s)["names"].__setitem__(0, 7), "expected names that differ"),
        (lambda s: group(s).pop("names"), "lists of names"),
        (lambda s: group(s)["names"].reverse(), "shard 2: expected the shard_metadata of shard 0"),
        (lambda s: s["shard_metadata"].pop("param_metadata"), "expected param_metadata"),
        (lambda s: s["shard_metadata"]["param_metadata"].pop(), "shard 2: expected the shard_metadata of shard 0"),
        (lambda s: s["shard_metadata"]["param_metadata"].reverse(), "shard 2: expected the shard_metadata of shard 0"),
        (lambda s: s.pop("shard_metadata"), "shard 2: shard_metadata: expected param_metadata"),
        (lambda s: s["model"].pop("decoder.layers.2.flat_param_0"), "shard 2: decoder.layers.2.flat_param_0: missing"),
        (lambda s: s["model"].update(extra=torch.zeros(3)), "shard 2: extra: neither"),
        (lambda s: s["model"].update(flat_param_0=torch.zeros(5)), "flat_param_0: expected one dimension and one size"),
        (lambda s: s["model"].update(flat_param_0=s["model"]["flat_param_0"].float()), "one size and dtype"),
        (lambda s: s["model"].update(flat_param_0=s["model"]["flat_param_0"][None]), "one dimension"),
        (lambda s: s["model"].update(flat_param_0=s["model"]["flat_param_0"].repeat(2)[::2]), "one dimension"),
        (lambda s: s["model"].update(flat_param_0="nothing"), "flat_param_0: expected a named tensor, got str"),
        (lambda s: s["shard_metadata"]["param_metadata"][1].update(no_broadcast_optim_state=True), "an expert"),
    ],
)  # fmt: skip
def test_shards_that_contradict_each_other_or_themselves_are_refused(tmp_path, change, problem):
    save_changed(tmp_path, change)
    assert problem in refusal(tmp_path)


def test_a_weight_in_two_groups_is_named(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    for path in tmp_path.iterdir():
        saved = torch.load(path, weights_only=False)
        names = group(saved, 0)["names"]
        names[names.index(NORM)] = BIAS
        torch.save(saved, path)
    assert f"{BIAS}: in two flat tensors" in refusal(tmp_path)


def test_a_group_of_another_path_is_named(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    for path in tmp_path.iterdir():
        saved = torch.load(path, weights_only=False)
        saved["shard_metadata"]["param_metadata"][2]["fsdp_path"] = "decoder.layers.7"
        torch.save(saved, path)
    message = refusal(tmp_path)
    assert "shard 0: decoder.layers.1.flat_param_0: neither" in message
    assert "shard 2: decoder.layers.7.flat_param_0: missing" in message


def test_shards_in_another_order_are_noticed_by_their_padding(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    first, last = (tmp_path / f"checkpoint_last-shard{number}.pt" for number in (0, 2))
    first.rename(tmp_path / "kept")
    last.rename(first)
    (tmp_path / "kept").rename(last)
    assert "the shards are not in order" in refusal(tmp_path)


def test_shards_without_metadata_must_have_the_elements_of_their_settings(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    for path in tmp_path.iterdir():
        saved = torch.load(path, weights_only=False)
        del saved["shard_metadata"]
        flat = saved["model"]["decoder.layers.1.flat_param_0"]
        saved["model"]["decoder.layers.1.flat_param_0"] = torch.cat([flat, flat[:1]])
        torch.save(saved, path)
    assert "decoder.layers.1.flat_param_0: expected" in refusal(tmp_path)


@pytest.mark.parametrize("key", ["flat_param_0", "decoder.layers.1.flat_param_0"])
@pytest.mark.parametrize("change", [lambda flat: flat[0], lambda flat: flat[None], lambda flat: flat[:0], lambda _: 7])
def test_a_flat_tensor_of_other_dimensions_is_refused(tmp_path, key, change):
    config = files.config_of(2)
    files.save_flat(tmp_path, config, files.truth_of(config), 2)
    for path in tmp_path.iterdir():
        saved = torch.load(path, weights_only=False)
        saved["model"][key] = change(saved["model"][key])
        torch.save(saved, path)
    assert key in refusal(tmp_path)
    assert key in refusal(tmp_path, config=config)


def test_named_tensors_in_several_shards_are_refused(tmp_path):
    config = files.config_of()
    files.save_unflattened(tmp_path, config, files.truth_of(config))
    data = (tmp_path / "reshard-model_part-0.pt").read_bytes()
    (tmp_path / "reshard-model_part-0.pt").unlink()
    for shard in range(2):
        (tmp_path / f"reshard-model_part-0-shard{shard}.pt").write_bytes(data)
    assert "expected flat tensors in 2 shards, got named ones" in refusal(tmp_path)


def save_named(folder, change, parts=2):
    """Unflattened parts, of which the last has been changed by `change(model)`."""
    config = files.config_of(parts)
    files.save_unflattened(folder, config, files.truth_of(config), parts)
    path = max(folder.iterdir())
    saved = torch.load(path, weights_only=False)
    change(saved["model"])
    torch.save(saved, path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.pop(NORM), f"reshard-model_part-1.pt: {NORM}: missing, though part 0 has it"),
        (lambda m: m.update(extra=m[NORM]), "reshard-model_part-1.pt: extra: there, though part 0 lacks it"),
        (lambda m: m.update({NORM: m[NORM][:-1]}), f"{NORM}: expected float16 (66,), as in part 0, got float16 (65,)"),
        (lambda m: m.update({BIAS: m[BIAS].float()}), f"{BIAS}: expected float16 (66,), as in part 0, got float32"),
    ],
)
def test_parts_that_are_not_alike_are_refused(tmp_path, change, problem):
    save_named(tmp_path, change)
    assert problem in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.ffn_layernorm.weight",
        "decoder.layers.0.self_attn.attn_ln.weight",
        "decoder.layers.0.self_attn.c_attn",
        "decoder.embed_positions._float_tensor",
        "decoder.layers.00.fc1.bias",
        "decoder.layers.0.fc1.bias\n",
        "decoder.alibi",
        "encoder.layers.0.fc1.weight",
        "../../decoder.layer_norm.bias",
        "model.decoder.embed_tokens.weight",
    ],
)
def test_weights_that_opt_does_not_have_are_refused_by_name(tmp_path, name):
    save_named(tmp_path, lambda model: model.update({name: torch.zeros(3)}), parts=1)
    assert f"{ascii(name)[1:-1]}: not a weight of OPT in metaseq" in refusal(tmp_path)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("change", [lambda head: head + 1, lambda head: head[:, :-1], lambda head: head.repeat(99, 1)])
def test_a_head_that_is_neither_the_embedding_nor_its_first_rows_is_refused(tmp_path, change, parts):
    config = files.config_of(parts)
    files.save_resharded(tmp_path, config, files.truth_of(config), parts)
    path = max(tmp_path.iterdir())
    saved = torch.load(path, weights_only=False)
    name = "decoder.output_projection.weight"
    saved["model"][name] = change(saved["model"][name]).contiguous()
    torch.save(saved, path)
    assert f"{name}: expected" in refusal(tmp_path)


def test_weights_that_are_no_floats_are_refused(tmp_path):
    save_named(tmp_path, lambda model: model.update({BIAS: model[BIAS].to(torch.int8)}), parts=1)
    assert f"{BIAS}: expected a dtype of float64" in refusal(tmp_path)


def test_the_empty_file_that_resharding_flat_files_leaves_is_refused(tmp_path):
    model = files.version(torch.float16)
    torch.save({"cfg": files.cfg_of(files.config_of()), "model": model}, tmp_path / "reshard.pt")
    assert "expected the weights of a model, got none" in refusal(tmp_path)


def test_groups_of_layers_must_be_alike(tmp_path):
    def change(model):
        for name in [name for name in model if ".layers." in name]:
            model[re.sub(r"layers\.(\d)", lambda m: f"layers.{int(m[1]) // 2}.layers.{int(m[1]) % 2}", name)] = model[
                name
            ]
            del model[name]

    save_named(tmp_path, change, parts=1)
    assert "decoder.layers: expected groups of equally many layers" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(decoder_layers=2), "decoder.layers.2.flat_param_0: neither"),
        (dict(decoder_layers=4), "decoder.layers.3.flat_param_0: missing"),
        (dict(decoder_ffn_embed_dim=36), "decoder.layers.0.flat_param_0: expected"),
        (dict(decoder_ffn_embed_dim=35), "ffn_dim: expected a multiple of 2 parts"),
        (dict(decoder_attention_heads=33), "num_attention_heads: expected a multiple of 2 parts"),
        (dict(tokens_per_sample=39), "and a multiple of 8 rows more"),
        (dict(tokens_per_sample=10**6), "and a multiple of 8 rows more"),
        (dict(tokens_per_sample=None), "max_target_positions: missing"),
        (dict(decoder_embed_dim=72), "flat_param_0: expected"),
        (dict(share_decoder_input_output_embed=False), "tie_word_embeddings: expected True for flat tensors"),
    ],
)
def test_a_flat_file_must_have_exactly_the_elements_of_its_settings(tmp_path, settings, problem):
    config = files.config_of(2)
    files.save_flat(tmp_path, config, files.truth_of(config), 2, **settings)
    assert problem in refusal(tmp_path)


def test_a_flat_file_whose_order_nothing_tells_is_refused(tmp_path):
    config = files.config_of()
    files.save_flat(tmp_path, config, files.truth_of(config), arch=None, _name=None)
    assert "cfg.model.arch: missing" in refusal(tmp_path)


def test_a_flat_file_without_settings_asks_for_a_config(tmp_path):
    config = files.config_of(2)
    truth = files.truth_of(config)
    files.save_flat(tmp_path, config, truth, 2)
    for path in tmp_path.iterdir():
        torch.save({"model": torch.load(path, weights_only=False)["model"]}, path)
    assert "give a config" in refusal(tmp_path)
    assert_holds(metaseq.open_parts(tmp_path, config), files.parts_of(truth, config, 2))


# -- damage and payloads ----------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("branch", ["model", "cfg", "args", "shard_metadata", "extra_state", "last_optimizer_state"])
def test_a_payload_never_runs_and_is_named(tmp_path, branch, protocol):
    canary = tmp_path / "executed"
    config = files.config_of()
    files.save_unflattened(tmp_path, config, files.truth_of(config))
    (path,) = tmp_path.iterdir()
    saved = torch.load(path, weights_only=False)
    saved[branch] = {**(saved.get(branch) or {}), "decoder.x": Payload(os.system, f"touch {canary}")}
    torch.save(saved, path, pickle_protocol=protocol)
    if branch in ("model", "cfg", "args", "shard_metadata"):
        message = refusal(tmp_path)
        assert f"{branch}.decoder.x: the pickle asks for posix.system" in message
    else:
        assert "posix.system" in metaseq.open_parts(tmp_path).unknown
    assert not canary.exists()
    pickle.loads(pickle.dumps(saved[branch]["decoder.x"]))
    assert canary.exists()  # it would have


def test_settings_that_cannot_be_read_need_not_be_where_a_config_is_given(tmp_path):
    config = files.config_of(2)
    truth = files.truth_of(config)
    more = {"policy": files.instance_of("metaseq.policies", "Policy")}
    files.save_unflattened(tmp_path, config, truth, 2, **more)
    message = refusal(tmp_path)
    assert "cfg.model.policy: the pickle asks for metaseq.policies.Policy" in message
    assert "give a config" in message
    opened = metaseq.open_parts(tmp_path, config)
    assert_holds(opened, files.parts_of(truth, config, 2))
    assert opened.settings is None
    assert "metaseq.policies.Policy" in opened.unknown


def test_what_was_passed_over_is_reported(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    assert metaseq.open_parts(tmp_path).unknown == ("metaseq.data.cache.LockingArray",)


def test_a_damaged_byte_is_found_by_its_checksum_when_asked(tmp_path):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    path = max(tmp_path.iterdir())
    data = bytearray(path.read_bytes())
    data[data.index(bytes_of(torch.load(path, weights_only=False)["model"]["flat_param_0"])) + 100] ^= 4
    path.write_bytes(data)
    metaseq.open_parts(tmp_path)
    assert "the bytes are damaged" in refusal(tmp_path, verify=True)


@pytest.mark.parametrize("cut", [1, 500, 30_000])
def test_a_truncated_shard_is_refused(tmp_path, cut):
    config = files.config_of()
    files.save_raw(tmp_path, config, files.truth_of(config))
    path = max(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-cut])
    assert f"{path.name}: damaged or truncated" in refusal(tmp_path)


def test_no_single_damaged_byte_does_more_than_raise_our_error(tmp_path):
    config = files.config_of(num_hidden_layers=1)
    files.save_restored(tmp_path, config, files.truth_of(config))
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    generator = np.random.default_rng(5)
    positions = [*generator.integers(9000, size=150), *(len(good) - 1 - generator.integers(4000, size=50))]
    refused = 0
    for position in positions:
        path.write_bytes(good[:position] + bytes([generator.integers(256)]) + good[position + 1 :])
        try:
            opened = metaseq.open_parts(tmp_path)
            metaseq.config_of(opened)
        except (CheckpointError, ConfigError):
            refused += 1
    assert 50 < refused < len(positions)
