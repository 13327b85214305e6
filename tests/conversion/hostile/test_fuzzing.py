"""Whatever happens to the bytes of a valid file, it is read as declared or refused in our words: no crash, no hang."""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path

import pytest
from checkpoints import config_of, tensors_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hostile.bases import BASES
from hostile.mutation import edits, json_edits, mutated, other_json
from hostile.sealing import SEALED
from hostile.worker import MEGABYTES, SECONDS, Worker
from opt_core import OPTConfig
from opt_core.config import ALIASES
from opt_core.errors import ConfigError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")

SMALL = config_of(
    vocab_size=16, hidden_size=6, num_hidden_layers=1, ffn_dim=10, max_position_embeddings=5, num_attention_heads=2
)
WITH_JSON = ("safetensors in shards", "orbax", "orbax in folders", "keras-hub in shards", "ctranslate2")
QUIET = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def small_checkpoint(base: str, folder: Path) -> dict[Path, bytes]:
    """The bytes of every file of a checkpoint."""
    shards = dict(max_shard_size=256) if base.endswith("in shards") and "keras" not in base else {}
    config = SMALL.replace(do_layer_norm_before=False, word_embed_proj_dim=3) if base.endswith("350m") else SMALL
    BASES[base](folder, config=config, tensors=tensors_of(config), **shards)
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def put_back(files: dict[Path, bytes]):
    try:
        yield
    finally:
        for path, data in files.items():
            path.write_bytes(data)


def examined(worker: Worker, folder: Path, verify: bool) -> None:
    outcome = worker.run(folder, opening=dict(verify=verify))
    assert outcome.is_allowed, f"{outcome.kind}: {outcome.text}"
    assert outcome.seconds < SECONDS
    assert outcome.megabytes < MEGABYTES


def fuzz(base: str, folder: Path, examples: int, **options) -> None:
    """Damages one file of a checkpoint at a time, and examines the folder in another process."""
    files = small_checkpoint(base, folder)
    weights = [path for path in files if path.suffix != ".json"]
    worker = Worker(warm_up=folder)
    assert worker.run(folder).kind == "read"

    @settings(max_examples=examples, **QUIET, **options)
    @given(path=st.sampled_from([*weights, *weights, *files]), changes=edits, verify=st.booleans())
    def survives(path, changes, verify):
        with put_back({path: files[path]}):
            path.write_bytes(mutated(files[path], changes))
            examined(worker, folder, verify)

    with contextlib.closing(worker):
        survives()


def fuzz_sealed(sealed: str, folder: Path, examples: int, **options) -> None:
    """The same, with checksums made right again."""
    base, reseal = SEALED[sealed]
    files = small_checkpoint(base, folder)
    worker = Worker(warm_up=folder)
    with put_back(files):
        reseal(folder, bytes)
        assert worker.run(folder, opening=dict(verify=True)).kind == "read"

    @settings(max_examples=examples, **QUIET, **options)
    @given(changes=edits)
    def survives(changes):
        with put_back(files):
            reseal(folder, lambda data: mutated(data, changes))
            examined(worker, folder, verify=False)

    with contextlib.closing(worker):
        survives()


def is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), (dict, list))
    except ValueError:
        return False


def fuzz_json(base: str, folder: Path, examples: int, **options) -> None:
    """The same, with other values in the files that are JSON."""
    files = {path: data for path, data in small_checkpoint(base, folder).items() if is_json(data)}
    worker = Worker(warm_up=folder)
    assert worker.run(folder).kind == "read"

    @settings(max_examples=examples, **QUIET, **options)
    @given(path=st.sampled_from([*files]), changes=json_edits)
    def survives(path, changes):
        with put_back({path: files[path]}):
            path.write_bytes(other_json(files[path], changes))
            examined(worker, folder, verify=False)

    with contextlib.closing(worker):
        survives()


@pytest.mark.parametrize("base", WITH_JSON)
def test_json_of_other_values_is_read_as_declared_or_refused(base, tmp_path):
    fuzz_json(base, tmp_path / "source", 100, derandomize=True, phases=[Phase.generate])


@pytest.mark.parametrize("base", BASES)
def test_damaged_bytes_are_read_as_declared_or_refused(base, tmp_path):
    fuzz(base, tmp_path / "source", 100, derandomize=True, phases=[Phase.generate])


@pytest.mark.parametrize("sealed", SEALED)
def test_damage_behind_checksums_is_read_as_declared_or_refused(sealed, tmp_path):
    fuzz_sealed(sealed, tmp_path / "source", 100, derandomize=True, phases=[Phase.generate])


names = st.sampled_from([*(field.name for field in dataclasses.fields(OPTConfig)), *ALIASES, "model_type", "more"])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = st.text(max_size=3) | st.sampled_from(["0", "1"])
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))


@settings(max_examples=300, derandomize=True, phases=[Phase.generate], **QUIET)
@given(fields=st.dictionaries(names, values, max_size=4))
def test_a_config_of_any_values_is_read_or_refused(fields):
    with contextlib.suppress(ConfigError):
        config = OPTConfig.from_dict(fields)
        assert OPTConfig.from_dict(config.replace(torch_dtype="float16").to_dict()).torch_dtype == "float16"


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_damaged_bytes_are_read_as_declared_or_refused_in_many_more_examples(base, tmp_path):
    fuzz(base, tmp_path / "source", 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("sealed", SEALED)
def test_damage_behind_checksums_is_read_as_declared_or_refused_in_many_more_examples(sealed, tmp_path):
    fuzz_sealed(sealed, tmp_path / "source", 20_000)


@pytest.mark.slow
@pytest.mark.parametrize("base", WITH_JSON)
def test_json_of_other_values_is_read_as_declared_or_refused_in_many_more_examples(base, tmp_path):
    fuzz_json(base, tmp_path / "source", 20_000)
