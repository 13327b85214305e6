"""A model over several memories, `device_map`: it computes what it would in one, wherever its weights wait."""

import gc
import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import SIZES, config_of, mask_named, rounded_weights, save_random, token_ids

from conversion import open_checkpoint, write_checkpoint
from opt_core.errors import CheckpointError, InputError, MissingFrameworkError
from opt_core.lora import LoraConfig
from opt_core.schema import shapes
from opt_torch import OPTForCausalLM, OPTForSequenceClassification, OPTModel, offloading
from opt_torch.lora import add_lora
from opt_torch.training import Trainer

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

MIXED = {
    "model.decoder": "cpu",
    "model.decoder.embed_tokens": "disk",
    "model.decoder.layers.1": "disk",
    "model.decoder.layers.2": "disk",
    "lm_head": "cpu",
}
MAPS = {"mixed": MIXED, "all on disk": "disk", "embeddings here": {"": "disk", "model.decoder.embed_tokens": "cpu"}}
FORMATS = ["safetensors", "torch-bin", "flax-safetensors", "tf-h5", "flax-msgpack", "tf-checkpoint"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("plain"), config_of())


def plain_of(folder, **options):
    """The model in memory; without gradients, for which attention in half precision computes in float32."""
    return OPTForCausalLM.from_pretrained(folder, **options).requires_grad_(False)


def spread(folder, device_map=MIXED, **options):
    return OPTForCausalLM.from_pretrained(folder, device_map=device_map, **options)


# -- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", MAPS)
@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head", "norms without weights"])
def test_logits_tokens_and_loss_are_those_of_the_model_in_memory(tmp_path, variant, places):
    config = config_of(variant)
    save_random(tmp_path, config)
    plain, model = plain_of(tmp_path), spread(tmp_path, MAPS[places])
    ids = token_ids(config)
    for name in ("none", "left"):
        given = dict(input_ids=ids, attention_mask=mask_named(name), labels=ids)
        for _ in range(2):  # the hooks leave everything as they found it
            expected, got = plain(**given), model(**given)
            assert torch.equal(got.logits, expected.logits)
            torch.testing.assert_close(got.loss, expected.loss)
    assert torch.equal(model.generate(ids, max_new_tokens=7), plain.generate(ids, max_new_tokens=7))


@pytest.mark.parametrize(
    "options",
    [
        dict(num_beams=3),
        dict(do_sample=True, seed=5, top_k=11),
        dict(num_beams=2, do_sample=True, seed=5),
        dict(penalty_alpha=0.6, top_k=4),
        dict(prompt_lookup_num_tokens=3),
    ],
    ids=str,
)
def test_every_strategy_gives_the_same_tokens(folder, options):
    ids = token_ids(config_of())
    texts = [m.generate(ids, max_new_tokens=7, **options) for m in (plain_of(folder), spread(folder))]
    assert torch.equal(*texts)


def test_a_cache_goes_on_and_hidden_states_and_attentions_are_the_same(folder):
    ids, plain, model = token_ids(config_of()), plain_of(folder), spread(folder)
    outs = []
    for it in (plain, model):
        first = it(ids[:, :5], past_key_values=it.init_cache(len(ids), 13), use_cache=True)
        second = it(
            ids[:, 5:], past_key_values=first.past_key_values, output_hidden_states=True, output_attentions=True
        )
        outs.append((second.logits, *second.hidden_states, *second.attentions))
    assert all(torch.equal(*pair) for pair in zip(*outs, strict=True))


