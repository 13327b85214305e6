"""The recipe of training: its schedule, what is decayed, and the float64 step against PyTorch's own optimizer."""

import math

import numpy as np
import pytest
from harness import config_of

from opt_core.errors import ConfigError
from opt_core.lora import LoraConfig, adapter_shapes
from opt_core.optimization import TrainingRecipe, adamw_step, is_decayed
from opt_core.schema import shapes, weights
from opt_core.synthetic import random_tensors

STEPS = np.arange(40)


def test_the_rate_rises_on_a_line_and_falls_on_a_line_to_its_final_fraction():
    recipe = TrainingRecipe(learning_rate=7e-3, warmup_steps=5, total_steps=23, final_fraction=0.3)
    rates = recipe.learning_rate_at(STEPS)
    assert rates[0] == pytest.approx(7e-3 / 5)
    assert rates[4] == pytest.approx(7e-3)
    assert np.allclose(np.diff(rates[:5]), 7e-3 / 5)
    assert np.allclose(np.diff(rates[4:23]), -0.7 * 7e-3 / 18)
    assert np.allclose(rates[22:], 0.3 * 7e-3)


def test_without_an_end_the_rate_stays():
    assert np.all(TrainingRecipe(learning_rate=0.5).learning_rate_at(STEPS) == 0.5)
    assert np.all(TrainingRecipe(learning_rate=0.5, warmup_steps=3).learning_rate_at(STEPS)[2:] == 0.5)


def test_a_schedule_without_warm_up_falls_from_the_first_step():
    rates = TrainingRecipe(learning_rate=1.0, total_steps=10, final_fraction=0.0).learning_rate_at(STEPS[:10])
    assert np.allclose(rates, 1 - (STEPS[:10] + 1) / 10)


def test_a_recipe_survives_the_trip_through_a_dictionary():
    recipe = TrainingRecipe(warmup_steps=3, total_steps=17, max_gradient_norm=None, beta2=0.99)
    assert TrainingRecipe.from_dict(recipe.to_dict()) == recipe


def test_every_wrong_number_comes_in_one_error():
    wrong = dict(learning_rate=-1, warmup_steps=1.5, total_steps=0, final_fraction=2, beta1=1, beta2="no")
    wrong |= dict(epsilon=0, weight_decay=math.nan, max_gradient_norm=0)
    with pytest.raises(ConfigError) as caught:
        TrainingRecipe(**wrong)
    assert {problem.partition(":")[0] for problem in caught.value.problems} == set(wrong)


def test_warm_up_may_not_outlast_the_training_and_unknown_fields_are_named():
    with pytest.raises(ConfigError, match="total_steps: expected at least the 7 steps of warm-up, got 5"):
        TrainingRecipe(warmup_steps=7, total_steps=5)
    with pytest.raises(ConfigError, match=r"here: 2 problems\n  - momentum: not a field of a recipe\n  - beta1:"):
        TrainingRecipe.from_dict({"momentum": 0.9, "beta1": 2}, source="here")


# -- decay ------------------------------------------------------------------------------------------------------------


def test_matrices_and_embeddings_are_decayed_and_vectors_are_not():
    config = config_of("350m style", tie_word_embeddings=False, num_hidden_layers=12)
    for task in ("causal-lm", "question-answering"):
        for weight in weights(config, task):
            assert is_decayed(weight.name) == (len(weight.dims) == 2)
            assert is_decayed(f"model.{weight.name}") == is_decayed(weight.name)


def test_both_matrices_of_an_adapter_are_decayed():
    for module in adapter_shapes(config_of(), LoraConfig(target_modules=("fc1", "out_proj"))):
        assert is_decayed(f"{module}.lora_A.weight")
        assert is_decayed(f"{module}.lora_B.weight")


@pytest.mark.parametrize("name", ["decoder.version", "decoder.layers.0.fc3.weight", "score.lora_C.weight", ""])
def test_what_is_no_weight_has_no_decay(name):
    with pytest.raises(ValueError, match="not a weight of OPT"):
        is_decayed(name)


# -- the step ---------------------------------------------------------------------------------------------------------


def a_run(recipe: TrainingRecipe, steps: int, scale: float = 1.0):
    """Weights after each step, and the norms; gradients are random, and the same in every run."""
    config = config_of(num_hidden_layers=1)
    current, moments, after, norms = dict(random_tensors(config)), None, [], []
    for step in range(steps):
        gradients = {name: scale * g for name, g in random_tensors(config, seed=step + 1)}
        current, moments, norm = adamw_step(recipe, step, current, gradients, moments)
        after.append(current)
        norms.append(norm)
    return after, norms


@pytest.mark.parametrize("norm", [0.5, 1e9, None], ids=["clipped", "not clipped", "no clipping"])
def test_steps_are_those_of_torch_in_float64(norm):
    torch = pytest.importorskip("torch")
    recipe = TrainingRecipe(
        learning_rate=0.03, warmup_steps=2, total_steps=9, weight_decay=0.2, max_gradient_norm=norm, epsilon=1e-3
    )
    config = config_of(num_hidden_layers=1)
    parameters = {name: torch.nn.Parameter(torch.tensor(w).double()) for name, w in random_tensors(config)}
    groups = [
        dict(params=[p for name, p in parameters.items() if is_decayed(name) == decayed], weight_decay=0.2 * decayed)
        for decayed in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(recipe.beta1, recipe.beta2), eps=recipe.epsilon)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, recipe.learning_rate_at)
    after, norms = a_run(recipe, 7)
    for step in range(7):
        for name, gradient in random_tensors(config, seed=step + 1):
            parameters[name].grad = torch.tensor(gradient).double()
        got = torch.nn.utils.clip_grad_norm_(parameters.values(), math.inf if norm is None else norm)
        optimizer.step()
        schedule.step()
        assert float(got) == pytest.approx(norms[step], rel=1e-12)
        for name, parameter in parameters.items():
            np.testing.assert_allclose(parameter.detach().numpy(), after[step][name], rtol=1e-11, atol=1e-13)


def test_a_clipped_step_does_not_depend_on_the_size_of_the_gradients():
    recipe = TrainingRecipe(max_gradient_norm=0.1)
    first, second = (a_run(recipe, 3, scale)[0][-1] for scale in (1.0, 1000.0))
    assert all(np.allclose(first[name], second[name], rtol=1e-5, atol=0) for name in first)


def test_a_weight_without_a_gradient_stays():
    config = config_of(num_hidden_layers=0)
    before = dict(random_tensors(config))
    name = "decoder.embed_positions.weight"
    after = adamw_step(TrainingRecipe(), 0, before, {name: np.ones(shapes(config)[name])})
    assert {other for other in before if not np.array_equal(before[other], after.weights[other])} == {name}
    assert after.moments.keys() == {name}
