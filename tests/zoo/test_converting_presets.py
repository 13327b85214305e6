"""`opt-zoo convert` with the tokenizer of a KerasHub preset, and what it says of changes."""

import pytest

from opt_core import OPTTokenizer
from opt_zoo.embedded import embedded_folder

TEXTS = ["ROMEO:\nWhat light is that?", "  two  spaces", "</s><pad>", ""]


@pytest.fixture
def preset(opt_zoo, tmp_path):
    assert opt_zoo("convert", "opt-tiny", tmp_path / "preset", "--to", "keras-hub")[0] == 0
    return tmp_path / "preset"


@pytest.mark.parametrize("to", ["safetensors", "keras-hub"])
def test_the_tokenizer_of_a_preset_survives_and_encodes_the_same(opt_zoo, preset, tmp_path, to):
    assert opt_zoo("convert", preset, tmp_path / "back", "--to", to)[0] == 0
    want = OPTTokenizer.from_pretrained(embedded_folder("opt-tiny"))
    for folder in (preset, tmp_path / "back"):
        got = OPTTokenizer.from_pretrained(folder)
        assert got(TEXTS)["input_ids"] == want(TEXTS)["input_ids"]
        assert (got.bos_token_id, got.eos_token_id, got.pad_token_id) == (2, 2, 1)


def test_what_a_preset_cannot_hold_is_said(opt_zoo, tmp_path):
    code, out, _ = opt_zoo("convert", "opt-tiny", tmp_path / "preset", "--to", "keras-hub")
    assert code == 0
    said = " ".join(out.split())
    assert "decoder.embed_positions.weight: keras-hub has no place for rows 0 to 1" in said
    assert "attention_dropout: 0.0 reads back as 0.1" in said


def test_a_model_that_a_preset_cannot_hold_is_refused_before_anything_is_written(opt_zoo, tmp_path):
    code, _, err = opt_zoo("convert", "opt-tiny-350m-style", tmp_path / "preset", "--to", "keras-hub")
    assert code == 2
    assert "has_projections: expected False for keras-hub, got True" in " ".join(err.split())
    assert not (tmp_path / "preset").exists()
