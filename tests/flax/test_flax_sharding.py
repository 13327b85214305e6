"""A model on a mesh of devices computes what it computes on one, and devices tell each other no more than they must.

On 8 devices of one process and on one of each of two processes, which a worker script starts: how many devices there
are is settled when JAX starts.
"""

import functools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, mask_named, reference_of, rounded_weights, save_random, worst_row
from processes import ROOT, module_of, run_processes

from opt_core.schema import shapes
from opt_core.sharding import Mesh, partition, shard_bytes, shard_slices

WORKER = Path(__file__).parent / "workers" / "shard_model.py"
FLOAT32 = BOUND["float32"] * ROUNDOFF["float32"]

worker = module_of(WORKER)
SQUARE, CUBE = "fsdp=2,tensor=2", "data=2,fsdp=2,tensor=2"
# What is computed where: for each number of processes a mesh, a variant, and parts of the worker script.
QUICK = {
    1: [
        f"{SQUARE}|pre-norm|outputs|gradients|parts|programs|refusals|CUDA",
        f"{CUBE}|350m style|gradients with logits|tokens|parts",
    ],
    2: ["fsdp=2|350m style|outputs|tokens|parts|refusals"],
}
ALL = "outputs|gradients|gradients with logits|recomputed|generations|parts|head|dropout|adapters|edited"
SLOW = {
    1: [
        *(f"{SQUARE}|{variant}|{ALL}" for variant in worker.CONFIGS),
        *(f"{text}|pre-norm|{ALL}" for text in ("fsdp=4", "tensor=2")),
        f"tensor=4,data=2|pre-norm|{ALL.removesuffix('|edited')}",  # of whose four heads two are pruned there
        "tensor=2|pre-norm|programs|kernels|refusals",
        "fsdp=2|pre-norm|programs",
        f"{SQUARE}|untied, without biases|kernels",
    ],
    2: [f"tensor=2|{variant}|outputs|gradients|generations|parts|head|adapters|edited" for variant in worker.CONFIGS],
}


def cases_of(*wanted: str) -> list:
    """Each place where some of these are computed: processes, mesh, variant, and what; slow ones are marked."""
    found = []
    for table, marks in ((QUICK, ()), (SLOW, pytest.mark.slow)):
        for processes, cases in table.items():
            for text, variant, *rest in (case.split("|") for case in cases):
                found += [pytest.param(processes, text, variant, x, marks=marks) for x in rest if x in wanted]
    return found