@pytest.mark.parametrize("keeps_copies", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_any_format_and_dtype_wait_on_disk(tmp_path, format, dtype, keeps_copies):
    config = config_of()
    save_random(tmp_path / "a", config, format=format)
    options = dict(dtype=dtype, offload_folder=tmp_path / "copies" if keeps_copies else None)
    model, ids = spread(tmp_path / "a", **options), token_ids(config)
    copies = list(tmp_path.glob("copies/*"))
    lie_ready = dtype == "float32" and format in ("safetensors", "torch-bin", "tf-checkpoint")
    assert bool(copies) == (keeps_copies and not lie_ready)
    assert torch.equal(model(ids).logits, plain_of(tmp_path / "a", dtype=dtype)(ids).logits)
    del model
    gc.collect()
    assert not any(path.exists() for path in copies)


def test_values_that_the_dtype_cannot_hold_are_named_when_they_are_needed(tmp_path):
    name, config = "decoder.layers.1.fc1.bias", config_of()
    weights = rounded_weights(config)
    weights[name][3] = 1e6
    write_checkpoint(tmp_path, config, weights)
    model = spread(tmp_path, dtype="float16")
    message = rf"{name}: expected values within the range of float16, got 1e\+06"
    with pytest.raises(CheckpointError, match=message):
        model(token_ids(config))
    with pytest.raises(CheckpointError, match=message):
        spread(tmp_path, dtype="float16", offload_folder=tmp_path / "copies")
    gc.collect()
    assert not list(tmp_path.glob("copies/*"))


def test_a_tied_head_is_read_with_the_embeddings_and_counted_once(folder):
    plain, model = OPTForCausalLM.from_pretrained(folder), spread(folder)
    assert model.hf_device_map["lm_head"] == "disk"
    for _ in range(2):
        assert model.num_parameters() == plain.num_parameters()
        model(token_ids(config_of()))


def test_a_head_that_no_file_has_stays_in_memory(folder):
    model = OPTForSequenceClassification.from_pretrained(folder, device_map="disk", num_labels=3)
    ids = token_ids(config_of())
    model.score._hf_hook.weights_map["weight"].fill_(2)
    logits = model(ids, attention_mask=np.ones_like(ids)).logits
    hidden = OPTModel.from_pretrained(folder)(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(logits, 2 * hidden.sum(-1, keepdim=True).expand(-1, 3))


def test_the_base_model_is_spread_by_its_own_names(folder):
    ids, model = token_ids(config_of()), OPTModel.from_pretrained(folder, device_map={"decoder": "disk"})
    expected = OPTModel.from_pretrained(folder)(ids).last_hidden_state
    assert torch.equal(model(ids).last_hidden_state, expected)


# -- where things go --------------------------------------------------------------------------------------------------


def test_the_map_tells_each_layers_place_and_the_model_says_where_tokens_go(folder):
    model = spread(folder)
    assert model.hf_device_map == {
        "model.decoder.embed_tokens": "disk",
        "model.decoder.embed_positions": "cpu",
        "model.decoder.layers.0": "cpu",
        "model.decoder.layers.1": "disk",
        "model.decoder.layers.2": "disk",
        "model.decoder.final_layer_norm": "cpu",
        "lm_head": "disk",
    }
    assert model.get_input_embeddings().weight.is_meta
    assert (model.device, model.dtype, model.model.device) == (torch.device("cpu"), torch.float32, torch.device("cpu"))
    assert not any(p.is_meta for p in model.model.decoder.layers[0].parameters())
    assert all(p.is_meta for p in model.model.decoder.layers[1].parameters())


def test_auto_fills_the_memory_that_it_may_and_leaves_the_rest_on_disk(folder):
    model = spread(folder, "auto", max_memory={"cpu": "100KB"})
    of_layers = [model.hf_device_map[f"model.decoder.layers.{layer}"] for layer in range(3)]
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert of_layers == sorted(of_layers)  # "cpu" before "disk": the first layers first
    kept = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert 0 < kept < 100_000


@pytest.mark.parametrize("how", [*offloading.AUTOMATIC, "cpu", torch.device("cpu"), {"": "cpu"}])
def test_a_model_that_fits_is_an_ordinary_one(folder, how):
    model, plain = spread(folder, how), OPTForCausalLM.from_pretrained(folder)
    assert model.hf_device_map == {"": "cpu"}
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), plain.parameters(), strict=True))
    model.resize_token_embeddings(101)


def test_nothing_is_read_of_what_stays_on_disk_until_it_is_needed(folder):
    model, info = spread(folder, output_loading_info=True)
    kept = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert info["bytes_read"] == kept
    whole = sum(4 * np.prod(shape) for shape in shapes(config_of()).values())
    assert kept < whole / 2


def test_between_devices_hidden_states_move_on_and_results_come_back():
    """Two devices that PyTorch pretends to have: it checks that the tensors of every operation are on one."""
    accelerate = pytest.importorskip("accelerate")
    from torch._subclasses.fake_tensor import FakeTensorMode

    pretended = FakeTensorMode()
    pretended.allow_meta = True
    here, there = torch.device("meta"), torch.device("cpu")
    with pretended, torch.no_grad():
        with here:
            model = OPTForCausalLM(config_of("350m style", tie_word_embeddings=False)).eval()
        places = dict(zip(offloading.units_of(model), itertools.cycle((here, there)), strict=False))
        for path, place in places.items():
            for module in model.get_submodule(path).modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device=place)))
        offload = dict.fromkeys(places, False)
        accelerate.hooks.attach_align_device_hook_on_blocks(model, {**places, "": here}, offload)
        offloading.return_to_inputs(model, places)
        ids = torch.zeros(2, 5, dtype=torch.int64, device=here)
        out = model.model.decoder(ids, use_cache=True, output_hidden_states=True, output_attentions=True)
        results = [model.logits(out.last_hidden_state), *out.hidden_states, *out.attentions]
        assert {x.device for x in results} == {here}
        for _ in range(2):
            assert [keys.device for keys in out.past_key_values.keys] == [there, here, there]
            out = model.model.decoder(ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        assert out.last_hidden_state.device == here


# -- saving -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_the_whole_model(folder, tmp_path):
    spread(folder).save_pretrained(tmp_path)
    with open_checkpoint(folder) as expected, open_checkpoint(tmp_path) as saved:
        saved.check(expected.config)
        for name in expected.shapes:
            np.testing.assert_array_equal(saved.read(name), expected.read(name))


def test_it_is_not_saved_over_the_files_that_it_reads(tmp_path):
    model = spread(save_random(tmp_path, config_of()))
    with pytest.raises(InputError, match=f"folder: expected another than {tmp_path}"):
        model.save_pretrained(tmp_path)
    spread(tmp_path, "cpu").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="written to or replaced since it was opened"):
        model(token_ids(config_of()))


