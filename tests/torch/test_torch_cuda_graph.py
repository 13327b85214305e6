"""Greedy search by a recorded step. On a CPU the recording is a double, which runs the step again."""

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch
from harness import config_of, load_backend, token_ids

from opt_torch import cuda_graph, generation

GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


@pytest.fixture
def recordings(monkeypatch) -> list:
    """One entry for each recording."""
    made, real = [], cuda_graph.record_graph

    def record(step, device):
        made.append(step)
        if torch.device(device).type == "cuda":
            return real(step, device)
        for _ in range(cuda_graph.WARM_UP_RUNS):
            step()
        out = step()  # the tensor that every run renews
        return lambda: out.copy_(step())

    monkeypatch.setattr(cuda_graph, "record_graph", record)
    return made


def both_ways(model, monkeypatch, *args, **options) -> tuple[np.ndarray, np.ndarray]:
    """Tokens by recorded steps, and by steps that are not."""
    out = []
    for records in (True, False):
        monkeypatch.setattr(generation, "_records_steps", lambda device, records=records: records)
        out.append(model.generate(*args, **options).cpu().numpy())
    return out[0], out[1]


def model_on(device: str, dtype: str = "float32", **changes):
    config = config_of(max_position_embeddings=211, **changes)
    return load_backend("torch").random_model(config, dtype=dtype).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", [3, 0])
def test_recorded_steps_give_the_same_tokens(device, layers, recordings, monkeypatch):
    model = model_on(device, num_hidden_layers=layers)
    ids_BT, mask_BT = token_ids(model.config), np.ones((4, 13), int)
    mask_BT[1, :7] = 0
    recorded, stepped = both_ways(model, monkeypatch, ids_BT, mask_BT, 31, eos_token_id=())
    assert recorded.shape == (4, 44)
    assert (recorded == stepped).all()
    assert len(recordings) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_recorded_steps_give_the_same_tokens_in_half_precision(device, dtype, recordings, monkeypatch):
    model = model_on(device, dtype, hidden_size=128, num_attention_heads=2)
    recorded, stepped = both_ways(model, monkeypatch, token_ids(model.config), None, 31, eos_token_id=())
    assert (recorded == stepped).all()
    assert len(recordings) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_step_outlives_the_mode_it_was_recorded_in(device, first, then, recordings, monkeypatch):
    """A tensor made in inference mode cannot be written to outside of it."""
    model = model_on(device)
    ids_BT = token_ids(model.config)
    for mode in (first, then):
        with mode():
            recorded, stepped = both_ways(model, monkeypatch, ids_BT, None, 11, eos_token_id=())
        assert (recorded == stepped).all()
    assert len(recordings) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_recorded_once_for_each_shape(device, recordings, monkeypatch):
    """Prompts and lengths of one bucket share it, and no text of an earlier call is left in it."""
    model = model_on(device)
    for length, new_tokens in ((13, 31), (29, 11), (5, 40)):
        ids_BT = token_ids(model.config, length=length, seed=length)
        recorded, stepped = both_ways(model, monkeypatch, ids_BT, None, new_tokens, eos_token_id=())
        assert (recorded == stepped).all()
    assert len(recordings) == 1
    both_ways(model, monkeypatch, token_ids(model.config, length=61), None, 31, eos_token_id=())
    both_ways(model, monkeypatch, token_ids(model.config, batch=3), None, 31, eos_token_id=())
    assert len(recordings) == 3


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_recorded_anew_where_weights_have_moved(device, recordings, monkeypatch):
    model = model_on(device)
    ids_BT = token_ids(model.config)
    both_ways(model, monkeypatch, ids_BT, None, 7, eos_token_id=())
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight.mul_(3)  # in place: the graph reads the new values
    recorded, stepped = both_ways(model, monkeypatch, ids_BT, None, 7, eos_token_id=())
    assert (recorded == stepped).all()
    assert len(recordings) == 1
    moved = torch.nn.Parameter(model.model.decoder.layers[1].fc1.weight.detach() * -2)
    model.model.decoder.layers[1].fc1.weight = moved
    recorded, stepped = both_ways(model, monkeypatch, ids_BT, None, 7, eos_token_id=())
    assert (recorded == stepped).all()
    assert len(recordings) == 2
    model.set_attn_implementation("eager")
    both_ways(model, monkeypatch, ids_BT, None, 7, eos_token_id=())
    assert len(recordings) == 3


def test_a_recorded_step_does_not_keep_its_model(recordings, monkeypatch):
    model = model_on("cpu")
    both_ways(model, monkeypatch, token_ids(model.config), None, 7)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


class Wrapped(torch.nn.Module):
    """As PEFT does it: a switch in Python."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, x):
        return self.inside(x)


def with_a_hook(layer):
    layer.fc1.register_forward_hook(lambda module, args, out: None)


def with_a_wrapper(layer):
    layer.fc1 = Wrapped(layer.fc1)


@pytest.mark.parametrize("change", [with_a_hook, with_a_wrapper, "autocast"])
def test_what_a_replay_would_leave_out_is_not_recorded(recordings, monkeypatch, change):
    model, ids_BT = model_on("cpu"), token_ids(config_of(max_position_embeddings=211))
    if change != "autocast":
        change(model.model.decoder.layers[1])
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        recorded, stepped = both_ways(model, monkeypatch, ids_BT, None, 7, eos_token_id=())
    assert (recorded == stepped).all()
    assert recordings == []


def test_a_model_of_a_class_of_ones_own_is_recorded(recordings, monkeypatch):
    model = model_on("cpu")
    model.__class__ = type("Mine", (type(model),), {"__module__": "mine"})
    both_ways(model, monkeypatch, token_ids(model.config), None, 7, eos_token_id=())
    assert len(recordings) == 1


def test_a_step_is_recorded_on_the_device_of_its_model(monkeypatch):
    """Not on the current one: its graph would be empty."""
    current, seen = ["cuda:0"], []

    @contextlib.contextmanager
    def device(name):
        current.append(str(name))
        yield
        current.pop()

    class Made:
        def __init__(self, *args):
            seen.append(current[-1])

        def wait_stream(self, stream): ...

        def replay(self): ...

    fakes = dict(device=device, Stream=Made, CUDAGraph=Made, current_stream=Made)
    graph_options: dict = {}

    def graph(made, **options):
        graph_options.update(options)
        return contextlib.nullcontext()

    fakes |= dict(stream=contextlib.nullcontext, graph=graph)
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    replay = cuda_graph.record_graph(lambda: seen.append(current[-1]), torch.device("cuda:1"))
    replay()
    assert set(seen) == {"cuda:1"}
    assert isinstance(graph_options["stream"], Made)  # of this device; PyTorch's own is of the first one
    assert len(seen) == 4 + cuda_graph.WARM_UP_RUNS + 1  # two current streams, one stream, one graph


def test_nothing_is_recorded_on_a_cpu(recordings):
    model = model_on("cpu")
    model.generate(token_ids(model.config), None, 7)
    assert recordings == []


@pytest.mark.parametrize(("setting", "records"), [(None, True), ("1", True), ("0", False)])
def test_an_environment_variable_turns_recording_off(setting, records, monkeypatch):
    monkeypatch.delenv("OPT_TORCH_CUDA_GRAPHS", raising=False)
    if setting is not None:
        monkeypatch.setenv("OPT_TORCH_CUDA_GRAPHS", setting)
    assert generation._records_steps(torch.device("cuda")) is records
