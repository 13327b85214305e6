"""The training loop: a killed run goes on as if it had not been, another run's folder is refused by what differs."""

import dataclasses
import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fake_trainer import FakeTrainer, examples, run
from rich.console import Console

from opt_core.batching import Batches
from opt_core.errors import InputError, TrainingError
from opt_core.optimization import TrainingRecipe
from opt_zoo.training_log import LOG, PLOT, summary
from opt_zoo.training_loop import RUN, checkpoints, real_tokens, train

ROOT = Path(__file__).parents[2]
STEPS = 31


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tmp_path_factory.mktemp("unbroken") / "run", STEPS)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_a_run_that_was_stopped_and_started_again_equals_an_unbroken_one(folder, unbroken):
    for steps in (4, 9, 10, STEPS):
        result, trainer = run(folder, steps)
    assert result.losses == unbroken[0].losses
    assert [v for v in result.validations if v[0] % 5 == 0 or v[0] == STEPS][-1] == unbroken[0].validations[-1]
    assert trainer.weights.tolist() == unbroken[1].weights.tolist()
    assert result.resumed_from == 10
    assert unbroken[0].resumed_from is None


class Stopped(Exception):
    """What a test throws into a run."""


@pytest.mark.parametrize("at", [0, 2, 3, 4, 7, STEPS - 1])
def test_what_was_done_after_the_last_checkpoint_is_done_again(folder, unbroken, monkeypatch, at):
    step = FakeTrainer.step

    def stops(self, batch):
        if self.step_count == at:
            raise Stopped
        return step(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(FakeTrainer, "step", stops)
        with pytest.raises(Stopped):
            run(folder, STEPS)
    with open(folder / LOG, "a") as log:
        log.write('{"step": 3, "lo')  # a line that a killed process left
    result, _ = run(folder, STEPS)
    assert result.losses == unbroken[0].losses
    assert result.validations == unbroken[0].validations
    assert result.resumed_from == at // 3 * 3


def test_a_run_killed_at_any_moments_equals_an_unbroken_one(folder, unbroken):
    command = [sys.executable, str(ROOT / "tests/zoo/fake_trainer.py"), str(folder), str(STEPS)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    moments, kills = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        before = len(losses_in(folder))
        while len(losses_in(folder)) <= before and process.poll() is None:
            time.sleep(0.005)
        time.sleep(moments.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    subprocess.run(command, env=environment, check=True, capture_output=True)
    result, trainer = run(folder, STEPS)
    assert result.losses == unbroken[0].losses
    assert result.validations == unbroken[0].validations
    assert trainer.weights.tolist() == unbroken[1].weights.tolist()
    assert not list(folder.glob("*.tmp"))


def losses_in(folder: Path) -> list[str]:
    log = folder / LOG
    return [line for line in log.read_text().splitlines() if "loss" in line] if log.exists() else []


def test_a_checkpoint_that_was_not_finished_is_none(folder, unbroken, monkeypatch):
    """Killed between two files of a checkpoint, and between writing it and giving it its name."""
    run(folder, 7)
    (folder / "step-000003.tmp").mkdir()  # killed while an old one was deleted
    (folder / "step-000009.tmp").mkdir()
    (folder / "step-000009.tmp" / "weights.npy").write_bytes(b"half")
    with monkeypatch.context() as patched:
        patched.setattr("opt_zoo.training_loop.sync_path", lambda path: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(folder, 9)
    result, _ = run(folder, STEPS)
    assert not list(folder.glob("*.tmp"))
    assert result.resumed_from == 7
    assert result.losses == unbroken[0].losses


def test_weights_that_began_at_random_are_kept_from_the_start(folder, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(FakeTrainer, "step", lambda self, batch: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(folder, 2, start=np.array([3.0, 5.0, 7.0]))
    result, _ = run(folder, 2, start=np.array([0.1, 0.2, 0.3]))
    assert result.losses == run(folder.with_name("unbroken"), 2, start=np.array([3.0, 5.0, 7.0]))[0].losses
    assert result.validations[0] == (0, {"distance": 15.0})


def test_the_last_checkpoints_stay_and_older_ones_go(folder):
    run(folder, 11, keep=3)
    assert [steps for steps, _ in checkpoints(folder)] == [6, 9, 11]
    assert {path.name for path in folder.iterdir()} == {
        RUN, LOG, PLOT, "step-000006", "step-000009", "step-000011",
    }  # fmt: skip


def test_a_finished_run_is_not_trained_again(folder, unbroken):
    run(folder, STEPS)
    result, trainer = run(folder, STEPS)
    assert (trainer.step_count, result.resumed_from) == (STEPS, STEPS)
    assert result.losses == unbroken[0].losses


RECIPE = TrainingRecipe(learning_rate=0.1)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (dict(seed=1), ("seed", "batches.seed")),
        (
            dict(recipe=dataclasses.replace(RECIPE, weight_decay=0.2, beta1=0.8)),
            ("recipe.weight_decay", "recipe.beta1"),
        ),
        (dict(batches=Batches(examples(), 4)), ("batches.batch_size",)),
        (dict(batches=Batches(examples(14)[1:], 3)), ("batches.digest",)),
        (dict(identity={"model": "opt-125m"}), ("model",)),
        (dict(identity={}), ("model",)),
    ],
)
def test_the_folder_of_another_run_is_refused_by_all_that_differs(folder, change, differs):
    run(folder, 4, identity={"model": "opt-tiny"})
    with pytest.raises(InputError) as caught:
        run(folder, 9, **{"identity": {"model": "opt-tiny"}, **change})
    assert {problem.partition(":")[0] for problem in caught.value.problems} == set(differs)
    assert [steps for steps, _ in checkpoints(folder)] == [3, 4]


def test_a_longer_run_of_the_same_recipe_goes_on(folder):
    run(folder, 4)
    assert len(run(folder, 9)[0].losses) == 9


def test_a_folder_with_other_files_is_refused(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"expected an empty folder or one of a run, got thesis\.txt"):
        run(folder, 4)
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_numbers_below_one_are_all_named(folder):
    with pytest.raises(InputError) as caught:
        run(folder, 0, validate_every=0, save_every=-1, keep=0)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "steps", "validate_every", "save_every", "keep",
    ]  # fmt: skip
    assert not folder.exists()


def test_the_log_has_each_step_and_validation_once(folder):
    result, _ = run(folder, 7)
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(7))
    assert [line["step"] for line in lines if "validation" in line] == [0, 5, 7]
    assert [line["loss"] for line in lines if "loss" in line] == result.losses
    assert {"gradient_norm", "tokens", "seconds"} < set(lines[1])


def test_a_run_without_validation_has_a_picture_all_the_same(folder):
    result, _ = run(folder, 3, validate=None)
    assert result.validations == []
    assert (folder / PLOT).read_bytes().startswith(b"\x89PNG")


def test_the_bar_tells_loss_and_speed_on_a_terminal_and_lines_tell_validations_anywhere(folder):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    run(folder, 7, pause=0.05, console=terminal)
    assert "tokens/s" in terminal.file.getvalue()
    assert "7/7" in terminal.file.getvalue()
    plain = Console(file=io.StringIO())
    run(folder, 12, console=plain)
    assert plain.file.getvalue().startswith("going on after step 7\nstep 10: distance")
    assert "tokens/s" not in plain.file.getvalue()


class OneOfTwo(FakeTrainer):
    """One of two threads that stand for processes; both must call `agree` and `save`, or the barrier breaks."""

    def __init__(self, index: int, barrier: threading.Barrier, said: dict[int, int]):
        super().__init__(TrainingRecipe(learning_rate=0.1))
        self.process_index, self._barrier, self._said = index, barrier, said

    def agree(self, number: int) -> int:
        self._said[self.process_index] = number
        self._barrier.wait()
        agreed = self._said[0]
        self._barrier.wait()
        return agreed

    def wait_for_all(self) -> None:
        self._barrier.wait()

    def save(self, folder) -> None:
        if self.process_index == 0:
            super().save(folder)
        self._barrier.wait()


def run_as_two(folder: Path, steps: int, **options) -> list:
    """What `train` returned or raised on each of two processes."""
    barrier, said = threading.Barrier(2, timeout=20), {}

    def run_one(index: int):
        trainer = OneOfTwo(index, barrier, said)
        validate = lambda: {"distance": np.abs(trainer.weights).sum()}  # noqa: E731
        usual = dict(validate=validate, validate_every=5, save_every=3)
        try:
            return train(trainer, Batches(examples(), 3), steps, folder, **{**usual, **options})
        except Exception as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run_one, (0, 1)))