# -- refusals ---------------------------------------------------------------------------------------------------------

WRONG = [
    (dict(device_map="atuo"), ["device_map: expected one of auto, .*, a dict, or .*, got 'atuo'"]),
    (dict(device_map=True), ["device_map: expected one of .*, got True"]),
    (
        dict(device_map={"": "cpu", "lm_head": "meta", "model": -1}),
        [r"device_map\['lm_head'\]: ", r"device_map\['model'\]: "],
    ),
    (dict(device_map={"model": "disk", "head": "cpu"}), ["'head': there is no such module", "lm_head: missing"]),
    (dict(device_map={"": "cpu", "model.decoder.layers.1.fc1": "disk"}), [r"layers\.1: expected one place for all"]),
    (dict(device_map="cpu", max_memory={"cpu": 1}), ["max_memory: expected it beside a device_map of auto"]),
    (dict(max_memory={"cpu": 1}), ["max_memory: expected it beside a device_map"]),
    (
        dict(device_map="auto", max_memory={"cpu": "much", "tape": 5}),
        [
            r"max_memory\['cpu'\]: expected bytes or a text such as '10GB', got 'much'",
            "max_memory: expected .* got 'tape'",
        ],
    ),
    (dict(device_map="auto", device="cpu"), ["device, device_map: expected one of them, got 2"]),
]


@pytest.mark.parametrize(("options", "problems"), WRONG, ids=str)
def test_what_is_wrong_with_the_places_is_one_error_with_all_of_it(folder, options, problems):
    with pytest.raises(InputError) as caught:
        OPTForCausalLM.from_pretrained(folder, **options)
    for problem in problems:
        assert any(re.search(problem, line) for line in caught.value.problems), caught.value


def test_without_accelerate_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(MissingFrameworkError, match=r"pip install opt-zoo\[offload\]"):
        spread(folder, "auto")
    OPTForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.resize_token_embeddings(101),
        lambda model: model.resize_position_embeddings(50),
        lambda model: model.prune_heads({0: [1]}),
        lambda model: add_lora(model, LoraConfig()),
        lambda model: Trainer(model),
    ],
)
def test_what_changes_weights_is_refused(folder, change):
    with pytest.raises(InputError, match="device_map"):
        change(spread(folder))


# -- larger than memory -----------------------------------------------------------------------------------------------

RUN = """
import json, sys
from pathlib import Path
import accelerate, numpy as np, torch
from opt_torch import OPTForCausalLM

def peak():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024

folder, out, limit, dtype = sys.argv[1:]
ids = np.load(f"{folder}/ids.npy")

def run(folder, limit):
    model = OPTForCausalLM.from_pretrained(folder, device_map="auto", max_memory={"cpu": limit}, dtype=dtype)
    return model, model(ids).logits, model.generate(ids, max_new_tokens=3)

run(f"{folder}/small", 1000)  # libraries, and what is made once
before = peak()
model, logits, tokens = run(folder, int(limit))
grown = peak() - before
np.savez(out, logits=logits.detach().float().numpy(), tokens=tokens.numpy(), grown=grown,
         on_disk=[place == "disk" for place in model.hf_device_map.values()])
"""
LARGE = dict(SIZES, hidden_size=512, ffn_dim=2048, num_attention_heads=4, num_hidden_layers=12)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_model_larger_than_its_memory_computes_the_same_in_it(tmp_path, dtype):
    config = config_of(**LARGE)
    save_random(tmp_path, config)
    save_random(tmp_path / "small", config_of())
    np.save(tmp_path / "ids.npy", token_ids(config, 2, 7))
    item_bytes = 4 if dtype == "float32" else 2
    whole = sum(item_bytes * int(np.prod(shape)) for shape in shapes(config).values())
    layer, limit = whole // 12, whole // 4
    done = subprocess.run(
        [sys.executable, "-c", RUN, tmp_path, tmp_path / "out.npz", str(limit), dtype], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    seen = np.load(tmp_path / "out.npz")
    assert seen["on_disk"].sum() >= 8
    assert seen["grown"] < limit + 3 * layer + (10 << 20) < whole * 0.75
    model, ids = plain_of(tmp_path, dtype=dtype), np.load(tmp_path / "ids.npy")
    np.testing.assert_array_equal(seen["logits"], model(ids).logits.float().numpy())
    np.testing.assert_array_equal(seen["tokens"], model.generate(ids, max_new_tokens=3).numpy())
