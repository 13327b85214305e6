"""Training as users of Flax write it, and the Trainer: optax alone and by a recipe, Orbax, what is overwritten."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from harness import ROUNDOFF, config_of, load_backend, reference_of, token_ids

from opt_core.errors import TrainingError
from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe, adamw_step
from opt_core.reference import IGNORED_LABEL, causal_lm_loss
from opt_core.schema import shapes
from opt_flax import training
from opt_flax.layers import Dropout
from opt_flax.lora import add_lora, merge_lora
from opt_flax.optimization import make_optimizer
from opt_flax.training import Trainer

RECIPE = TrainingRecipe(learning_rate=0.01, warmup_steps=2, total_steps=7)
CONFIG = dict(num_hidden_layers=1)


def model_of(**changes):
    return load_backend("flax").random_model(config_of(**{**CONFIG, **changes}))


def batch_of(model, rows: int = 4) -> dict[str, np.ndarray]:
    ids = token_ids(model.config, rows)
    return dict(input_ids=ids, labels=np.where(np.random.default_rng(3).random(ids.shape) < 0.4, IGNORED_LABEL, ids))


def values_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(model.weight(name)) for name in shapes(model.config, model.task)}


@nnx.jit
def descend(model, optimizer, batch):
    """A step as Flax's documentation writes it."""
    loss, gradients = nnx.value_and_grad(lambda model: model(**batch).loss)(model)
    optimizer.update(model, gradients)
    return loss


def test_the_recipes_optimizer_takes_the_steps_of_the_reference():
    model = model_of()
    optimizer, batch = make_optimizer(model, RECIPE), {k: jnp.asarray(x) for k, x in batch_of(model).items()}
    weights, moments = values_of(model), None
    for step in range(3):
        _, gradients = load_backend("flax").loss_and_gradients(model, **batch)
        truth = adamw_step(RECIPE, step, weights, gradients, moments)
        descend(model, optimizer, batch)
        weights, moments = truth.weights, truth.moments
        got = values_of(model)
        for name, want in weights.items():
            if not name.endswith("k_proj.bias"):  # its gradient is rounding alone, which Adam makes a step of
                np.testing.assert_allclose(got[name], want, atol=RECIPE.learning_rate * 1e-3, err_msg=name)


def test_any_optax_optimizer_trains_a_model():
    model = model_of()
    optimizer, batch = nnx.Optimizer(model, optax.lion(1e-3), wrt=nnx.Param), batch_of(model)
    losses = [float(descend(model, optimizer, batch)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01


def test_orbax_keeps_the_state_of_a_training(tmp_path):
    """Model and optimizer go into a checkpoint and come back: the next step is that of an unbroken run."""
    ocp = pytest.importorskip("orbax.checkpoint")

    def start():
        model = model_of(dropout=0.2)
        model.train()
        return model, make_optimizer(model, RECIPE)

    model, optimizer = start()
    batch = batch_of(model)
    descend(model, optimizer, batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(nnx.state((model, optimizer))))
        checkpointer.wait_until_finished()
        want = descend(model, optimizer, batch)
        model, optimizer = start()
        state = nnx.state((model, optimizer))
        nnx.replace_by_pure_dict(state, checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(state)))
        nnx.update((model, optimizer), state)
    assert descend(model, optimizer, batch) == want


# -- the Trainer ------------------------------------------------------------------------------------------------------


def test_a_step_is_compiled_once_for_batches_of_one_shape():
    model = model_of(dropout=0.1)
    trainer, before = Trainer(model, RECIPE), training._gradients._cache_size()
    for seed in range(3):
        ids = token_ids(model.config, seed=seed)
        trainer.step(dict(input_ids=ids, attention_mask=np.ones_like(ids), labels=ids))
        trainer.evaluate(dict(input_ids=ids, labels=ids))
    assert training._gradients._cache_size() == before + 1


def test_a_step_writes_weights_and_moments_over_the_old_ones():
    model = model_of(vocab_size=499)
    trainer, batch = Trainer(model, RECIPE), batch_of(model)
    graphdef, trained, rest = nnx.split(model, model.trainable, ...)
    optimizer, moments = nnx.split(trainer.optimizer)
    arguments = graphdef, optimizer, trained, moments, rest, trained  # gradients are arrays as the weights are
    memory = training._update.lower(*arguments).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((trained, moments)))
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held / 4  # no copy of either moment
    pointers = {name: model.weight(name).unsafe_buffer_pointer() for name in shapes(model.config)}
    trainer.step(batch)
    assert all(model.weight(name).unsafe_buffer_pointer() == pointer for name, pointer in pointers.items())


def test_models_that_shared_their_arrays_with_one_in_training_keep_them():
    model = model_of()
    twin = nnx.clone(model)
    before = values_of(twin)
    Trainer(model, RECIPE).step(batch_of(model))
    for name, want in before.items():
        np.testing.assert_array_equal(twin.weight(name), want)
    assert any((values_of(model)[name] != want).any() for name, want in before.items())


