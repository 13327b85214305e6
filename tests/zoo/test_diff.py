"""`opt-zoo diff`: values, dtypes, names and configs of two checkpoints in any formats; exit codes; manifests."""

import json

import numpy as np
import pytest
from harness import config_of, save_random

from conversion import open_checkpoint, write_checkpoint

BIAS, MATRIX = "decoder.layers.1.fc2.bias", "decoder.layers.0.fc1.weight"


@pytest.fixture
def changed(checkpoint, tmp_path):
    """A function that writes the checkpoint anew, after a change of its tensors."""

    def write(name, change=lambda tensors: None, **options):
        with open_checkpoint(checkpoint) as opened:
            tensors = {key: opened.read(key).copy() for key in opened.shapes}
            change(tensors)
            write_checkpoint(tmp_path / name, opened.config, tensors, allow_nonfinite=True, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize("format", ["torch-bin", "flax-msgpack", "tf-h5", "tf-checkpoint"])
def test_one_checkpoint_in_two_formats_is_equal(opt_zoo, checkpoint, changed, format):
    other = changed("other", format=format)
    code, out, _ = opt_zoo("diff", checkpoint, other)
    assert (code, out.startswith("equal: ")) == (0, True)
    code, out, _ = opt_zoo("diff", changed("first"), other, "--manifest")
    assert (code, "no weight was read" in out, "bit for bit" in out) == (0, True, False)


def test_differing_values_are_counted_with_their_largest_distance(opt_zoo, checkpoint, changed):
    def change(tensors):
        tensors[BIAS][2:5] += np.float32([0.5, -3, 1])
        tensors[MATRIX][3, 4] = np.nan

    code, out, _ = opt_zoo("diff", checkpoint, changed("other", change, format="flax-msgpack"), "--json")
    report = json.loads(out)
    assert (code, report["equal"]) == (1, False)
    found = {weight["name"]: weight for weight in report["differing"]}
    assert found.keys() == {BIAS, MATRIX}
    assert (found[BIAS]["differing_values"], found[MATRIX]["differing_values"]) == (3, 1)
    assert found[BIAS]["largest_difference"] == pytest.approx(3)
    assert found[MATRIX]["largest_difference"] is None
    assert not any(report[key] for key in ("config", "missing", "extra", "shapes", "dtypes"))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_value_that_is_not_finite_in_one_of_the_two_has_no_distance(opt_zoo, checkpoint, changed, value):
    code, out, _ = opt_zoo("diff", checkpoint, changed("other", lambda tensors: tensors[BIAS].__setitem__(0, value)))
    assert code == 1
    assert f"{BIAS}: 1 of " in out
    assert "values differ, where one is not finite" in out


def test_text_names_weights_values_and_distance(opt_zoo, checkpoint, changed):
    other = changed("other", lambda tensors: tensors[BIAS].__setitem__(0, 7))
    code, out, _ = opt_zoo("diff", checkpoint, other)
    assert code == 1
    assert f"{BIAS}: 1 of " in out
    assert "values differ, by at most " in out
    assert "\ndifferent: values of 1 of " in out


def test_another_dtype_is_a_difference_and_values_are_compared_as_numbers(opt_zoo, checkpoint, changed):
    def round_all_but_one(tensors):
        for name, array in tensors.items():
            if name != MATRIX:
                array[...] = array.astype(np.float16)

    rounded = changed("rounded", round_all_but_one)
    half = changed("half", round_all_but_one, dtype="float16")
    report = json.loads(opt_zoo("diff", rounded, half, "--json")[1])
    assert report["dtypes"][BIAS] == ["float32", "float16"]
    assert [weight["name"] for weight in report["differing"]] == [MATRIX]
    assert opt_zoo("diff", rounded, half)[0] == 1


def test_other_configs_and_weights_are_listed(opt_zoo, checkpoint, tmp_path):
    other = save_random(tmp_path / "other", config_of("untied head", num_hidden_layers=1, dropout=0.3))
    code, out, _ = opt_zoo("diff", checkpoint, other, "--json")
    report = json.loads(out)
    assert code == 1
    assert {"dropout", "num_hidden_layers", "tie_word_embeddings"} <= report["config"].keys()
    assert (BIAS in report["missing"], report["extra"]) == (True, ["lm_head.weight"])


def test_manifests_alone_tell_what_differs_without_a_weight_read(opt_zoo, changed):
    first, second = changed("first"), changed("second", lambda tensors: tensors[BIAS].__setitem__(0, 7))
    for folder in (first, second):
        (folder / "model.safetensors").unlink()
    code, out, _ = opt_zoo("diff", first, second, "--manifest")
    assert code == 1
    assert f"{BIAS}: other values" in out


def test_a_missing_manifest_and_a_missing_source_are_bad_input(opt_zoo, checkpoint, changed, tmp_path):
    first, second = changed("first"), changed("second")
    (second / "opt_manifest.json").unlink()
    code, out, err = opt_zoo("diff", first, second, "--manifest")
    assert (code, out) == (2, "")
    assert "opt_manifest.json: missing" in err
    assert opt_zoo("diff", first, "./no-such-folder")[0] == 2
