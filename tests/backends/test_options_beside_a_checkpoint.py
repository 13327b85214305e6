"""Options of generation that lie beside a checkpoint are the model's own; a call overrides them, saving keeps them."""

import json

import numpy as np
import pytest
from harness import config_of, save_random

from opt_core import GenerationConfig
from opt_core.errors import ConfigError

PROMPT = np.array([[5, 9, 23, 4], [7, 3, 8, 21]])
OPTIONS = {
    "num_beams": 3,
    "num_return_sequences": 2,
    "length_penalty": 0.5,
    "max_new_tokens": 6,
    "of_another_program": 1,
}


@pytest.fixture
def folder(tmp_path):
    save_random(tmp_path, config_of())
    (tmp_path / "generation_config.json").write_text(json.dumps(OPTIONS))
    return tmp_path


def generated(backend, model, **options):
    return backend.numpy(model.generate(PROMPT, **options))


def test_the_options_of_a_checkpoint_are_obeyed_and_overridden(backend, folder):
    model = backend.model_class().from_pretrained(folder)
    plain = backend.random_model(config_of())
    want = generated(backend, plain, num_beams=3, num_return_sequences=2, length_penalty=0.5, max_new_tokens=6)
    assert np.array_equal(generated(backend, model), want)
    assert len(generated(backend, model, num_return_sequences=3)) == 6
    greedy = GenerationConfig(max_new_tokens=6)
    assert np.array_equal(
        generated(backend, model, generation_config=greedy), generated(backend, plain, max_new_tokens=6)
    )


def test_saving_keeps_them(backend, folder, tmp_path):
    backend.model_class().from_pretrained(folder).save_pretrained(tmp_path / "again")
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert OPTIONS.items() <= kept.items()


def test_options_saved_for_transformers_name_the_ids_that_end_a_text(backend, tmp_path):
    """transformers 4.57.6 asks config.json for none where generation_config.json is there."""
    model = backend.random_model(config_of(eos_token_id=[2, 7]))
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    published = pytest.importorskip("transformers").GenerationConfig.from_pretrained(tmp_path)
    assert (published.num_beams, published.eos_token_id, published.pad_token_id) == (3, [2, 7], 1)


def test_a_model_without_options_leaves_none_of_another_model_behind(backend, folder, tmp_path):
    model = backend.random_model(config_of())
    model.save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / "generation_config.json").exists()
    model.save_pretrained(folder)
    assert backend.model_class().from_pretrained(folder).generation_config.num_beams == 1


def test_wrong_options_are_refused_when_the_model_is_loaded(backend, folder):
    (folder / "generation_config.json").write_text('{"num_beams": -1, "temperature": "hot"}')
    with pytest.raises(ConfigError) as raised:
        backend.model_class().from_pretrained(folder)
    assert len(raised.value.problems) == 2


def test_nan_is_saved_with_leave_alone(backend, tmp_path):
    config = config_of(num_hidden_layers=0)
    model = backend.random_model(config)
    folder = save_random(tmp_path / "source", config)
    assert model.save_pretrained(tmp_path / "fine") is None
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-4:] = np.float32(np.nan).tobytes()
    (folder / "model.safetensors").write_bytes(raw)
    broken = backend.model_class().from_pretrained(folder)
    with pytest.raises(ValueError, match="expected finite values"):
        broken.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "target").exists()
    broken.save_pretrained(tmp_path / "target", allow_nonfinite=True)
    assert (tmp_path / "target" / "model.safetensors").is_file()


def test_a_change_of_options_does_not_hinder_the_compiled_loop(backend, folder):
    model = backend.model_class().from_pretrained(folder)
    greedy = generated(backend, model, num_beams=1, num_return_sequences=1, length_penalty=1.0)
    model.generation_config = GenerationConfig(max_new_tokens=6)
    assert np.array_equal(generated(backend, model), greedy)