def each(*wanted: str):
    return pytest.mark.parametrize(("processes", "text", "variant", "what"), cases_of(*wanted))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for variant, config in worker.CONFIGS.items():
        save_random(folder / "models" / variant, config)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each process left: arrays of a case by name, or with `said` something else.

    Computed when it is asked for: the quick ones in one start, each slow case in one of its own.
    """

    @functools.cache
    def of_all(processes: int, *cases: str) -> list[tuple[dict, dict]]:
        file = str(len(list(folder.iterdir())))
        run_processes(WORKER, processes, folder, file, *cases, timeout=500)
        ranks = [folder / f"{file}.{rank}" for rank in range(processes)]
        return [(dict(np.load(f"{rank}.npz")), json.loads(Path(f"{rank}.json").read_text())) for rank in ranks]

    def of_case(processes: int, text: str, variant: str, what: str, said: bool = False) -> list[dict]:
        def having(table: dict) -> list[str]:
            cases = table.get(processes, [])
            return [x for x in cases if x.startswith(f"{text}|{variant}|") and what in x.split("|")]

        every = of_all(processes, *(QUICK[processes] if having(QUICK) else having(SLOW)[:1]))
        prefix = f"{text}|{variant}|"
        if said:
            return [own[prefix + what] if prefix + what in own else own[f"{text}|{what}"] for _, own in every]
        return [
            {name.removeprefix(prefix): x for name, x in own.items() if name.startswith(prefix)} for own, _ in every
        ]

    return of_case


@pytest.fixture(scope="module")
def whole(folder):
    """The same of one device."""
    return functools.cache(lambda variant, what: worker.computed(folder, variant, what))


@each("outputs")
def test_logits_are_within_the_bound_of_float64(found, processes, text, variant, what):
    reference = reference_of(worker.CONFIGS[variant])
    padded = dict(attention_mask=mask_named("holes"), segment_ids=worker.SEGMENTS)
    truth = reference.logits(reference(worker.IDS, **padded).last_hidden_state)
    for arrays in found(processes, text, variant, what):
        assert worst_row(arrays["padded documents"], truth) <= FLOAT32


@each("outputs", "head", "edited")
def test_a_call_returns_what_it_returns_on_one_device(found, whole, processes, text, variant, what):
    """All heads' attentions, hidden states, logits behind a cache, of rows that no mesh divides, of a new head; and of
    a model that has lost heads and got tokens and positions.
    """
    want = whole(variant, what)
    for arrays in found(processes, text, variant, what):
        for name, x in want.items():
            assert arrays[name].shape == x.shape
            assert worst_row(arrays[name], x) <= 2 * FLOAT32, name


@each("gradients", "gradients with logits", "recomputed", "adapters", "dropout")
def test_losses_and_gradients_are_those_of_one_device(found, whole, processes, text, variant, what):
    """Of every weight, or every adapter; and of a loss with dropout, whose masks no mesh changes."""
    want = whole(variant, what)
    largest = max(np.linalg.norm(x) for x in want.values())
    for arrays in found(processes, text, variant, what):
        for name, x in want.items():  # a gradient that is 0 but for rounding has errors of other weights' size
            bound = FLOAT32 * (np.linalg.norm(x) + 0.01 * largest)
            assert np.linalg.norm(arrays[name] - x) <= bound, name


@each("tokens", "generations")
def test_every_strategy_writes_the_same_tokens(found, whole, processes, text, variant, what):
    want = whole(variant, what)
    for arrays in found(processes, text, variant, what):
        for name, tokens in want.items():
            np.testing.assert_array_equal(arrays[name], tokens, err_msg=name)


@each("parts")
def test_a_device_holds_its_own_part_and_no_more_is_read(found, processes, text, variant, what):
    """Loaded or cut in memory, bit by bit the part that the table says; no byte is read for two devices."""
    config, mesh = worker.CONFIGS[variant], Mesh.parse(text)
    tensors, specs = rounded_weights(config), partition(config, mesh)
    for rank, arrays in enumerate(found(processes, text, variant, what)):
        own = range(mesh.devices) if processes == 1 else [rank]
        for number in own:
            for name, spec in specs.items():
                part = tensors[name][shard_slices(tensors[name].shape, spec, mesh, mesh.coordinates(number))]
                for origin in ("", "of memory, "):
                    np.testing.assert_array_equal(arrays[f"{origin}part {number}/{name}"], part, err_msg=name)
        assert not any(f"part {number}/" in name for name in arrays for number in {*range(8)} - {*own})
        stored = sum(x.nbytes for x in tensors.values())
        assert arrays["bytes read"] == (stored if processes == 1 else shard_bytes(config, mesh, item_bytes=4))


@each("parts")
def test_what_is_saved_is_what_was_loaded(found, folder, processes, text, variant, what):
    found(processes, text, variant, what)
    saved = worker.FlaxOPTForCausalLM.from_pretrained(folder / "saved" / text / variant)
    for name, x in rounded_weights(saved.config).items():
        np.testing.assert_array_equal(saved.weight(name), x, err_msg=name)


@each("parts")
def test_a_seed_that_nobody_gave_is_shared(found, processes, text, variant, what):
    first, *others = (arrays["unseeded"] for arrays in found(processes, text, variant, what))
    for tokens in others:
        np.testing.assert_array_equal(tokens, first)


@each("kernels")
def test_fused_kernels_see_the_rows_and_heads_of_a_device(found, processes, text, variant, what):
    (arrays,) = found(processes, text, variant, what)
    for part in ("out", "q", "k", "v"):
        np.testing.assert_allclose(arrays[f"local/{part}"], arrays[f"whole/{part}"], rtol=1e-4, atol=1e-5)


@each("CUDA")
def test_on_gpus_fused_kernels_are_called_for_the_rows_and_heads_of_a_device(found, processes, text, variant, what):
    """4 rows of 13 tokens with 4 heads of 64, in a square of devices."""
    (calls,) = found(processes, text, variant, what, said=True)
    assert {name for name, _ in calls} == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert {shape for _, shape in calls} == {"2x2x14x64"}


# -- what devices tell each other -------------------------------------------------------------------------------------


@each("programs")
def test_along_tensor_two_sums_a_layer_are_all_that_devices_tell_each_other(found, processes, text, variant, what):
    """And one for the embeddings: no activation, no logits and no weight is ever put together (arXiv:1909.08053)."""
    config, mesh = worker.CONFIGS[variant], Mesh.parse(text)
    if mesh.size("tensor") == 1:
        pytest.skip("nothing is cut along tensor")
    (said,) = found(processes, text, variant, what, said=True)
    L, D, V = config.num_hidden_layers, config.hidden_size, config.vocab_size
    B, T = len(worker.IDS) // mesh.size("fsdp"), worker.IDS.shape[1]
    sums = Counter(tuple(shape) for how, shape, _ in said["forward"] if how == "all-reduce")
    embeddings = sums.pop((len(worker.IDS), T, D // mesh.size("fsdp"))) if mesh.size("fsdp") > 1 else 1
    assert embeddings == 1
    assert sums == {(B, T, D): 2 * L + (mesh.size("fsdp") == 1)}
    cut = {name for name, spec in partition(config, mesh).items() if "tensor" in spec}
    matrices = {shape for name, shape in shapes(config).items() if name in cut and len(shape) == 2}
    for name in ("forward", "gradients", "prefill", "steps"):
        for how, shape, _ in said[name]:
            kept = tuple(n for n in shape if n > 1)
            assert kept not in matrices, (name, how, shape)
            assert V not in shape, (name, how, shape)
            if mesh.size("fsdp") == 1 and how != "all-reduce":
                assert (name, math.prod(shape)) == ("steps", 2 * B), (name, how, shape)  # the best token of each part


@each("programs")
def test_weights_cut_over_fsdp_are_gathered_for_use_and_once_more_for_gradients(found, processes, text, variant, what):
    """Of a loop of steps, layers' in every step; and gradients are cut as the weights, but of some that are small."""
    config, mesh = worker.CONFIGS[variant], Mesh.parse(text)
    if mesh.size("fsdp") == 1:
        pytest.skip("nothing is cut along fsdp")
    (said,) = found(processes, text, variant, what, said=True)
    L, D, F = config.num_hidden_layers, config.hidden_size, config.ffn_dim // mesh.size("tensor")
    gathered = {
        name: Counter(
            (tuple(n for n in shape if n > 1), loop) for how, shape, loop in said[name] if how == "all-gather"
        )
        for name in ("forward", "gradients", "steps")
    }
    for shape in ((F, D), (D, F)):
        assert gathered["forward"][shape, False] == L
        assert gathered["gradients"][shape, False] == 2 * L
        assert (gathered["steps"][shape, True], gathered["steps"][shape, False]) == (L, 0)
    assert all("embed_positions" in name or "final_layer_norm" in name for name in said["uncut gradients"])
    assert len(said["uncut gradients"]) <= 3


