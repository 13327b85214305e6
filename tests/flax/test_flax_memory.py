"""Loading without copies, and construction without memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from harness import config_of, save_random, token_ids

from conversion import open_checkpoint
from opt_core import OPTConfig
from opt_core.schema import head_names, parameter_count, shapes
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification, FlaxOPTModel

WIDE = dict(vocab_size=97, hidden_size=64, ffn_dim=96, num_attention_heads=2)  # tensors of whole 64 bytes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_in_the_stored_dtype_shares_the_pages_of_the_file(tmp_path, dtype, monkeypatch):
    config = config_of(**WIDE)
    checkpoint = open_checkpoint(save_random(tmp_path, config, dtype=dtype))
    arrays = {name: checkpoint.read(name) for name in shapes(config)}
    monkeypatch.setattr("conversion.pretrained.open_checkpoint", lambda *args, **kwargs: checkpoint)
    model = FlaxOPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
    aligned = [name for name, array in arrays.items() if array.ctypes.data % 64 == 0]
    assert len(aligned) == len(arrays)
    for name in aligned:
        assert model.weight(name).unsafe_buffer_pointer() == arrays[name].ctypes.data, name


def test_training_a_loaded_model_leaves_the_file_as_it_was(tmp_path):
    """Donated parameters are overwritten; the map is private."""
    config = config_of(**WIDE)
    save_random(tmp_path, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = FlaxOPTForCausalLM.from_pretrained(tmp_path)
    state = nnx.state(model)
    descend = jax.jit(
        lambda state: jax.tree.map(lambda x: x - 1 if x.dtype == jnp.float32 else x, state), donate_argnums=0
    )
    jax.block_until_ready(descend(state))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert np.isfinite(FlaxOPTForCausalLM.from_pretrained(tmp_path)(token_ids(config)).logits).all()


@pytest.mark.slow
def test_the_largest_size_is_built_without_memory():
    config = OPTConfig.preset("opt-175b")
    model = nnx.eval_shape(lambda: FlaxOPTModel(config, dtype=jnp.bfloat16))
    assert model.num_parameters() == parameter_count(config, "base")
    assert model.dtype == jnp.bfloat16


@pytest.mark.parametrize("task", [FlaxOPTForSequenceClassification, FlaxOPTForQuestionAnswering])
def test_a_new_head_follows_the_seed(tmp_path, task):
    save_random(tmp_path, config_of())
    name = head_names(task.task)[0]
    options = ({}, {}, dict(rngs=nnx.Rngs(11)))
    heads = [np.asarray(task.from_pretrained(tmp_path, **some).weight(name)) for some in options]
    assert (heads[0] == heads[1]).all()
    assert (heads[0] != heads[2]).any()
    assert 0 < heads[0].std() < 0.04


def test_dropout_of_a_loaded_model_follows_the_seed(tmp_path):
    config = config_of(dropout=0.3)
    save_random(tmp_path, config)

    def draws(**options) -> np.ndarray:
        model = FlaxOPTForCausalLM.from_pretrained(tmp_path, **options)
        model.train()
        return np.asarray(model(token_ids(config)).logits)

    assert (draws() == draws()).all()
    assert (draws() != draws(rngs=nnx.Rngs(7))).any()
