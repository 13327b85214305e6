"""Low-rank adapters: the same model as with merged matrices, the same steps and files in every backend."""

import importlib

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, config_of, mask_named, reference_of, rounded_weights, token_ids, worst_row
from safetensors.numpy import load_file, save_file

from conversion.adapters import ADAPTER_NAME, write_adapter
from opt_core.errors import CheckpointError, InputError
from opt_core.lora import MODULES, LoraConfig, adapter_shapes
from opt_core.optimization import TrainingRecipe
from opt_core.reference import Reference
from opt_core.schema import shapes

CONFIG = config_of("350m style", num_hidden_layers=2)
LORA = LoraConfig(r=3, lora_alpha=7, target_modules=MODULES, task="causal-lm")
STEPS = 3


def lora_of(backend):
    return importlib.import_module(f"opt_{backend.name}.lora")


def random_adapter(lora: LoraConfig = LORA, config=CONFIG) -> dict[str, dict[str, np.ndarray]]:
    """Both matrices away from zero, unlike those of a new adapter."""
    random = np.random.default_rng(5)
    return {
        module: {
            letter: random.normal(0, 0.3, shape).astype(np.float32) for letter, shape in zip("AB", pair, strict=True)
        }
        for module, pair in adapter_shapes(config, lora).items()
    }


@pytest.fixture
def adapter(tmp_path):
    write_adapter(tmp_path / "adapter", LORA, random_adapter())
    return tmp_path / "adapter"


def adapted_model(backend, folder, config=CONFIG):
    model = backend.random_model(config)
    lora_of(backend).load_adapter(model, folder)
    return model


def merged_reference() -> Reference:
    """The truth: each matrix with the product of its adapter added, in float64."""
    weights = {name: w.astype(np.float64) for name, w in rounded_weights(CONFIG).items()}
    for module, pair in random_adapter().items():
        weights[f"{module}.weight"] += LORA.scaling * pair["B"].astype(np.float64) @ pair["A"]
    return Reference(CONFIG, weights)


def assert_is_the_merged_model(backend, model) -> None:
    ids, mask = token_ids(CONFIG), mask_named("holes")
    reference = merged_reference()
    truth = reference.logits(reference(ids, mask).last_hidden_state)
    plain = reference_of(CONFIG)
    assert worst_row(plain.logits(plain(ids, mask).last_hidden_state), truth) > 0.1  # the adapter matters
    got = backend.numpy(model(ids, attention_mask=mask).logits)
    assert worst_row(got, truth) <= BOUND["float32"] * ROUNDOFF["float32"]


def base_weights(backend, model) -> dict[str, np.ndarray]:
    return {name: backend.numpy(model.weight(name)).copy() for name in shapes(CONFIG)}


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing(backend):
    model, ids = backend.random_model(CONFIG), token_ids(CONFIG)
    before = backend.numpy(model(ids).logits)
    lora_of(backend).add_lora(model, LORA)
    np.testing.assert_array_equal(backend.numpy(model(ids).logits), before)


def test_a_model_with_an_adapter_is_the_one_with_merged_matrices(backend, adapter):
    assert_is_the_merged_model(backend, adapted_model(backend, adapter))


def test_merging_makes_plain_modules_that_compute_the_same(backend, backends, adapter, tmp_path):
    model = adapted_model(backend, adapter)
    lora_of(backend).merge_lora(model)
    assert model.lora is None
    assert_is_the_merged_model(backend, model)
    model.save_pretrained(tmp_path / "merged")
    for other in backends:
        assert_is_the_merged_model(other, other.model_class().from_pretrained(tmp_path / "merged"))
    lora_of(backend).add_lora(model, LORA)  # as to any other model


def test_generation_runs_with_an_adapter(backend, adapter):
    model, ids = adapted_model(backend, adapter), token_ids(CONFIG, 2, 5)
    with_adapter = np.asarray(model.generate(ids, max_new_tokens=4, eos_token_id=[0]))
    lora_of(backend).merge_lora(model)
    np.testing.assert_array_equal(np.asarray(model.generate(ids, max_new_tokens=4, eos_token_id=[0])), with_adapter)


def test_dropout_acts_on_the_input_of_an_adapter_and_in_training_alone(backend, tmp_path):
    lora = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.5, target_modules=("fc1",), task="causal-lm")
    write_adapter(tmp_path, lora, random_adapter(lora))
    model, ids = adapted_model(backend, tmp_path), token_ids(CONFIG)
    calm = backend.numpy(model(ids).logits)
    np.testing.assert_array_equal(backend.numpy(model(ids).logits), calm)
    training = backend.train(model)
    first, second = (backend.numpy(training(ids, use_cache=False).logits) for _ in range(2))
    assert np.abs(first - calm).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


