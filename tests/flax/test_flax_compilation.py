"""What is compiled, and how often; the models inside a user's own `nnx.jit`, `jax.jit` and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from harness import config_of, load_backend, mask_named, token_ids

from opt_core.generation import BUCKET
from opt_flax import FlaxOPTForCausalLM, generation
from opt_flax.attention import eager_attention


@pytest.fixture(scope="module")
def model() -> FlaxOPTForCausalLM:
    return load_backend("flax").random_model(config_of(max_position_embeddings=199, num_hidden_layers=2))


def generate(model, T: int, new: int, batch: int = 2, **options) -> np.ndarray:
    return np.asarray(model.generate(token_ids(model.config, batch, T), max_new_tokens=new, **options))


@pytest.fixture
def compilations():
    """The number of compilations so far of prefill and of decoding, as a function."""
    return lambda: (generation._prefill._cache_size(), generation._decode._cache_size())


def test_another_length_in_the_same_bucket_compiles_nothing(model, compilations):
    generate(model, 5, 7)
    before = compilations()
    generate(model, 11, 3)
    generate(model, 1, BUCKET - 1)
    generate(model, 13, 7, eos_token_id=5, pad_token_id=3)
    assert compilations() == before
    generate(model, 5, BUCKET)  # the prompt fits the same bucket, the cache does not
    assert compilations() == (before[0] + 1, before[1] + 1)


def test_models_of_the_same_config_share_what_is_compiled(model, compilations):
    generate(model, 5, 7)
    before = compilations()
    other = FlaxOPTForCausalLM(model.config.replace())
    generate(other, 5, 7)
    assert other.training
    assert compilations() == before


def test_decoding_writes_the_cache_in_place(model):
    """Two buffers per layer go in and come out as the same memory, and no step copies one."""
    graphdef, state = nnx.split(model)
    cache = model.init_cache(2, 3 * BUCKET)
    logits_BV, eos = jnp.zeros((2, model.config.vocab_size)), np.array([2], np.int32)
    compiled = generation._decode.lower(graphdef, state, logits_BV, cache, eos, 1, 5).compile()
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(cache))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes


def test_calls_compiled_by_the_user_equal_plain_ones(model):
    ids, mask = jnp.asarray(token_ids(model.config)), jnp.asarray(mask_named("holes"))
    plain = model(ids, attention_mask=mask, labels=ids, output_attentions=True, output_hidden_states=True)
    with_nnx = nnx.jit(
        lambda model, ids, mask: model(
            ids, attention_mask=mask, labels=ids, output_attentions=True, output_hidden_states=True
        )
    )(model, ids, mask)
    graphdef, state = nnx.split(model)
    with_jax = jax.jit(
        lambda state, ids, mask: nnx.merge(graphdef, state)(
            ids, attention_mask=mask, labels=ids, output_attentions=True, output_hidden_states=True
        )
    )(state, ids, mask)
    for compiled in (with_nnx, with_jax):
        assert type(compiled.past_key_values) is type(plain.past_key_values)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), compiled, plain)


def test_gradients_are_the_same_plain_compiled_and_functional(model):
    ids = jnp.asarray(token_ids(model.config))
    plain = nnx.grad(lambda model: model(ids, labels=ids).loss)(model)
    compiled = nnx.jit(nnx.grad(lambda model: model(ids, labels=ids).loss))(model)
    graphdef, state = nnx.split(model)
    functional = jax.grad(lambda state: nnx.merge(graphdef, state)(ids, labels=ids).loss)(state)
    for other in (compiled, functional):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), plain, other)


def test_training_steps_draw_other_dropout_each_time():
    model = FlaxOPTForCausalLM(
        config_of(dropout=0.3, layerdrop=0.3, attention_dropout=0.3, num_hidden_layers=1), rngs=nnx.Rngs(3)
    )
    ids = jnp.asarray(token_ids(model.config))
    compiled = nnx.jit(lambda model: model(ids, labels=ids).loss)
    for step in (compiled, lambda model: model(ids, labels=ids).loss):
        assert len({float(step(model)) for _ in range(3)}) == 3
    model.eval()
    assert compiled(model) == compiled(model)


def test_attention_dropout_differs_between_heads_and_rows():
    """Equal heads and equal rows in; the published Flax class drops the same weights in all of them."""
    q_BNTH = jnp.zeros((2, 3, 11, 7))
    values = jnp.broadcast_to(jnp.eye(11, 7), (2, 3, 11, 7))
    heads, weights = eager_attention(q_BNTH, q_BNTH, values, None, nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    assert (heads[0] != heads[1]).any()
    assert (heads[:, 0] != heads[:, 1]).any()


@pytest.mark.parametrize("wrong", ["an id beyond the vocabulary", "a negative id", "a position", "a negative position"])
def test_out_of_range_in_a_compiled_function_gives_nan(model, wrong):
    """A gather that clamps or wraps would give plausible numbers."""
    ids = token_ids(model.config)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
    changed, value = {
        "an id beyond the vocabulary": (ids, model.config.vocab_size),
        "a negative id": (ids, -1),
        "a position": (positions, model.config.max_position_embeddings),
        "a negative position": (positions, -1),
    }[wrong]
    changed[1, 7] = value
    logits = nnx.jit(lambda model, ids, positions: model(ids, position_ids=positions).logits)(model, ids, positions)
    assert jnp.isnan(logits[1, 7]).all()
    assert jnp.isfinite(logits[0]).all()
    with pytest.raises(ValueError, match="at row 1, column 7"):
        model.check_inputs(ids, position_ids=positions)
    with pytest.raises(ValueError, match="at row 1, column 7"):
        model(ids, position_ids=positions)


def test_an_overfull_cache_in_a_compiled_function_gives_nan(model):
    ids = jnp.asarray(token_ids(model.config, 2, 5))
    step = nnx.jit(lambda model, ids, cache: model(ids, past_key_values=cache))
    out = step(model, ids, model.init_cache(2, 7))
    assert jnp.isfinite(out.logits).all()
    logits = step(model, ids, out.past_key_values).logits
    assert jnp.isfinite(logits[:, :2]).all()
    assert jnp.isnan(logits[:, 2:]).all()


def test_padding_beyond_the_capacity_is_not_an_overfull_cache(model):
    """Compiled, the real tokens count: here 4 and 2 of them follow 3 in a cache of 7."""
    ids = jnp.asarray(token_ids(model.config, 2, 8))
    mask = jnp.asarray([[0, 1, 1, 0, 1], [0, 0, 1, 0, 1]]).at[0, 3].set(1)
    cache = model(ids[:, :3], past_key_values=model.init_cache(2, 7)).past_key_values
    step = nnx.jit(lambda model, ids, mask, cache: model(ids, attention_mask=mask, past_key_values=cache).logits)
    wide = model(ids[:, :3], past_key_values=model.init_cache(2, 11)).past_key_values
    truth = model(ids[:, 3:], attention_mask=mask, past_key_values=wide).logits
    np.testing.assert_allclose(step(model, ids[:, 3:], mask, cache), truth, rtol=1e-4, atol=1e-5)


def test_a_wider_integer_does_not_wrap_into_the_vocabulary(model):
    ids = token_ids(model.config)
    ids[0, 0] = 2**32 + 5
    with pytest.raises(ValueError, match=f"input_ids: .* got {2**32 + 5} at row 0, column 0"):
        model(ids)
    with pytest.raises(ValueError, match="labels: expected 0 to 96"):
        model(token_ids(model.config), labels=ids)
