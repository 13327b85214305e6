"""A model cut over processes computes what it computes whole, on every mesh; what cannot be cut is refused by all."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, mask_named, reference_of, save_random, worst_row
from processes import module_of, run_processes

from opt_core.schema import shapes
from opt_core.sharding import Mesh, batch_rows, partition, shard_bytes, shard_slices

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

WORKER = Path(__file__).parent / "workers" / "shard_model.py"
FLOAT32 = BOUND["float32"] * ROUNDOFF["float32"]

worker = module_of(WORKER)
SLOW = {2: (), 4: pytest.mark.slow}  # by the number of processes
each_mesh = pytest.mark.parametrize(
    "text", [pytest.param(text, marks=SLOW[n]) for n, texts in worker.MESHES.items() for text in texts]
)
each_case = pytest.mark.parametrize(
    ("text", "variant"),
    [
        pytest.param(text, variant, marks=SLOW[n])
        for n, texts in worker.MESHES.items()
        for text in texts
        for variant in worker.VARIANTS_ON[n]
    ],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    for variant, config in worker.CONFIGS.items():
        save_random(folder / "models" / variant, config)
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What the processes left, each of them; those of one number are started once, when first asked for."""

    @functools.cache
    def left_by(processes: int) -> tuple[list[dict], list[dict]] | AssertionError:
        try:
            run_processes(WORKER, processes, folder, timeout=500)
        except AssertionError as error:
            return error  # once for all tests
        files = [folder / f"{processes}.{rank}" for rank in range(processes)]
        arrays = [dict(np.load(f"{file}.npz")) for file in files]
        return arrays, [json.loads(Path(f"{file}.json").read_text()) for file in files]

    def of_case(text: str, case: str | None = None) -> list[dict]:
        """Of each process: arrays of a case by name, or the messages of what was refused."""
        left = left_by(Mesh.parse(text).devices)
        if isinstance(left, AssertionError):
            raise left
        arrays, refused = left
        if case is None:
            return [messages[text] for messages in refused]
        prefix = f"{text}/{case}/"
        return [{name.removeprefix(prefix): own[name] for name in own if name.startswith(prefix)} for own in arrays]

    return of_case


@pytest.fixture(scope="module")
def whole(folder):
    """The same of one process."""
    load = functools.cache(lambda variant: worker.OPTForCausalLM.from_pretrained(folder / "models" / variant))

    @functools.cache
    def computed(what: str, variant: str, parts: int = 1) -> dict[str, np.ndarray]:
        if what == "outputs":
            return worker.outputs(load(variant))
        if what == "generations":
            return worker.generations(load(variant), load("pre-norm") if variant == "350m style" else None)
        model = worker.OPTForCausalLM.from_pretrained(folder / "models" / variant).double()
        rows = Mesh(("data",), (parts,))
        return worker.differentiated(model, [batch_rows(len(worker.IDS), rows, (part,)) for part in range(parts)])

    return computed


@each_case
def test_logits_are_within_the_bound_of_float64(found, text, variant):
    reference = reference_of(worker.CONFIGS[variant])
    inputs = {
        "plain": {},
        "padded": dict(attention_mask=mask_named("holes")),
        "documents": dict(segment_ids=worker.SEGMENTS),
    }
    truth = {name: reference.logits(reference(worker.IDS, **x).last_hidden_state) for name, x in inputs.items()}
    for arrays in found(text, variant):
        for name, logits in truth.items():
            assert worst_row(arrays[name], logits) <= FLOAT32, name


@each_case
def test_a_call_returns_what_one_process_returns(found, whole, text, variant):
    """All heads' attentions, hidden states, logits under a mask of heads, of documents, and behind a cache."""
    want = whole("outputs", variant)
    for arrays in found(text, variant):
        for name, x in want.items():
            assert arrays[name].shape == x.shape
            assert worst_row(arrays[name], x) <= 2 * FLOAT32, name


@each_case
def test_every_strategy_writes_the_same_tokens_on_every_process(found, whole, text, variant):
    want = whole("generations", variant)
    every = found(text, variant)
    for arrays in every:
        for name, tokens in want.items():
            np.testing.assert_array_equal(arrays[name], tokens, err_msg=name)
        np.testing.assert_array_equal(arrays["unseeded"], every[0]["unseeded"])


@each_case
def test_losses_gradients_and_steps_of_an_optimizer_are_those_of_one_process(found, whole, text, variant):
    """In float64, which leaves no room for a sum that is forgotten; FSDP averages over processes with other rows."""
    mesh = Mesh.parse(text)
    want, every = whole("gradients", variant, mesh.size("data") * mesh.size("fsdp")), found(text, variant)
    largest = max(np.linalg.norm(x) for name, x in want.items() if name.startswith("0/") and name != "0/loss")
    for name in want.keys() - {"gradient of the head mask"}:
        if name.endswith("/loss"):
            assert np.mean([arrays[name] for arrays in every]) == pytest.approx(want[name], rel=1e-12), name
            continue
        bound = 1e-10 if name.startswith("after/") else 1e-12  # Adam divides what is 0 but for rounding by 1e-8
        for arrays in every:
            assert np.linalg.norm(arrays[name] - want[name]) <= bound * largest, name
    name = "gradient of the head mask"  # which is no parameter: each process has that of its rows
    heads = np.mean([arrays[name] for arrays in every], axis=0)
    assert np.linalg.norm(heads - want[name]) <= 1e-12 * np.linalg.norm(want[name])