# -- what is refused --------------------------------------------------------------------------------------------------


@each("refusals")
def test_what_cannot_be_done_is_refused(found, processes, text, variant, what):
    """On every process, before anything has changed."""
    mesh = Mesh.parse(text)
    expected = {
        "sizes": ("ffn_dim: expected a multiple of 2, the devices along", "got 13"),
        "twice": (f"shard_model: model: expected one on a single device, got one on {mesh}",),
        "rules": ("rules: expected letters of the schema, got 'Z'",),
        "axes": ("expected one of the rules', data, fsdp, tensor",),
        "no mesh": ("device_mesh: expected a jax.sharding.Mesh, got str",),
        "device": ("device, device_mesh: expected one of them, got 2",),
        "devices": (f"fsdp 3 x tensor 5: expected as many devices as there are, {8 if processes == 1 else processes}",),
        "save": ("expected a folder, got a file",),
    }
    if mesh.size("tensor") > 1:
        expected["sizes"] += ("num_attention_heads: expected a multiple of 2", "vocab_size: expected a multiple of 2")
        expected["prune"] = ("num_attention_heads in layer 0: expected a multiple of 2", "got 3")
        expected["resize"] = ("vocab_size: expected a multiple of 2", "got 93")
    if processes > 1:
        differ = (
            "generate: arguments: expected the same on all processes, got others, or wrong ones, than process 0 on 1"
        )
        expected |= dict.fromkeys(("inputs", "options", "seeds"), (differ,))
        expected["time"] = ("generate: max_time: expected None",)
        expected["push"] = ("push_to_hub: model: expected one of a single process",)
    for rank, messages in enumerate(found(processes, text, variant, what, said=True)):
        for name, pieces in expected.items():
            assert all(piece in messages[name] for piece in pieces), (rank, name, messages[name])
        if processes > 1:
            assert (differ if rank == 0 else "input_ids: expected 0 to 91") in messages["one process"]


def test_processes_of_torchrun_have_all_its_variables(monkeypatch):
    from opt_flax.sharding import init_mesh

    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(worker.ProblemsError, match=r"(?s)RANK: expected in the .*MASTER_ADDR.*MASTER_PORT"):
        init_mesh("tensor=2")


@pytest.mark.slow
def test_torchrun_starts_the_processes_of_a_mesh(tmp_path):
    """Its own store listens on MASTER_PORT."""
    pytest.importorskip("torch")
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\nimport jax\nfrom opt_flax.sharding import init_mesh\n"
        "mesh = init_mesh('fsdp=2')\n"
        "(pathlib.Path(sys.argv[1]) / f'rank-{jax.process_index()}').write_text(str(mesh.devices.size))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_text() for path in tmp_path.glob("rank-*")} == {"rank-0": "2", "rank-1": "2"}
