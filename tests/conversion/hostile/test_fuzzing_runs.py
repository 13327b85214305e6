"""Damaged adapters and states of training are read as declared or refused in our words, every array that is read whole.

As in `test_fuzzing.py`; in this process, since their files are safetensors and JSON alone.
"""

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import config_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conversion import write_checkpoint
from conversion.adapters import read_adapter, write_adapter
from conversion.training_state import read_training_state, write_training_state
from hostile.mutation import edits, json_edits, mutated, other_json
from hostile.worker import SECONDS
from opt_core.errors import CheckpointError, ConfigError
from opt_core.lora import LoraConfig, new_adapter
from opt_core.optimization import Moments, TrainingRecipe
from opt_core.schema import shapes
from opt_core.synthetic import random_tensors

CONFIG = config_of(
    vocab_size=16, hidden_size=6, num_hidden_layers=1, ffn_dim=10, max_position_embeddings=5, num_attention_heads=2
)
LORA = LoraConfig(r=2, target_modules=("fc1", "q_proj"))
QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def write_an_adapter(folder: Path) -> None:
    write_adapter(folder, LORA, new_adapter(CONFIG, LORA))


def write_a_state(folder: Path) -> None:
    tensors = dict(random_tensors(CONFIG))
    write_checkpoint(folder, CONFIG, tensors)
    moments = {name: Moments(array, np.abs(array)) for name, array in tensors.items()}
    write_training_state(folder, 3, 7, TrainingRecipe(), moments, {"text": "Hamlet"})


def look_at_adapter(folder: Path, config) -> None:
    lora, pairs = read_adapter(folder, config)
    for array in (array for pair in pairs.values() for array in pair.values()):
        assert lora.r in array.shape
        np.sum(array, dtype=np.float64)  # every byte is there


def look_at_state(folder: Path, config) -> None:
    state = read_training_state(folder, config and shapes(config))
    assert state.step >= 0
    for array in (array for pair in state.moments.values() for array in pair):
        assert array.dtype == np.float32
        np.sum(array, dtype=np.float64)


KINDS = {"adapter": (write_an_adapter, look_at_adapter), "state of training": (write_a_state, look_at_state)}


def fuzz(kind: str, folder: Path, examples: int, **options) -> None:
    """Damages one file at a time: bytes of any, other values in those that are JSON."""
    write, look_at = KINDS[kind]
    write(folder)
    look_at(folder, CONFIG)
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    @settings(max_examples=examples, **QUIET, **options)
    @given(path=st.sampled_from([*files]), bytes_=edits, values=json_edits, config=st.sampled_from([CONFIG, None]))
    def survives(path, bytes_, values, config):
        data = files[path]
        is_json = path.suffix == ".json" and len(values) > 1
        path.write_bytes(other_json(data, values) if is_json else mutated(data, bytes_))
        start = time.process_time()
        try:
            with contextlib.suppress(CheckpointError, ConfigError):
                look_at(folder, config)
        finally:
            path.write_bytes(data)
        assert time.process_time() - start < SECONDS

    survives()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_as_declared_or_refused(kind, tmp_path):
    fuzz(kind, tmp_path, 100, derandomize=True, phases=[Phase.generate])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_read_as_declared_or_refused_in_many_more_examples(kind, tmp_path):
    fuzz(kind, tmp_path, 20_000)
