"""A writer that is killed leaves the whole old checkpoint, the whole new one, or what does not open: never a mixture.

It is killed before every step that changes names in a folder, and at random moments. SIGKILL does not undo what a
process has written, so nothing needs to reach the disk here.
"""

import functools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from checkpoints import config_of

from conversion import open_checkpoint, write_checkpoint
from opt_core.errors import CheckpointError
from opt_core.synthetic import random_tensors

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

CONFIG = config_of(vocab_size=102, ffn_dim=42, hidden_size=18, num_attention_heads=6)
OLD, NEW = (dict(random_tensors(CONFIG, seed=seed)) for seed in (1, 2))
TARGETS = {  # the options of the old checkpoint, and of the new one
    "safetensors to shards": (dict(), dict(max_shard_size="9KB")),
    "shards to safetensors": (dict(max_shard_size="9KB"), dict()),
    "shards to shards": (dict(max_shard_size="9KB"), dict(max_shard_size="9KB")),
    "flax-msgpack": (dict(format="flax-msgpack"), dict(format="flax-msgpack")),
    "metaseq parts": (dict(format="metaseq", parts=3), dict(format="metaseq", parts=3)),
    "metaseq of fewer parts": (dict(format="metaseq", parts=6), dict(format="metaseq", parts=2)),
    "keras-hub": (dict(format="keras-hub"), dict(format="keras-hub")),
    "tf-checkpoint": (dict(format="tf-checkpoint"), dict(format="tf-checkpoint")),
    "metaseq to safetensors": (dict(format="metaseq", parts=2), dict()),
    "safetensors to keras-hub": (dict(), dict(format="keras-hub")),
}


def without_first_rows(tensors):
    """What a preset of KerasHub keeps."""
    positions = tensors["decoder.embed_positions.weight"].copy()
    positions[:2] = 0
    return {**tensors, "decoder.embed_positions.weight": positions}


def outcome(target: Path) -> str:
    """ "old", "new" or "refused"; fails for anything else that opens."""
    try:
        with open_checkpoint(target) as checkpoint:
            checkpoint.check(CONFIG)
            found = {name: checkpoint.read(name).tobytes() for name in checkpoint.shapes}
    except CheckpointError:
        return "refused"
    for name, tensors in {"old": OLD, "new": NEW}.items():
        for whole in (tensors, without_first_rows(tensors)):
            if found == {key: array.tobytes() for key, array in whole.items()}:
                return name
    raise AssertionError(f"{target}: a mixture opens")


def write_new(target: Path, options: dict) -> None:
    write_checkpoint(target, CONFIG, NEW, overwrite=True, **options)


def write_in_a_child(target: Path, options: dict, *, last_step: int | None = None) -> int:
    """The id of a process that writes, without waiting for the disk; it dies before the step of that number."""
    child = os.fork()
    if child:
        return child
    try:
        os.fsync = lambda descriptor: None
        if last_step is not None:
            die_before_step(last_step)
        write_new(target, options)
        os._exit(0)
    except BaseException:
        os._exit(1)


def die_before_step(number: int) -> None:
    """Kills this process before one of the calls that change names."""
    left = [number]

    def counted(call):
        @functools.wraps(call)
        def step(*arguments, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*arguments, **options)

        return step

    for owner, name in [(os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")]:
        setattr(owner, name, counted(getattr(owner, name)))


QUICK = ("safetensors to shards", "metaseq parts", "tf-checkpoint")
CASES = [
    pytest.param(case, is_new, marks=() if case in QUICK[: 1 if is_new else None] else pytest.mark.slow)
    for case in TARGETS
    for is_new in (False, True)
]


@pytest.mark.parametrize(
    ("case", "is_new"), CASES, ids=lambda x: x if isinstance(x, str) else "new" if x else "replaced"
)
def test_killed_before_any_step_it_leaves_no_mixture(tmp_path, case, is_new):
    old_options, new_options = TARGETS[case]
    outcomes = []
    write_checkpoint(tmp_path / "old", CONFIG, OLD, **old_options)
    for step in range(1000):
        target = tmp_path / str(step)
        if not is_new:
            shutil.copytree(tmp_path / "old", target)
        child = write_in_a_child(target, new_options, last_step=step)
        _, status = os.waitpid(child, 0)
        outcomes.append(outcome(target))
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    assert outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "refused", "new"].index)
    assert set(outcomes) == ({"refused", "new"} if is_new else {"old", "refused", "new"})


@pytest.mark.parametrize("case", TARGETS)
def test_killed_at_random_moments_it_leaves_no_mixture(tmp_path, case):
    old_options, new_options = TARGETS[case]
    started = time.perf_counter()
    write_checkpoint(tmp_path / "old", CONFIG, OLD, **old_options)
    longest = time.perf_counter() - started
    chance = random.Random(case)
    for turn in range(8):
        target = tmp_path / str(turn)
        shutil.copytree(tmp_path / "old", target)
        child = write_in_a_child(target, new_options)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        outcome(target)


def test_what_was_left_half_replaced_can_be_written_again_and_is_cleaned_up(tmp_path):
    write_checkpoint(tmp_path, CONFIG, OLD)
    step = 0
    while outcome(tmp_path) != "refused":
        step += 1
        os.waitpid(write_in_a_child(tmp_path, dict(max_shard_size="9KB"), last_step=step), 0)
    with pytest.raises(CheckpointError, match="stopped; write it again with overwrite"):
        open_checkpoint(tmp_path)
    write_new(tmp_path, {})
    assert outcome(tmp_path) == "new"
    names = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".tmp")}
    assert names == {"config.json", "model.safetensors", "opt_manifest.json"}


def test_an_error_amidst_replacing_keeps_the_new_files(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, CONFIG, OLD)
    calls = []

    def fail_at_the_second(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("no space left on device")
        return real(*arguments)

    real = os.replace
    monkeypatch.setattr(os, "replace", fail_at_the_second)
    with pytest.raises(OSError, match="no space"):
        write_new(tmp_path, {})
    monkeypatch.undo()
    assert outcome(tmp_path) == "refused"
    (left,) = tmp_path.glob(".opt-zoo-*")
    assert {path.name for path in [*tmp_path.iterdir(), *left.iterdir()]} >= {"config.json", "model.safetensors"}


def test_an_error_of_the_disk_while_it_is_written_is_raised_though_it_shows_only_once(tmp_path, monkeypatch):
    monkeypatch.setattr("conversion.staging._SECONDS_BETWEEN_SYNCS", 0)
    failed = []

    def fail_once_beside_the_writer(path):
        if threading.current_thread() is not threading.main_thread() and path.is_file() and not failed:
            failed.append(path)
            raise OSError("a page was lost")

    monkeypatch.setattr("conversion.staging.sync_path", fail_once_beside_the_writer)
    slow = {name: lambda array=array: (time.sleep(0.01), array)[1] for name, array in NEW.items()}
    with pytest.raises(OSError, match="a page was lost"):
        write_checkpoint(tmp_path / "target", CONFIG, slow, dtype="float32")
    assert failed
    assert list(tmp_path.iterdir()) == []
