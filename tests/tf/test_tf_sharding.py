"""A model on a mesh of devices computes what the reference does, each device with its parts of the weights alone."""

from pathlib import Path

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, mask_named, reference_of, save_random, worst_row
from processes import module_of, run_processes

from opt_core.reference import causal_lm_loss
from opt_core.schema import parameter_count
from opt_core.sharding import Mesh, local_shapes

WORKER = Path(__file__).parent / "workers" / "compute_on_mesh.py"
MESHES = ("tensor=2", "fsdp=2,tensor=2", "data=2,tensor=2", "fsdp=2")
FLOAT32 = BOUND["float32"] * ROUNDOFF["float32"]

script = module_of(WORKER)
IDS, MASK = script.IDS, mask_named("left")


def computed_on(folder: Path, *meshes: str) -> dict[str, np.ndarray]:
    for name, config in script.CONFIGS.items():
        save_random(folder / name, config)
    run_processes(WORKER, 1, folder, *meshes, timeout=500)
    return dict(np.load(folder / "found.npz"))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory) -> dict[str, np.ndarray]:
    """What two devices got along `tensor`, and what only this asks."""
    return computed_on(tmp_path_factory.mktemp("two"), MESHES[0])


@pytest.fixture(scope="module")
def on_others(tmp_path_factory) -> dict[str, np.ndarray]:
    return computed_on(tmp_path_factory.mktemp("others"), *MESHES[1:])


@pytest.fixture(params=[MESHES[0], *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in MESHES[1:])])
def found(request) -> tuple[Mesh, dict[str, np.ndarray]]:
    """What the devices of a mesh got."""
    text = request.param
    found = request.getfixturevalue("on_two" if text == MESHES[0] else "on_others")
    return Mesh.parse(text), of_case(found, text)


def of_case(found: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{case}/"): x for name, x in found.items() if name.startswith(f"{case}/")}


@pytest.mark.parametrize("variant", script.CONFIGS)
def test_outputs_and_loss_on_a_mesh_are_those_of_the_reference(variant, found):
    got, reference = of_case(found[1], variant), reference_of(script.CONFIGS[variant])
    want = reference(IDS, MASK)
    logits = reference.logits(want.last_hidden_state)
    assert worst_row(got["logits"], logits) < FLOAT32
    assert got["loss"] == pytest.approx(causal_lm_loss(logits, IDS, MASK), rel=FLOAT32)
    for i, x in enumerate(want.hidden_states):
        assert worst_row(got[f"hidden {i}"], x) < FLOAT32
    for i, x in enumerate(want.attentions):
        np.testing.assert_allclose(got[f"attention {i}"], x, atol=FLOAT32)


@pytest.mark.parametrize("variant", script.CONFIGS)
def test_greedy_tokens_on_a_mesh_are_those_of_the_reference(variant, found):
    config = script.CONFIGS[variant]
    reference, ids, mask, has_ended_B1 = reference_of(config), IDS, MASK, np.zeros((len(IDS), 1), bool)
    for _ in range(6):
        new_B1 = reference.logits(reference(ids, mask).last_hidden_state[:, -1:]).argmax(-1)
        new_B1 = np.where(has_ended_B1, config.pad_token_id, new_B1)
        has_ended_B1 |= new_B1 == config.eos_token_id
        ids, mask = np.concatenate([ids, new_B1], 1), np.pad(mask, [(0, 0), (0, 1)], constant_values=1)
    np.testing.assert_array_equal(of_case(found[1], variant)["tokens"], ids)


@pytest.mark.parametrize("variant", script.CONFIGS)
def test_each_device_has_its_parts_of_the_weights_alone_and_the_file_is_read_once(variant, found):
    mesh, config = found[0], script.CONFIGS[variant]
    parts = of_case(found[1], f"{variant} parts")
    assert parts.keys() == local_shapes(config, mesh).keys()
    for name, shape in local_shapes(config, mesh).items():
        np.testing.assert_array_equal(parts[name], [shape] * mesh.devices, err_msg=name)
    assert of_case(found[1], variant)["bytes"] == 4 * parameter_count(config)


def test_documents_and_cached_tokens_on_a_mesh(found):
    mesh, config = found[0], script.CONFIGS["350m style"]
    got, reference = of_case(found[1], "in parts"), reference_of(config)
    documents = reference(IDS, segment_ids=script.SEGMENTS).last_hidden_state
    assert worst_row(got["documents"], reference.logits(documents)) < FLOAT32
    whole = reference.logits(reference(IDS).last_hidden_state)
    assert worst_row(got["after a cache"], whole[:, 9:]) < FLOAT32
    rows = len(IDS) // max(mesh.size("data"), mesh.size("fsdp"))
    np.testing.assert_array_equal(got["part of a cache"], [rows, 4 // mesh.size("tensor"), 9, 14])
    assert got["parts of a cache"] == mesh.devices


def test_every_way_out_of_a_mesh_and_into_one_keeps_the_weights(on_two):
    saved = of_case(on_two, "saved")
    assert saved["equal"].all()
    np.testing.assert_array_equal(saved["logits"], saved["wanted"])


@pytest.mark.parametrize("task", script.HEADS)
def test_a_new_head_on_a_mesh_is_that_of_a_single_device(task, on_two):
    got = of_case(on_two, f"new heads/{task}")
    np.testing.assert_allclose(got["mesh"], got["single"], rtol=0, atol=1e-5)
    assert np.abs(got["single"]).max() > 1e-4


REFUSED = {
    "training": "training: expected False",
    "in a function": "expected a call outside of functions",
    "in a model": "expected a call outside of functions",
    "an id out of range": "input_ids: expected 0 to 93",
    "a label out of range": "labels: expected 0 to 93",
    "predict": "expected a call outside of functions",
    **dict.fromkeys(("evaluate", "Trainer", "add_lora", "prune_heads", "export"), "expected one on no mesh"),
    **dict.fromkeys(("resize_token_embeddings", "resize_position_embeddings"), "expected one on no mesh"),
    "twice": "expected one that is on no mesh",
    "adapters": "expected one without adapters",
    "what does not divide": "3 problems",
    "a device, too": "expected one of them, got 2",
    "too many devices": "expected 8 of kind CPU, got 2",
    "no such device": "expected one of CPU, GPU, TPU",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_on_a_mesh_cannot_do_is_refused(case, on_two):
    assert REFUSED[case] in str(on_two[f"refused/{case}"])