@each_case
def test_a_process_reads_and_holds_its_own_slices_alone(found, text, variant):
    """FSDP cuts everything: a bias that the table leaves whole along `fsdp` is cut beyond it."""
    mesh, config = Mesh.parse(text), worker.CONFIGS[variant]
    specs, shape_of = partition(config, mesh), shapes(config)
    for rank, arrays in enumerate(found(text, variant)):
        read = 0
        for name, spec in specs.items():
            own, table = arrays[f"slices/{name}"], shard_slices(shape_of[name], spec, mesh, mesh.coordinates(rank))
            table = np.array([(s.start, s.stop) for s in table])
            assert ((own[:, 0] >= table[:, 0]) & (own[:, 1] <= table[:, 1])).all(), name
            if "fsdp" in spec or mesh.size("fsdp") == 1:
                np.testing.assert_array_equal(own, table, err_msg=name)
            read += 4 * int(np.prod(own[:, 1] - own[:, 0]))
        assert arrays["bytes read"] == read <= shard_bytes(config, mesh, item_bytes=4)


@each_case
def test_what_is_saved_is_what_was_loaded(found, folder, text, variant):
    found(text, variant)
    saved, original = (
        worker.OPTForCausalLM.from_pretrained(place / variant) for place in (folder / "saved" / text, folder / "models")
    )
    for name in shapes(original.config):
        assert torch.equal(saved.weight(name), original.weight(name)), name


@each_mesh
def test_a_head_that_the_checkpoint_lacks_is_drawn_once_for_all(found, folder, text):
    want = worker.with_new_head(folder)
    for arrays in found(text, "heads"):
        for name, x in want.items():
            assert np.linalg.norm(arrays[name] - x) <= 2 * FLOAT32 * np.linalg.norm(x), name


def test_rules_may_cut_less(found, folder):
    model = worker.OPTForCausalLM.from_pretrained(folder / "models" / "pre-norm")
    with torch.no_grad():
        want = model(worker.IDS, labels=worker.LABELS)
    for arrays in found("tensor=2", "rules"):
        assert arrays.keys() == {"A", "F", "V", "A's loss", "F's loss", "V's loss"}
        for name, x in arrays.items():
            if name.endswith("loss"):
                assert x == pytest.approx(want.loss.numpy(), rel=FLOAT32)
            else:
                assert worst_row(x, want.logits.numpy()) <= 2 * FLOAT32, name


@each_mesh
def test_what_cannot_be_done_is_refused_on_every_process(found, text):
    axis = "tensor" if "tensor" in text else "fsdp"
    expected = {
        "sizes": ("ffn_dim: expected a multiple of", "got 13"),
        "twice": ("shard_model: model: expected one that is not sharded, got one over",),
        "adapters": ("merge_lora",),
        "placed": ("shard_model: model: expected one on one device",),
        "rules": ("rules: expected A, F, V alone along 'tensor', got 'D'",) if text == "tensor=2" else ("axis",),
        "processes": ("fsdp 3: processes: expected 3, got",),
        "device": ("device, device_mesh",),
        "inputs": ("generate: arguments: expected the same on all processes, got others than process 0 on 1",),
        "options": ("generate: arguments: expected the same on all processes",),
        "seeds": ("generate: arguments: expected the same on all processes",),
        "one process": ("input_ids: expected 0 to 91",),
        "time": ("generate: max_time",),
        "resize": ("resize_token_embeddings: model: expected one that is not sharded",),
        "positions": ("resize_position_embeddings: model: expected one that is not sharded",),
        "prune": ("prune_heads: model: expected one that is not sharded",),
        "add_lora": ("add_lora: model: expected one that is not sharded",),
        "push": ("push_to_hub: model",),
        "save": ("FileExistsError", "expected a folder, got a file"),
        "write": ("the disk is gone",),
    }
    if axis == "tensor":
        expected["sizes"] += ("num_attention_heads: expected a multiple of 2", "vocab_size: expected a multiple of 2")
    for rank, messages in enumerate(found(text)):
        assert messages.keys() == expected.keys()
        for name, parts in expected.items():
            assert all(part in messages[name] for part in parts), (rank, name, messages[name])


def test_a_mesh_without_its_processes_is_refused(monkeypatch):
    from opt_torch.sharding import init_mesh

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(worker.InputError, match=r"RANK: expected as torchrun sets it, got none"):
        init_mesh("tensor=2")