def test_a_loss_that_is_not_finite_changes_nothing():
    model = model_of()
    trainer, batch = Trainer(model, RECIPE), batch_of(model)
    trainer.step(batch)
    model.model.decoder.final_layer_norm.weight[0] = np.nan
    before = jax.tree.map(np.array, nnx.state((model, trainer.optimizer), nnx.Not(nnx.RngState)))
    with pytest.raises(TrainingError, match="step 1: expected finite numbers, got a loss of nan"):
        trainer.step(batch)
    after = nnx.state((model, trainer.optimizer), nnx.Not(nnx.RngState))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert trainer.step_count == 1


def test_a_resumed_run_repeats_the_unbroken_one(tmp_path):
    changes = dict(dropout=0.3, attention_dropout=0.3, layerdrop=0.3)
    trainer = Trainer(model_of(**changes), RECIPE, seed=5)
    batch = batch_of(trainer.model)
    trainer.step(batch)
    trainer.save(tmp_path)
    want = [trainer.step(batch) for _ in range(3)]
    resumed = Trainer(model_of(**changes), RECIPE)
    resumed.restore(tmp_path)
    assert [resumed.step(batch) for _ in range(3)] == want
    assert resumed.step_count == 4


def test_dropout_follows_the_seed_and_the_step():
    def first_losses(seed: int) -> list[float]:
        trainer = Trainer(model_of(dropout=0.3), TrainingRecipe(learning_rate=0), seed=seed)
        return [trainer.step(batch_of(trainer.model)) for _ in range(2)]

    assert first_losses(1) == first_losses(1)
    assert len({*first_losses(1), *first_losses(2)}) == 4


def test_a_batch_in_parts_takes_the_step_of_the_whole():
    """Each part weighs as much as it has labels that count."""
    whole, parts = (Trainer(model_of(), RECIPE, accumulate=n) for n in (1, 2))
    batch = batch_of(whole.model)
    batch["labels"][:2, 5:] = IGNORED_LABEL
    for _ in range(2):
        assert parts.step(batch) == pytest.approx(whole.step(batch), rel=1e-6)
        assert parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-5)
    with pytest.raises(ValueError, match="batch: expected rows in 2 equal parts"):
        parts.step({name: x[:3] for name, x in batch.items()})


def test_what_a_compiled_step_cannot_refuse_is_refused_before_it():
    trainer = Trainer(model_of(), RECIPE)
    batch = batch_of(trainer.model)
    batch["labels"][0, 0] = 97
    with pytest.raises(ValueError, match="labels: expected 0 to 96"):
        trainer.step(batch)
    batch["input_ids"][1, 2] = -1
    with pytest.raises(ValueError, match=r"input_ids: .* row 1, column 2"):
        trainer.step(batch)


# -- bfloat16 and dropout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("recomputes", [False, True])
def test_float32_weights_are_trained_in_bfloat16(attn_implementation, recomputes):
    """Of the loss, float32 itself as the gradients are, no more is lost than bfloat16 rounds away."""
    config, jax_backend = config_of(**CONFIG), load_backend("flax")
    options = dict(attn_implementation=attn_implementation, compute_dtype=jnp.bfloat16)
    exact, model = jax_backend.random_model(config), jax_backend.random_model(config, **options)
    assert (model.dtype, model.compute_dtype) == (jnp.float32, jnp.bfloat16)
    batch = batch_of(model)
    out = model(**batch)
    assert (out.loss.dtype, out.logits.dtype) == (jnp.float32, jnp.bfloat16)
    reference = reference_of(config)
    truth = causal_lm_loss(reference.logits(reference(batch["input_ids"]).last_hidden_state), batch["labels"])
    assert float(out.loss) == pytest.approx(truth, rel=16 * ROUNDOFF["bfloat16"])
    model.train()
    if recomputes:
        model.gradient_checkpointing_enable()
    gradients = nnx.grad(lambda model: model(**batch).loss)(model)
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    _, want = jax_backend.loss_and_gradients(exact, **batch)
    _, got = jax_backend.loss_and_gradients(model, **batch)
    for name, x in want.items():
        if not name.endswith("k_proj.bias"):  # rounding alone
            assert 0 < np.linalg.norm(got[name] - x) < 0.1 * np.linalg.norm(x), name


def test_a_step_in_bfloat16_changes_float32_weights():
    """By less than bfloat16 could say: the weights are not rounded to what is computed with."""
    model = load_backend("flax").random_model(config_of(**CONFIG), compute_dtype=jnp.bfloat16)
    before, trainer = values_of(model), Trainer(model, TrainingRecipe(learning_rate=1e-6, weight_decay=0))
    trainer.step(batch_of(model))
    for name, x in values_of(model).items():
        assert x.dtype == np.float32
        if not name.endswith("k_proj.bias"):
            assert 0 < np.abs(x - before[name]).max() < 2e-6, name


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_its_share_of_the_values_and_their_mean(rate, dtype):
    """Within five standard deviations; what it kept, the gradient keeps, and no mask is another one."""
    ones = jnp.ones((3, 101, 67), dtype)
    y, pull_back = jax.vjp(lambda x: Dropout(rate, rngs=nnx.Rngs(0))(x), ones)
    kept, deviation = 1 - rate, (rate * (1 - rate) / ones.size) ** 0.5
    assert (y != 0).mean() == pytest.approx(kept, abs=5 * deviation)
    assert y.dtype == dtype
    scale = float(y.max())
    assert scale == pytest.approx(1 / kept, rel=max(2**-12, ROUNDOFF[str(ones.dtype)]))
    np.testing.assert_array_equal(np.unique(np.asarray(y, np.float32)), [0, scale])
    np.testing.assert_array_equal(pull_back(ones)[0], y)
    both = ((y != 0) & (Dropout(rate, rngs=nnx.Rngs(1))(ones) != 0)).mean()
    assert both == pytest.approx(kept**2, abs=5 * (kept**2 * (1 - kept**2) / ones.size) ** 0.5)


