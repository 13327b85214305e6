"""Other programs read what is written here, and the reverse: torch, safetensors and transformers 4.57.6."""

import zipfile

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from checkpoints import NUMPY_DTYPES, VARIANTS, assert_holds, config_of, tensors_of

from conversion import open_checkpoint, write_checkpoint
from conversion.pytorch.torch_zip import read_tensors
from opt_core.schema import published_name

CLASSES = {
    "base": transformers.OPTModel,
    "causal-lm": transformers.OPTForCausalLM,
    "sequence-classification": transformers.OPTForSequenceClassification,
    "question-answering": transformers.OPTForQuestionAnswering,
}


# transformers 4.57.6 has no pruned OPT: a config that names pruned heads ends in an AttributeError of its own.
PRUNED = {"pruned"}


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_published(tensors: dict[str, np.ndarray], task: str = "causal-lm") -> dict[str, torch.Tensor]:
    return {published_name(name, task): as_torch(array) for name, array in tensors.items()}


def published_model(config, task: str, dtype: str = "float32"):
    fields = {key: value for key, value in config.to_dict().items() if key != "torch_dtype"}
    model = CLASSES[task](transformers.OPTConfig(**fields)).to(getattr(torch, dtype))
    missing, unexpected = model.load_state_dict(as_published(tensors_of(config, task, dtype), task), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("format", ["safetensors", "torch-bin"])
@pytest.mark.parametrize("variant", sorted(VARIANTS.keys() - PRUNED))
def test_transformers_loads_what_is_written(tmp_path, variant, format):
    config = config_of(variant)
    tensors = tensors_of(config, dtype="bfloat16")
    write_checkpoint(tmp_path, config, tensors, format=format, max_shard_size="9KB")
    model, info = transformers.OPTForCausalLM.from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    state = model.state_dict()
    for name, tensor in as_published(tensors).items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("task", CLASSES)
def test_every_class_of_transformers_loads_its_task(tmp_path, task):
    config = config_of("350m-style", num_labels=5)
    tensors = tensors_of(config, task)
    write_checkpoint(tmp_path, config, tensors, task=task)
    model, info = CLASSES[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(model.state_dict()[name], t) for name, t in as_published(tensors, task).items())
    assert transformers.AutoConfig.from_pretrained(tmp_path).architectures == [CLASSES[task].__name__]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("shard_size", ["5GB", "9KB"])
@pytest.mark.parametrize("task", CLASSES)
def test_what_transformers_saves_is_read(tmp_path, task, shard_size, safe):
    config = config_of("350m-style", num_labels=5)
    published_model(config, task, "float16").save_pretrained(
        tmp_path, safe_serialization=safe, max_shard_size=shard_size
    )
    with open_checkpoint(tmp_path, verify=True) as checkpoint:
        checkpoint.check()
        assert (checkpoint.task, checkpoint.format) == (task, "safetensors" if safe else "torch-bin")
        assert checkpoint.config.torch_dtype == "float16"
        assert_holds(checkpoint, tensors_of(config, task, "float16"))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize(
    "variant", sorted(VARIANTS.keys() - PRUNED - {"non-affine"})
)  # 4.57.6 cannot build the last one
def test_every_variant_that_transformers_saves_is_read(tmp_path, variant, safe):
    config = config_of(variant)
    published_model(config, "causal-lm").save_pretrained(tmp_path, safe_serialization=safe)
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, tensors_of(config))


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_torch_and_safetensors_read_the_single_files(tmp_path, dtype):
    config = config_of("untied")
    tensors = tensors_of(config, dtype=dtype)
    (as_bin, *_), (as_safetensors, *_) = (
        write_checkpoint(tmp_path / format, config, tensors, format=format) for format in ("torch-bin", "safetensors")
    )
    for state in (
        torch.load(as_bin, weights_only=True),
        torch.load(as_bin, weights_only=True, mmap=True),
        torch.load(as_bin, weights_only=False),
        safetensors.torch.load_file(as_safetensors),
    ):
        assert state.keys() == as_published(tensors).keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in as_published(tensors).items())
    with safetensors.safe_open(as_safetensors, "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    with open(as_safetensors, "rb") as file:
        assert (8 + int.from_bytes(file.read(8), "little")) % 64 == 0


@pytest.mark.parametrize("limit", [None, 500])
def test_every_tensor_of_a_bin_is_aligned_even_with_the_fields_of_files_over_4_gb(tmp_path, monkeypatch, limit):
    if limit:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
    config = config_of()
    tensors = tensors_of(config)
    path, *_ = write_checkpoint(tmp_path, config, tensors, format="torch-bin")
    assert {tensor.offset % 64 for tensor in read_tensors(path, verify=True).values()} == {0}
    state = torch.load(path, weights_only=True, mmap=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in as_published(tensors).items())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_files_that_torch_saves_in_any_pickle_protocol_are_read(tmp_path, protocol):
    config = config_of()
    torch.save(as_published(tensors_of(config)), tmp_path / "w.bin", pickle_protocol=protocol)
    with open_checkpoint(tmp_path / "w.bin", config=config, verify=True) as checkpoint:
        assert_holds(checkpoint, tensors_of(config))


def test_offsets_strides_and_shared_storages_of_a_bin_are_honoured(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    state = as_published(tensors)
    flat = torch.cat([tensor.reshape(-1) for tensor in state.values()])
    views, start = {}, 0
    for name, tensor in state.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    transposed = "model.decoder.layers.1.fc1.weight"
    views[transposed] = state[transposed].T.contiguous().T
    wide = torch.zeros(31, 47)
    wide[:, 3:25] = state["model.decoder.layers.0.fc1.weight"]
    views["model.decoder.layers.0.fc1.weight"] = wide[:, 3:25]
    views["lm_head.weight"] = views["model.decoder.embed_tokens.weight"]
    torch.save(views, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path / "pytorch_model.bin", config=config) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, tensors)


def test_parameters_and_modules_state_dicts_are_read(tmp_path):
    config = config_of()
    model = published_model(config, "causal-lm")
    torch.save(dict(model.named_parameters()), tmp_path / "parameters.bin")
    torch.save(model.state_dict(), tmp_path / "state.bin")  # an OrderedDict with `_metadata`
    for name in ("parameters.bin", "state.bin"):
        with open_checkpoint(tmp_path / name, config=config) as checkpoint:
            assert_holds(checkpoint, tensors_of(config))


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_what_the_safetensors_package_writes_is_read(tmp_path, dtype):
    config = config_of()
    safetensors.torch.save_file(as_published(tensors_of(config, dtype=dtype)), tmp_path / "model.safetensors")
    config.to_json(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.config.torch_dtype == dtype
        assert_holds(checkpoint, tensors_of(config, dtype=dtype))


def test_a_tensor_at_an_odd_address_is_read_as_an_aligned_copy(tmp_path):
    config = config_of()
    tensors = tensors_of(config)
    path = write_checkpoint(tmp_path, config, tensors)[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.read("decoder.embed_tokens.weight").flags.aligned
        assert_holds(checkpoint, tensors)


@pytest.mark.filterwarnings("error")
def test_torch_takes_the_arrays_without_a_copy_and_without_a_warning(tmp_path):
    config = config_of()
    write_checkpoint(tmp_path, config, tensors_of(config))
    with open_checkpoint(tmp_path) as checkpoint:
        array = checkpoint.read("decoder.layers.0.fc1.weight")
        assert torch.from_numpy(array).data_ptr() == array.ctypes.data