def test_of_several_processes_one_writes_and_all_know_the_same(folder, unbroken, capfd):
    run_as_two(folder, 8)
    for result in run_as_two(folder, STEPS):
        assert result.losses == unbroken[0].losses
        assert result.resumed_from == 8
    lines = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(STEPS))
    assert capfd.readouterr().err.count("going on after step 8") == 1
    assert not list(folder.glob("*.tmp"))


def test_the_first_process_alone_looks_for_the_newest_checkpoint(folder, monkeypatch):
    """Another one may not see it yet, or see one that came since."""
    looked: set[int] = set()

    def looking(folder: Path):
        looked.add(threading.get_ident())
        return checkpoints(folder)

    run_as_two(folder, 4)
    with monkeypatch.context() as patched:
        patched.setattr("opt_zoo.training_loop.checkpoints", looking)
        assert [result.resumed_from for result in run_as_two(folder, 9)] == [4, 4]
    assert len(looked) == 1


def test_an_error_of_the_first_process_ends_the_others(folder, monkeypatch):
    run_as_two(folder, 3)
    mine, theirs = run_as_two(folder, 9, identity={"model": "another"})
    assert isinstance(mine, InputError)
    assert isinstance(theirs, TrainingError)
    assert "process 0 failed" in str(theirs)
    monkeypatch.setattr("opt_zoo.training_loop.sync_path", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    mine, theirs = run_as_two(folder, 9)
    assert "disk full" in str(mine)
    assert "process 0 failed" in str(theirs)


def test_real_tokens_are_those_of_the_mask():
    batch = Batches([{"input_ids": [1] * n} for n in (3, 5)], 2, widths=[7]).at(0)
    assert real_tokens(batch) == 8
    assert real_tokens({"input_ids": batch["input_ids"]}) == 14


def test_the_summary_has_the_metric_before_and_after(unbroken):
    text = summary(unbroken[0], "distance")
    assert text.startswith("The validation distance went from 0 to ")
    assert text.endswith(f" in {STEPS} steps.")
