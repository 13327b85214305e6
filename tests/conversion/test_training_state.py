"""The state of a run on disk: the identity, strict, and never a mixture of two saves."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from checkpoints import config_of, tensors_of

from conversion import write_checkpoint
from conversion.training_state import MOMENTS_NAME, STATE_NAME, read_training_state, write_training_state
from opt_core.errors import CheckpointError
from opt_core.lora import LoraConfig, adapter_shapes
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.schema import shapes
from opt_core.synthetic import random_tensors

CONFIG = config_of(num_hidden_layers=2)
RECIPE = TrainingRecipe(learning_rate=0.003, warmup_steps=5, total_steps=17, max_gradient_norm=None)


def moments_of(seed: int) -> dict[str, Moments]:
    first, second = (dict(random_tensors(CONFIG, seed=2 * seed + part)) for part in (0, 1))
    return {name: Moments(first[name], np.abs(second[name])) for name in first}


def save(folder, step: int = 3) -> None:
    """A checkpoint whose every number tells at which step it was saved."""
    write_checkpoint(folder, CONFIG, dict(random_tensors(CONFIG, seed=step)), overwrite=True)
    write_training_state(folder, step, 7, RECIPE, moments_of(step), {"text": "Hamlet"})


def assert_is_of_step(state, step: int) -> None:
    assert (state.step, state.seed, state.recipe, state.extra) == (step, 7, RECIPE, {"text": "Hamlet"})
    for name, pair in moments_of(step).items():
        assert all(np.array_equal(got, want) for got, want in zip(state.moments[name], pair, strict=True))


def test_what_is_read_is_what_was_written(tmp_path):
    save(tmp_path)
    state = read_training_state(tmp_path, shapes(CONFIG))
    assert_is_of_step(state, 3)
    assert list(state.moments) == list(shapes(CONFIG))
    assert {array.dtype for pair in state.moments.values() for array in pair} == {np.dtype(np.float32)}


def test_moments_of_an_adapter_have_its_canonical_names(tmp_path):
    names = {f"{module}.lora_A.weight": pair[0] for module, pair in adapter_shapes(CONFIG, LoraConfig()).items()}
    write_training_state(
        tmp_path, 1, 0, RECIPE, {name: Moments(np.ones(shape), np.ones(shape)) for name, shape in names.items()}
    )
    assert read_training_state(tmp_path, names).moments.keys() == names.keys()


def test_without_shapes_every_moment_is_read_and_must_have_its_other_half(tmp_path):
    save(tmp_path)
    assert_is_of_step(read_training_state(tmp_path), 3)


def test_every_moment_that_does_not_fit_is_named(tmp_path):
    save(tmp_path)
    wrong = dict(shapes(CONFIG))
    wrong["decoder.layers.0.fc1.bias"], wrong["score.weight"] = (5,), (2, 22)
    del wrong["decoder.layers.1.fc2.weight"]
    with pytest.raises(CheckpointError) as caught:
        read_training_state(tmp_path, wrong)
    assert sorted(caught.value.problems) == [
        "exp_avg.decoder.layers.0.fc1.bias: expected (5,), got (31,)",
        "exp_avg.decoder.layers.1.fc2.weight: unexpected, got (22, 31)",
        "exp_avg.score.weight: missing, expected (2, 22)",
        "exp_avg_sq.decoder.layers.0.fc1.bias: expected (5,), got (31,)",
        "exp_avg_sq.decoder.layers.1.fc2.weight: unexpected, got (22, 31)",
        "exp_avg_sq.score.weight: missing, expected (2, 22)",
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 2), ("step", -1), ("step", True), ("seed", "7"), ("recipe", []), ("extra", None), ("weights", 5)]
    + [("recipe", {"beta1": 3}), ("recipe", {"momentum": 0.9})],
    ids=str,
)
def test_a_field_of_another_kind_is_named(tmp_path, field, value):
    save(tmp_path)
    path = tmp_path / STATE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(CheckpointError, match=f"{field}: "):
        read_training_state(tmp_path)


def test_moments_that_are_not_finite_are_refused_and_leave_the_older_state(tmp_path):
    save(tmp_path)
    spoilt = moments_of(4)
    spoilt["decoder.layers.0.fc1.bias"].exp_avg_sq[3] = np.nan
    with pytest.raises(CheckpointError, match=r"exp_avg_sq\.decoder\.layers\.0\.fc1\.bias: expected finite"):
        write_training_state(tmp_path, 4, 7, RECIPE, spoilt)
    assert_is_of_step(read_training_state(tmp_path), 3)


@pytest.mark.parametrize("missing", [STATE_NAME, MOMENTS_NAME])
def test_a_folder_that_lacks_a_file_is_no_state(tmp_path, missing):
    save(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=f"{missing}: missing"):
        read_training_state(tmp_path)


def test_a_state_beside_the_weights_of_another_step_is_refused(tmp_path):
    save(tmp_path)
    write_checkpoint(tmp_path, CONFIG, tensors_of(CONFIG), overwrite=True)
    with pytest.raises(CheckpointError, match="saved with other weights than those beside it"):
        read_training_state(tmp_path)


# -- killed -----------------------------------------------------------------------------------------------------------


def save_in_a_child(folder, step: int, last_call: int) -> int:
    """Saves in a process of its own, which dies before the call of that number that changes names or opens files."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    left = [last_call]

    def counted(call):
        def counting(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments, **options)

        return counting

    try:
        os.fsync = lambda descriptor: None
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            setattr(os, name, counted(getattr(os, name)))
        save(folder, step)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("is_new", [False, True], ids=["replaced", "new"])
def test_killed_before_any_step_of_a_save_a_folder_has_one_state_or_none(tmp_path, is_new):
    outcomes = []
    save(tmp_path / "old", 3)
    for last_call in range(100):
        folder = tmp_path / str(last_call)
        if not is_new:
            shutil.copytree(tmp_path / "old", folder)
        status = save_in_a_child(folder, 5, last_call)
        try:
            state = read_training_state(folder, shapes(CONFIG))
            assert_is_of_step(state, state.step)
            outcomes.append(state.step)
        except CheckpointError:
            outcomes.append(4)  # neither
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == ({4, 5} if is_new else {3, 4, 5})
