"""Checkpoints of parts: whole or not there, refused by all that is wrong with them, and nothing in them is executed.

Several processes write and read them in test_torch_sharded_training.py.
"""

import json
import pickle

import numpy as np
import pytest
from harness import config_of, load_backend, save_random, token_ids

from opt_core.errors import CheckpointError, InputError
from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe
from opt_torch import distributed_checkpoint
from opt_torch.distributed_checkpoint import CONTENTS_NAME, restore_distributed, save_distributed
from opt_torch.lora import add_lora
from opt_torch.training import Trainer

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")


def trainer_of(steps: int = 0, dtype: str = "float32", **changes) -> Trainer:
    config = config_of(**changes)
    trainer = Trainer(load_backend("torch").random_model(config, dtype=dtype), TrainingRecipe(0.01), seed=5)
    ids = token_ids(config)
    for _ in range(steps):
        trainer.step(dict(input_ids=ids, labels=ids))
    return trainer


def values_of(trainer: Trainer) -> dict[str, np.ndarray]:
    pairs = {f"{kind}.{name}": x for name, pair in trainer.moments().items() for kind, x in pair._asdict().items()}
    return {name: x.detach().numpy().copy() for name, x in (trainer.parameters | pairs).items()}


def check_equal(got: Trainer, want: Trainer):
    mine, theirs = values_of(got), values_of(want)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert (got.step_count, got.seed) == (want.step_count, want.seed)


@pytest.fixture
def saved(tmp_path):
    save_distributed(trainer_of(2), tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("file_bytes", [2**30, 20_000])
def test_a_trainer_comes_back_as_it_was(tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(distributed_checkpoint, "FILE_BYTES", file_bytes)
    trainer, other = trainer_of(2), trainer_of()
    save_distributed(trainer, tmp_path / "saved")
    assert (len(list((tmp_path / "saved").glob("*.safetensors"))) > 5) == (file_bytes == 20_000)
    other.seed = 7
    restore_distributed(other, tmp_path / "saved")
    check_equal(other, trainer)
    ids = token_ids(trainer.model.config)
    assert other.step(dict(input_ids=ids, labels=ids)) == trainer.step(dict(input_ids=ids, labels=ids))


def test_a_model_takes_the_weights_alone(saved):
    model, trainer = trainer_of().model, trainer_of()
    restore_distributed(model, saved)
    restore_distributed(trainer, saved)
    for got, want in zip(model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(got, want)
    save_distributed(model, saved.with_name("model"))
    restore_distributed(trainer_of().model, saved.with_name("model"))
    with pytest.raises(CheckpointError) as caught:
        restore_distributed(trainer_of(), saved.with_name("model"))
    assert sum(": missing" in problem for problem in caught.value.problems) == len(values_of(trainer)) * 2 // 3


def test_nothing_in_it_is_executed(saved, monkeypatch):
    """`torch.distributed.checkpoint` would unpickle a file `.metadata`, and entries that are not tensors."""
    (saved / ".metadata").write_bytes(pickle.dumps(print))
    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("unpickled"))
    restore_distributed(trainer_of(), saved)


def test_every_tensor_that_does_not_fit_is_named_and_nothing_is_changed(saved):
    trainer = trainer_of(ffn_dim=59, enable_bias=False, word_embed_proj_dim=19)
    before = values_of(trainer)
    with pytest.raises(CheckpointError) as caught:
        restore_distributed(trainer, saved)
    problems = set(caught.value.problems)
    assert {
        "decoder.layers.0.fc1.weight: expected (59, 35), got (53, 35)",
        "exp_avg.decoder.layers.2.fc2.weight: expected (35, 59), got (35, 53)",
        "decoder.layers.0.fc1.bias: unexpected, got (53,)",
        "exp_avg_sq.decoder.project_in.weight: missing, expected (35, 19)",
    } < problems
    for name, x in values_of(trainer).items():
        np.testing.assert_array_equal(x, before[name])
    with pytest.raises(CheckpointError, match=r"decoder\.embed_tokens\.weight: expected bfloat16, got float32"):
        restore_distributed(trainer_of(dtype="bfloat16"), saved)


def test_files_that_are_missing_cut_short_or_of_another_are_named(saved, monkeypatch):
    monkeypatch.setattr(distributed_checkpoint, "FILE_BYTES", 20_000)
    target = saved.with_name("many")
    save_distributed(trainer_of(2), target)
    first, second, third, *_ = sorted(target.glob("*.safetensors"))
    third.rename(target / "other.safetensors")
    second.unlink()
    first.write_bytes(first.read_bytes()[:-4])
    with pytest.raises(CheckpointError) as caught:
        restore_distributed(trainer_of(), target)
    names = [problem.partition(":")[0] for problem in caught.value.problems]
    assert names == [first.name, second.name, third.name, "other.safetensors"]


def test_parts_in_other_places_than_they_were_are_no_tensor(saved):
    contents = json.loads((saved / CONTENTS_NAME).read_text())
    ((name, _),) = contents["files"].items()
    content = (saved / name).read_bytes()
    wrong = content.replace(b'saved_offsets\\": [0, 0]', b'saved_offsets\\": [0, 7]', 1)
    assert wrong != content
    (saved / name).write_bytes(wrong)
    with pytest.raises(CheckpointError, match=r"expected \(\d+, \d+\), got"):
        restore_distributed(trainer_of(), saved)
    (saved / name).write_bytes(content.replace(b"DCP_SHARDING_INFO", b"DCP_SHARDING_INF0"))
    with pytest.raises(CheckpointError, match="DCP_SHARDING_INFO: expected a place for each tensor"):
        restore_distributed(trainer_of(), saved)


@pytest.mark.parametrize("moment", ["_publish", "sync_path", "os.rename"])
def test_a_save_that_is_stopped_leaves_nothing_that_opens(tmp_path, monkeypatch, moment):
    class Stopped(BaseException):
        pass

    def stop(*_, **__):
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(f"opt_torch.distributed_checkpoint.{moment}", stop)
        with pytest.raises(Stopped):
            save_distributed(trainer_of(1), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(CheckpointError, match=r"distributed\.json: missing"):
        restore_distributed(trainer_of(), tmp_path / "saved")
    save_distributed(trainer_of(1), tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_what_it_cannot_do_is_refused(saved):
    with pytest.raises(FileExistsError, match="expected no such folder"):
        save_distributed(trainer_of(), saved)
    (saved / CONTENTS_NAME).write_text('{"version": 2, "files": {}}')
    with pytest.raises(CheckpointError, match="version: expected 1, got 2"):
        restore_distributed(trainer_of(), saved)
    trainer = trainer_of()
    add_lora(trainer.model, LoraConfig(r=3))
    with pytest.raises(InputError, match=r"Trainer\.save writes them"):
        save_distributed(trainer, saved.with_name("adapters"))


def test_a_checkpoint_of_another_kind_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="save_distributed writes it last"):
        restore_distributed(trainer_of(), save_random(tmp_path, config_of()))
