"""Every published size, by shape only: the modules of each backend ask for exactly the weights of the schema."""

import pytest
from harness import backends_asked_for, load_backend

from opt_core import OPTConfig
from opt_core.presets import PRESETS
from opt_core.schema import published_name, shapes

SMALL = ("opt-125m", "opt-350m", "galactica-125m")


@pytest.mark.parametrize("preset", PRESETS)
def test_torch_modules_have_the_shapes_of_the_schema(request, preset):
    backend = _only(request, "torch")
    torch, config = backend.torch, OPTConfig.preset(preset)
    with torch.device("meta"):
        model = backend.model_class()(config)
    got = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert got == _expected(config)


@pytest.mark.parametrize(
    "preset",
    [pytest.param(it, marks=pytest.mark.slow if PRESETS[it]["num_hidden_layers"] > 64 else ()) for it in PRESETS],
)
def test_flax_modules_have_the_shapes_of_the_schema(request, preset):
    backend = _only(request, "flax")
    nnx, config = backend.nnx, OPTConfig.preset(preset)
    model = nnx.eval_shape(lambda: backend.model_class()(config, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    got = {".".join(map(str, path)): tuple(leaf.shape) for path, leaf in flat}
    assert got == _expected(config)


@pytest.mark.parametrize("preset", SMALL)
def test_tf_modules_have_the_shapes_of_the_schema(request, preset):
    backend = _only(request, "tf")
    config = OPTConfig.preset(preset)
    model = backend.model_class()(config)
    got = {published_name(name): tuple(model.weight(name).shape) for name in shapes(config)}
    assert got == _expected(config)
    assert len(model.weights) == len(got)


def _expected(config: OPTConfig) -> dict[str, tuple[int, ...]]:
    return {published_name(name): shape for name, shape in shapes(config).items()}


def _only(request, name: str):
    if name not in backends_asked_for(request.config):
        pytest.skip(f"{name} is not among --backends")
    return load_backend(name)
