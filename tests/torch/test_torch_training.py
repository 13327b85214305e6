"""Training as users of PyTorch write it, and the Trainer: the recipe's steps, parts of a batch, resumption."""

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, config_of, load_backend, mask_named, reference_of, token_ids

from opt_core.errors import InputError, TrainingError
from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe, adamw_step
from opt_core.reference import IGNORED_LABEL, causal_lm_loss
from opt_core.schema import shapes
from opt_torch.lora import add_lora
from opt_torch.optimization import gradient_norm, make_optimizer
from opt_torch.training import Trainer

torch = pytest.importorskip("torch")

RECIPE = TrainingRecipe(learning_rate=0.01, warmup_steps=2, total_steps=7)


def model_of(task: str = "causal-lm", **changes):
    return load_backend("torch").random_model(config_of(**changes), task)


def batch_of(model, rows: int = 4) -> dict[str, np.ndarray]:
    ids = token_ids(model.config, rows)
    return dict(input_ids=ids, labels=np.where(np.random.default_rng(3).random(ids.shape) < 0.4, IGNORED_LABEL, ids))


def values_of(model) -> dict[str, np.ndarray]:
    return {name: model.weight(name).detach().double().numpy().copy() for name in shapes(model.config, model.task)}


@pytest.mark.parametrize("clipping", [0.05, None])
def test_the_recipes_optimizer_takes_the_steps_of_the_reference(clipping):
    """In the plain loop of PyTorch's documentation."""
    recipe = TrainingRecipe(learning_rate=0.01, warmup_steps=2, total_steps=7, max_gradient_norm=clipping)
    model = model_of().double().train()
    optimizer, schedule = make_optimizer(model, recipe)
    batch, weights, moments = batch_of(model), values_of(model), None
    for step in range(4):
        _, gradients = load_backend("torch").loss_and_gradients(model, **batch)
        truth = adamw_step(recipe, step, weights, gradients, moments)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if clipping is not None:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clipping)
            assert float(norm) == pytest.approx(truth.gradient_norm)
        optimizer.step()
        schedule.step()
        weights, moments = truth.weights, truth.moments
        for name, want in weights.items():
            if not name.endswith("k_proj.bias"):  # its gradient is rounding alone, which Adam makes a step of
                np.testing.assert_allclose(values_of(model)[name], want, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification", "question-answering"])
def test_the_trainer_takes_the_steps_of_the_plain_loop(task):
    model, twin = model_of(task).double(), model_of(task).double()
    ids, labels = token_ids(model.config), np.array([0, 1, 1, 0])
    batch = {
        "causal-lm": dict(labels=ids),
        "sequence-classification": dict(labels=labels),
        "question-answering": dict(start_positions=labels, end_positions=labels + 2),
    }[task] | dict(input_ids=ids, attention_mask=mask_named("left"))
    optimizer, schedule = make_optimizer(twin, RECIPE)
    trainer = Trainer(model, RECIPE)
    for _ in range(3):
        loss = twin.train()(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), RECIPE.max_gradient_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert trainer.step(batch) == pytest.approx(loss.item())
        assert trainer.gradient_norm == pytest.approx(float(norm))
    for name, want in values_of(twin).items():
        if not name.endswith("k_proj.bias"):
            np.testing.assert_allclose(values_of(model)[name], want, atol=1e-9, err_msg=name)


def test_parts_of_a_batch_weigh_what_they_predict():
    """Their labels are not equally many, so the mean of the means would be another number."""
    model = model_of()
    batch, whole = batch_of(model), Trainer(model_of(), RECIPE)
    batch["labels"][:2, 2:] = IGNORED_LABEL
    in_parts = Trainer(model, RECIPE, accumulate=2)
    for _ in range(3):
        assert in_parts.step(batch) == pytest.approx(whole.step(batch), rel=1e-5)
        assert in_parts.gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
    with pytest.raises(InputError, match=r"expected rows in 3 equal parts \(accumulate\), got 4"):
        Trainer(model, RECIPE, accumulate=3).step(batch)


@pytest.mark.parametrize("kind", ["all weights", "adapters"])
def test_a_resumed_run_repeats_the_unbroken_one(tmp_path, kind):
    def start() -> Trainer:
        model = model_of(dropout=0.2, attention_dropout=0.1, layerdrop=0.2)
        if kind == "adapters":
            add_lora(model, LoraConfig(r=3, lora_dropout=0.2))
        return Trainer(model, RECIPE, seed=5)

    trainer = start()
    batch = batch_of(trainer.model)
    trainer.step(batch)
    trainer.save(tmp_path)
    torch.manual_seed(1)  # what others draw changes nothing
    want = [trainer.step(batch) for _ in range(3)]
    resumed = start()
    resumed.seed = 0
    resumed.restore(tmp_path)
    assert (resumed.step_count, resumed.seed) == (1, 5)
    assert [resumed.step(batch) for _ in range(3)] == want


def test_a_trainer_leaves_the_random_numbers_of_others_alone():
    trainer = Trainer(model_of(dropout=0.2), RECIPE)
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    trainer.step(batch_of(trainer.model))
    assert (torch.rand(2) == want).all()


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(spoilt):
    model = model_of()
    trainer, batch = Trainer(model, RECIPE), batch_of(model)
    trainer.step(batch)
    if spoilt == "loss":
        model.model.decoder.final_layer_norm.weight.data[0] = np.nan
    else:
        model.model.decoder.final_layer_norm.weight.register_hook(lambda gradient: gradient * np.inf)
    before = values_of(model), {name: m.numpy().copy() for name, m in moments_of(trainer)}
    with pytest.raises(TrainingError, match="step 1: expected finite numbers, got a loss of"):
        trainer.step(batch)
    after = values_of(model), dict(moments_of(trainer))
    for old, new in zip(before, after, strict=True):
        for name in old:
            np.testing.assert_array_equal(old[name], new[name])
    assert trainer.step_count == 1


def moments_of(trainer):
    for name, parameter in trainer.parameters.items():
        yield from ((f"{kind}.{name}", trainer.optimizer.state[parameter][kind]) for kind in ("exp_avg", "exp_avg_sq"))


def test_evaluation_has_no_dropout_and_learns_nothing():
    model = model_of(dropout=0.5)
    trainer, batch = Trainer(model, RECIPE), batch_of(model)
    want = model.eval()(**batch).loss.item()
    trainer.step(batch)
    model.load_state_dict(model_of(dropout=0.5).state_dict())
    assert trainer.evaluate(batch) == trainer.evaluate(batch) == pytest.approx(want, rel=1e-6)
    assert trainer.predict(batch).logits.shape == (4, 13, 97)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_trains_float32_weights_in_bfloat16(attn_implementation, checkpointing):
    model = model_of()
    model.set_attn_implementation(attn_implementation)
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids, mask, reference = token_ids(model.config), mask_named("left"), reference_of(model.config)
    truth = causal_lm_loss(reference.logits(reference(ids, mask).last_hidden_state), ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.train()(ids, attention_mask=mask, labels=ids)
        out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert 0 < abs(out.loss.item() - truth) <= BOUND["bfloat16"] * ROUNDOFF["bfloat16"] * truth
    exact = model_of()
    exact.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    for (name, got), want in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert got.grad.dtype == torch.float32
        if not name.endswith("k_proj.bias"):
            assert 0 < (got.grad - want.grad).norm() < 0.1 * want.grad.norm(), name


def test_half_precision_weights_are_trained_too():
    model = load_backend("torch").random_model(config_of(), dtype="bfloat16")
    trainer, batch = Trainer(model, TrainingRecipe(learning_rate=0.01)), batch_of(model)
    losses = [trainer.step(batch) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_of_a_large_gradient_has_the_digits_of_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in ((20011, 307), (307,))]
    want = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
    assert float(gradient_norm(gradients)) == pytest.approx(want, rel=2**-20)