# -- training and files -----------------------------------------------------------------------------------------------


def test_the_same_adapter_is_trained_in_the_same_steps_and_alone(backends, adapter, tmp_path):
    ids = token_ids(CONFIG)
    batch = dict(input_ids=ids, attention_mask=mask_named("right"), labels=ids)
    recipe, losses, after = TrainingRecipe(learning_rate=0.01, epsilon=1e-3), {}, {}
    for backend in backends:
        model = adapted_model(backend, adapter)
        before = base_weights(backend, model)
        trainer = importlib.import_module(f"opt_{backend.name}.training").Trainer(model, recipe)
        losses[backend.name] = [trainer.step(batch) for _ in range(STEPS)]
        for name, want in before.items():
            np.testing.assert_array_equal(backend.numpy(model.weight(name)), want, err_msg=name)
        lora_of(backend).save_adapter(model, tmp_path / backend.name)
        after[backend.name] = load_file(tmp_path / backend.name / ADAPTER_NAME)
    first = backends[0].name
    assert losses[first][-1] < losses[first][0] - 0.01
    for name in losses:
        np.testing.assert_allclose(losses[name], losses[first], rtol=1e-5, err_msg=name)
        assert after[name].keys() == after[first].keys()
        for matrix, want in after[first].items():
            np.testing.assert_allclose(after[name][matrix], want, atol=1e-5, err_msg=f"{name}, {matrix}")


def test_an_adapter_that_one_backend_saved_loads_in_every_other(backends, adapter, tmp_path):
    for writer in backends:
        lora_of(writer).save_adapter(adapted_model(writer, adapter), tmp_path / writer.name)
        want, got = (load_file(folder / ADAPTER_NAME) for folder in (adapter, tmp_path / writer.name))
        assert got.keys() == want.keys()
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=f"{writer}, {name}")
        for reader in backends:
            assert_is_the_merged_model(reader, adapted_model(reader, tmp_path / writer.name))


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_everything_wrong_with_an_adapter_is_named_and_the_model_stays(backend, adapter):
    path = adapter / ADAPTER_NAME
    tensors = load_file(path)
    name = "base_model.model.model.decoder.layers.{}.{}.lora_{}.weight"
    del tensors[name.format(0, "fc1", "A")]
    tensors[name.format(1, "self_attn.q_proj", "B")] = np.zeros((2, 3), np.float32)
    tensors["base_model.model.model.decoder.layers.0.fc3.lora_A.weight"] = np.zeros((3, 2), np.float32)
    save_file(tensors, path)
    model, ids = backend.random_model(CONFIG), token_ids(CONFIG)
    before = backend.numpy(model(ids).logits)
    with pytest.raises(CheckpointError) as error:
        lora_of(backend).load_adapter(model, adapter)
    for words in (r"layers.0.fc1.lora_A.weight: missing", "layers.1.self_attn.q_proj.lora_B.weight: expected", "fc3"):
        assert words in str(error.value)
    assert model.lora is None
    np.testing.assert_array_equal(backend.numpy(model(ids).logits), before)


def test_adapters_of_another_rank_or_none_or_twice_are_refused(backend, adapter):
    lora, model = lora_of(backend), backend.random_model(CONFIG)
    for call in (lora.merge_lora, lambda model: lora.save_adapter(model, adapter)):
        with pytest.raises(InputError, match="expected one with adapters"):
            call(model)
    lora.add_lora(model, LoraConfig(r=2))
    with pytest.raises(InputError, match="expected adapters as the model has"):
        lora.load_adapter(model, adapter)
    with pytest.raises(InputError, match="expected one without adapters"):
        lora.add_lora(model, LORA)
    with pytest.raises(InputError, match="expected one without adapters"):
        model.prune_heads({0: [1]})


def test_a_checkpoint_without_the_adapters_is_not_written(backend, adapter, tmp_path):
    model = adapted_model(backend, adapter)
    with pytest.raises(InputError, match="save_adapter"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    lora_of(backend).merge_lora(model)
    model.save_pretrained(tmp_path / "model")
    assert_is_the_merged_model(backend, backend.model_class().from_pretrained(tmp_path / "model"))