def test_neighbours_are_dropped_independently_of_each_other():
    """Two values share a random word."""
    kept = np.asarray(Dropout(0.5, rngs=nnx.Rngs(0))(jnp.ones(100_003))) != 0
    for distance in (1, 2, 3):
        same = (kept[distance:] == kept[:-distance]).mean()
        assert same == pytest.approx(0.5, abs=5 * 0.5 / len(kept) ** 0.5)


def test_dropout_of_one_leaves_nothing_and_of_zero_all():
    x = jnp.arange(1.0, 8.0)
    np.testing.assert_array_equal(Dropout(1.0, rngs=nnx.Rngs(0))(x), 0 * x)
    np.testing.assert_array_equal(Dropout(0.0)(x), x)
    calm = Dropout(0.5, rngs=nnx.Rngs(0))
    calm.eval()
    np.testing.assert_array_equal(calm(x), x)


def test_a_gradient_keeps_four_bytes_of_a_value_that_dropout_saw():
    """XLA on a CPU (jax 0.10) keeps what the bits are made of, for nnx.Dropout 8 bytes."""
    config = config_of(num_hidden_layers=4, hidden_size=96, num_attention_heads=4, ffn_dim=101, word_embed_proj_dim=96)

    def held(rate: float) -> int:
        model = load_backend("flax").random_model(config.replace(dropout=rate))
        model.train()
        split, ids = nnx.split(model, model.trainable, ...), jnp.asarray(token_ids(config, 64))
        arguments = *split, dict(input_ids=ids, labels=ids), np.zeros(2, np.uint32), 1
        return training._gradients.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    values = 2 * 4 * 96 * token_ids(config, 64).size
    assert held(0.3) - held(0) < 5 * values


# -- adapters ---------------------------------------------------------------------------------------------------------

LORA = LoraConfig(r=3, lora_alpha=7, target_modules=("q_proj", "v_proj", "fc1"))


def test_optax_trains_adapters_alone_by_the_type_of_their_variables():
    model = model_of()
    before, ids = values_of(model), jnp.asarray(token_ids(model.config))
    untouched = np.asarray(model(ids).logits)
    add_lora(model, LORA)
    np.testing.assert_array_equal(model(ids).logits, untouched)
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        only = nnx.DiffState(0, nnx.LoRAParam)
        loss, gradients = nnx.value_and_grad(lambda model: model(ids, labels=ids).loss, argnums=only)(model)
        optimizer.update(model, gradients)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.01
    for name, want in before.items():
        np.testing.assert_array_equal(model.weight(name), want)
    adapted = np.asarray(model(ids).logits)
    merge_lora(model)
    np.testing.assert_allclose(model(ids).logits, adapted, atol=1e-5)
    assert model.trainable is nnx.Param


def test_a_step_on_adapters_makes_no_gradients_of_the_weights():
    """Their products are left out: far fewer operations, and no memory for gradients or moments."""
    plain, adapted = model_of(vocab_size=499), model_of(vocab_size=499)
    add_lora(adapted, LORA)
    batch, work = batch_of(plain), []
    for model in (plain, adapted):
        split = nnx.split(model, model.trainable, ...)
        arguments = *split, Trainer(model, RECIPE)._checked(batch), np.zeros(2, np.uint32), 1
        work.append(training._gradients.lower(*arguments).compile().cost_analysis()["flops"])
    assert work[1] < 0.8 * work[0]


def test_flaxs_own_lora_wraps_our_modules():
    model = model_of()
    ids, attention = jnp.asarray(token_ids(model.config)), model.model.decoder.layers[0].self_attn
    want = np.asarray(model(ids).logits)
    width = model.config.hidden_size
    attention.q_proj = nnx.LoRA(width, 3, width, base_module=attention.q_proj, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model(ids).logits, want, atol=64 * ROUNDOFF["float32"] * np.abs(want).max())
    optimizer = nnx.Optimizer(model, optax.adam(0.01), wrt=nnx.LoRAParam)
    only = nnx.DiffState(0, nnx.LoRAParam)
    loss, gradients = nnx.value_and_grad(lambda model: model(ids, labels=ids).loss, argnums=only)(model)
    optimizer.update(model, gradients)
    assert float(model(ids, labels=ids).loss) < float(loss)
