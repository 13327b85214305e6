"""What is written is read again, hashed and looked at: flipped bits, NaN, zeros, and the manifest in every format."""

import contextlib
import json
import logging

import numpy as np
import pytest
from blake3 import blake3
from checkpoints import NUMPY_DTYPES, VARIANTS, config_of, tensors_of

from conversion import open_checkpoint, tables, write, write_checkpoint
from conversion.blocks import count_not_finite, joined_blocks, paired, row_major_blocks
from conversion.manifest import MANIFEST_NAME, differing_weights, read_manifest
from conversion.verification import verify_written
from opt_core.errors import CheckpointError

FORMATS = (
    "safetensors",
    "torch-bin",
    "flax-msgpack",
    "tf-h5",
    "tf-safetensors",
    "metaseq",
    "keras-hub",
    "tf-checkpoint",
)
EMBEDDING = "decoder.embed_tokens.weight"


def marked(tensors):
    """The tensors with values in one of them that a file is searched for."""
    name = "decoder.layers.1.fc2.bias"
    tensors[name][:] = np.arange(1, len(tensors[name]) + 1)
    return name, tensors


def flip_a_bit_of(name, values, folder):
    """In whichever file of the folder holds the values in one run."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        data = bytearray(path.read_bytes())
        place = data.find(values.tobytes())
        if place >= 0:
            data[place] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError(f"{name}: in no file")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("given", ["arrays", "functions", "checkpoint"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_bit_that_flips_between_writing_and_publishing_is_found(tmp_path, monkeypatch, format, given, overwrite):
    config = config_of()
    name, tensors = marked(tensors_of(config))
    given_tensors = {"arrays": tensors, "functions": {key: lambda array=it: array for key, it in tensors.items()}}
    target = tmp_path / "target"
    if overwrite:
        write_checkpoint(target, config, tensors_of(config_of()))
    before = {path: path.read_bytes() for path in target.iterdir()} if overwrite else None

    def flip_then_verify(folder, *arguments):
        flip_a_bit_of(name, tensors[name], folder)
        verify_written(folder, *arguments)

    monkeypatch.setattr(write, "verify_written", flip_then_verify)
    with contextlib.ExitStack() as stack:
        if given == "checkpoint":
            write_checkpoint(tmp_path / "source", config, tensors, verify=False)
            given_tensors[given] = stack.enter_context(open_checkpoint(tmp_path / "source"))
        with pytest.raises(CheckpointError, match=f"{name}: expected the values that were written") as raised:
            write_checkpoint(target, config, given_tensors[given], format=format, overwrite=overwrite)
        assert len(raised.value.problems) == 1
        assert ({path: path.read_bytes() for path in target.iterdir()} if overwrite else None) == before
        assert target.exists() == overwrite
        write_checkpoint(target, config, given_tensors[given], format=format, overwrite=overwrite, verify=False)
    with open_checkpoint(target) as checkpoint:
        assert checkpoint.read(name)[0] == tensors[name][0]


def test_a_weight_that_does_not_read_back_is_named(tmp_path, monkeypatch):
    config = config_of()

    def lose_one(folder, records, *arguments):
        verify_written(folder, {**records, "decoder.more.weight": records[EMBEDDING]}, *arguments)

    monkeypatch.setattr(write, "verify_written", lose_one)
    with pytest.raises(CheckpointError, match=r"decoder\.more\.weight: expected .* got none"):
        write_checkpoint(tmp_path / "target", config, tensors_of(config))


def expected_hashes(tensors, format):
    kept = {name: array.copy() for name, array in tensors.items()}
    if format == "keras-hub":
        kept["decoder.embed_positions.weight"][:2] = 0  # rows for which it has no place
    return {name: blake3(array.tobytes()).hexdigest() for name, array in kept.items()}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_the_manifest_hashes_what_reads_back_in_the_schemas_layout(tmp_path, format, verify):
    config = config_of()
    tensors = tensors_of(config)
    files = write_checkpoint(tmp_path, config, tensors, format=format, verify=verify)
    assert tmp_path / MANIFEST_NAME in files
    manifest = read_manifest(tmp_path)
    assert (manifest.format, manifest.task) == (format, "causal-lm")
    assert {name: record.blake3 for name, record in manifest.weights.items()} == expected_hashes(tensors, format)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {name: record.shape for name, record in manifest.weights.items()} == checkpoint.shapes
        assert {name: record.dtype for name, record in manifest.weights.items()} == checkpoint.dtypes
        assert differing_weights(checkpoint, manifest) == []


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_weights_have_equal_hashes_in_formats_that_hold_them(tmp_path, variant, dtype):
    config = config_of(variant)
    found = {}
    for format in ("safetensors", "flax-msgpack", "tf-h5", "tf-safetensors"):
        with contextlib.suppress(CheckpointError):  # a variant or dtype that the format has no place for
            write_checkpoint(tmp_path / format, config, tensors_of(config), format=format, dtype=dtype)
            found[format] = read_manifest(tmp_path / format).weights
    assert all(weights == found["safetensors"] for weights in found.values())
    other = tensors_of(config)
    other[EMBEDDING][5, 3] += 1
    write_checkpoint(tmp_path / "other", config, other, dtype=dtype)
    changed = read_manifest(tmp_path / "other").weights
    assert [name for name in changed if changed[name] != found["safetensors"][name]] == [EMBEDDING]


def test_a_checkpoint_is_compared_with_its_manifest_after_a_change(tmp_path):
    config = config_of()
    name, tensors = marked(tensors_of(config))
    write_checkpoint(tmp_path, config, tensors)
    flip_a_bit_of(name, tensors[name], tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert differing_weights(checkpoint, read_manifest(tmp_path)) == [name]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda fields: fields.update(version=2), "version"),
        (lambda fields: fields.pop("format"), "format"),
        (lambda fields: fields.update(weights=[]), "weights"),
        (lambda fields: fields["weights"][EMBEDDING].update(blake3="0"), EMBEDDING),
        (lambda fields: fields["weights"][EMBEDDING].update(shape=[True]), EMBEDDING),
        (lambda fields: fields["weights"].update(more=3), "more"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(tmp_path, change, problem):
    write_checkpoint(tmp_path, config_of(), tensors_of(config_of()))
    fields = json.loads((tmp_path / MANIFEST_NAME).read_text())
    change(fields)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=rf"opt_manifest\.json: {problem}: "):
        read_manifest(tmp_path)


def test_the_published_loaders_take_no_notice_of_the_manifest(tmp_path):
    transformers = pytest.importorskip("transformers")
    keras_hub = pytest.importorskip("keras_hub")
    config = config_of()
    tensors = tensors_of(config)
    for format in ("safetensors", "keras-hub"):
        write_checkpoint(tmp_path / format, config, tensors, format=format)
        assert (tmp_path / format / MANIFEST_NAME).is_file()
    model, info = transformers.OPTForCausalLM.from_pretrained(tmp_path / "safetensors", output_loading_info=True)
    assert not any(info.values())
    assert np.array_equal(model.model.decoder.embed_tokens.weight.detach().numpy(), tensors[EMBEDDING])
    backbone = keras_hub.models.OPTBackbone.from_preset(str(tmp_path / "keras-hub"))
    assert np.array_equal(np.asarray(backbone.token_embedding.embeddings), tensors[EMBEDDING])


# -- what values are ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*NUMPY_DTYPES, "float64"])
@pytest.mark.parametrize("format", ["safetensors", "flax-msgpack"])
def test_nan_and_infinities_are_all_listed_and_nothing_is_written(tmp_path, format, dtype):
    config = config_of()
    tensors = {name: array.astype(NUMPY_DTYPES.get(dtype, dtype)) for name, array in tensors_of(config).items()}
    tensors["decoder.layers.1.fc1.weight"][3, 5] = np.nan
    tensors["decoder.layers.2.fc2.bias"][:2] = np.inf, -np.inf
    with pytest.raises(CheckpointError) as raised:
        write_checkpoint(tmp_path / "target", config, tensors, format=format)
    assert [problem.partition(";")[0] for problem in raised.value.problems] == [
        "decoder.layers.1.fc1.weight: expected finite values, got 1 NaN or infinite ones",
        "decoder.layers.2.fc2.bias: expected finite values, got 2 NaN or infinite ones",
    ]
    assert list(tmp_path.iterdir()) == []
    write_checkpoint(tmp_path / "target", config, tensors, format=format, allow_nonfinite=True)
    with open_checkpoint(tmp_path / "target") as checkpoint:
        assert checkpoint.read("decoder.layers.2.fc2.bias").tobytes() == tensors["decoder.layers.2.fc2.bias"].tobytes()


def test_matrices_of_zeros_are_named_in_a_warning_and_written(tmp_path, caplog):
    config = config_of()
    tensors = tensors_of(config)
    tensors["decoder.layers.1.fc1.weight"][:] = 0
    tensors["decoder.layers.1.fc1.bias"][:] = 0  # no matrix: biases of zeros are usual
    tensors["decoder.layers.2.fc1.weight"][1:] = 0
    with caplog.at_level(logging.WARNING):
        write_checkpoint(tmp_path, config, tensors)
    assert [record.getMessage() for record in caplog.records] == [
        "matrices of zeros alone: decoder.layers.1.fc1.weight"
    ]


@pytest.mark.parametrize("dtype", [*NUMPY_DTYPES, "float64"])
def test_only_nan_and_infinities_are_counted_as_not_finite(dtype):
    dtype = np.dtype(NUMPY_DTYPES.get(dtype, dtype))
    bits = np.arange(1 << 16, dtype=np.uint16) if dtype.itemsize == 2 else None
    values = bits.view(dtype) if bits is not None else np.array([0, -0.0, 1e-40, 3e38, np.inf, -np.inf, np.nan], dtype)
    with np.errstate(invalid="ignore"):  # of signalling NaN
        assert count_not_finite(values) == np.count_nonzero(~np.isfinite(values.astype(np.float64)))
    assert count_not_finite(values[:3]) == 0


# -- pieces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*NUMPY_DTYPES.values(), np.float64])
@pytest.mark.parametrize(
    "view",
    [
        lambda a: a,
        lambda a: a.T,
        lambda a: a[::2],
        lambda a: a[3:, 5:],
        lambda a: a.reshape(13, 47, 1021).transpose(2, 0, 1),
        lambda a: a.reshape(13, 47, 1021).transpose(1, 2, 0),
        lambda a: a.reshape(13, 47, 1021).transpose(2, 1, 0),
        lambda a: a.T[:1],
        lambda a: a[:1, :1],
        lambda a: a.reshape(-1)[::7],
    ],
)
def test_blocks_are_the_values_in_row_major_order(monkeypatch, view, dtype):
    monkeypatch.setattr("conversion.blocks._RUN_BYTES", 4096)
    monkeypatch.setattr("conversion.blocks._BUFFER_BYTES", 300_000)
    array = view((np.arange(13 * 47 * 1021) % 251).astype(dtype).reshape(13 * 47, 1021))
    blocks = [block.copy() for block in row_major_blocks(array)]
    assert {block.dtype for block in blocks} == {array.dtype}
    assert np.concatenate(blocks).tobytes() == array.tobytes()
    assert max(block.nbytes for block in blocks) <= 300_000


@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_are_joined_along_their_axis(monkeypatch, axis):
    monkeypatch.setattr("conversion.blocks._BUFFER_BYTES", 1000)
    array = np.arange(59 * 61, dtype=np.float32).reshape(59, 61)
    pieces = np.split(array, [7, 30], axis)
    assert np.concatenate([block.copy() for block in joined_blocks(pieces, axis)]).tobytes() == array.tobytes()


def test_pieces_of_different_lengths_are_paired():
    first, second = (np.split(np.arange(100), cuts) for cuts in ([3, 50], [1, 4, 50, 99]))
    pairs = list(paired(first, second))
    assert np.array_equal(np.concatenate([a for a, _ in pairs]), np.arange(100))
    assert all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("format", [format.name for format in tables.FORMATS.values() if format.is_written])
def test_pieces_are_what_read_gives_though_maps_are_let_go_of(tmp_path, monkeypatch, format):
    monkeypatch.setattr("conversion.checkpoint._MAPPED_BYTES", 1)
    tensors = tensors_of(config_of())
    write_checkpoint(tmp_path, config_of(), tensors, format=format)
    with open_checkpoint(tmp_path) as checkpoint:
        pieces = {name: checkpoint.pieces(name) for name in tensors}
        for name in tensors:
            blocks = [block.copy() for block in joined_blocks(*pieces[name])]
            assert np.concatenate(blocks).tobytes() == checkpoint.read(name).tobytes()
