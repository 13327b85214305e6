"""From any format to any other and back: the same bits, for every variant and dtype that the formats can hold."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import NUMPY_DTYPES, VARIANTS, assert_holds, config_of, tensors_of

from conversion import open_checkpoint, write_checkpoint
from conversion.formats import FORMATS, refusals

WRITTEN = [format for format in FORMATS.values() if format.is_written]


def holds(format, config, dtype="float32", parts=1) -> bool:
    return dtype in format.dtypes and not refusals(format, config, "causal-lm", parts)


def without_unused_rows(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows 0 and 1 of the position table, which no real token uses and some formats lack, are zeros."""
    positions = tensors["decoder.embed_positions.weight"].copy()
    positions[:2] = 0
    return {**tensors, "decoder.embed_positions.weight": positions}


def convert(source: Path, target: Path, format: str, **options) -> Path:
    with open_checkpoint(source) as checkpoint:
        checkpoint.check()
        write_checkpoint(target, checkpoint.config, checkpoint, task=checkpoint.task, format=format, **options)
    return target


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_journey_through_every_format_ends_with_the_bits_it_began_with(tmp_path, variant, dtype):
    config = config_of(variant, vocab_size=102, ffn_dim=38)
    tensors = without_unused_rows(tensors_of(config, dtype=dtype))
    write_checkpoint(tmp_path / "0", config, tensors)
    stations = [format.name for format in WRITTEN if holds(format, config, dtype)]
    assert len(stations) >= 6
    for number, name in enumerate(stations, start=1):
        convert(tmp_path / str(number - 1), tmp_path / str(number), name)
        with open_checkpoint(tmp_path / str(number)) as checkpoint:
            assert checkpoint.format == name
            checkpoint.check(config)
            assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("source", WRITTEN, ids=lambda format: format.name)
@pytest.mark.parametrize("target", WRITTEN, ids=lambda format: format.name)
def test_any_format_converts_to_any_other(tmp_path, source, target):
    config = config_of()
    tensors = without_unused_rows(tensors_of(config))
    write_checkpoint(tmp_path / "a", config, tensors, format=source.name)
    convert(tmp_path / "a", tmp_path / "b", target.name)
    with open_checkpoint(tmp_path / "b") as checkpoint:
        checkpoint.check(config)
        assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("variant", ["pre-norm", "no-bias", "non-affine", "untied"])
def test_model_parallel_parts_come_together_from_and_to_any_number(tmp_path, variant):
    config = config_of(variant, vocab_size=102, ffn_dim=42, hidden_size=18, num_attention_heads=6)
    tensors = tensors_of(config)
    write_checkpoint(tmp_path / "6", config, tensors, format="metaseq", parts=6)
    convert(tmp_path / "6", tmp_path / "2", "metaseq", parts=2)
    convert(tmp_path / "2", tmp_path / "3", "metaseq", parts=3)
    assert len(list((tmp_path / "3").glob("*.pt"))) == 3
    convert(tmp_path / "3", tmp_path / "whole", "safetensors")
    for folder in ("6", "2", "3", "whole"):
        with open_checkpoint(tmp_path / folder) as checkpoint:
            checkpoint.check(config)
            assert_holds(checkpoint, tensors)


@pytest.mark.parametrize("format", [it for it in WRITTEN if not it.is_written_in_parts], ids=lambda format: format.name)
def test_a_format_without_parts_refuses_several(tmp_path, format):
    with pytest.raises(ValueError, match=f"parts: expected 1 for {format.name}, got 2"):
        write_checkpoint(tmp_path / "a", config_of(), tensors_of(config_of()), format=format.name, parts=2)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("format", WRITTEN, ids=lambda format: format.name)
def test_every_variant_is_held_or_refused_with_the_field_that_does_not_fit(tmp_path, format):
    for variant, fields in VARIANTS.items():
        config = config_of(variant)
        if holds(format, config):
            continue
        with pytest.raises(ValueError, match=format.name) as raised:
            write_checkpoint(tmp_path / variant, config, tensors_of(config), format=format.name)
        said = str(raised.value).replace("has_final_layer_norm", "_remove_final_layer_norm")
        said = said.replace("has_all_heads", "pruned_heads")
        assert any(field in said for field in fields), variant
        assert not (tmp_path / variant).exists()


@contextmanager
def no_file_larger_than(nbytes: int) -> Iterator[None]:
    """As a disk that is full: a write beyond it is an error of the operating system."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("format", WRITTEN, ids=lambda format: format.name)
def test_a_disk_that_is_full_is_an_error_of_the_system_and_nothing_is_left(tmp_path, format):
    config = config_of()
    tensors = tensors_of(config)
    with pytest.raises(OSError, match=r"(?i)file too large"), no_file_larger_than(20_000):
        write_checkpoint(tmp_path / "a", config, tensors, format=format.name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", WRITTEN, ids=lambda format: format.name)
def test_an_error_amidst_the_weights_is_passed_on_and_nothing_is_left(tmp_path, format):
    config = config_of(num_hidden_layers=1)
    tensors = {**tensors_of(config), "decoder.layers.0.fc2.weight": lambda: 1 / 0}
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "a", config, tensors, format=format.name, dtype="float32")
    assert not list(tmp_path.iterdir())
