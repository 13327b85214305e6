"""`from_pretrained` and `save_pretrained`, TensorFlow."""

import tempfile

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor
from tensorflow.experimental import dtensor

from conversion import push_folder, write_checkpoint
from conversion.parameters import read_parameters
from conversion.pretrained import Pretrained, open_pretrained
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.keywords import SAVING, arguments_of, check_keywords, only_one
from opt_core.schema import published_name, shapes
from opt_core.sharding import RULES
from opt_tf.layers import Module, no_values
from opt_tf.sharding import Placement, place, set_value, specs_on

ALIGNMENT = 64  # bytes; TensorFlow's kernels end the process over memory of a smaller one


class LoadingMixin:
    """Reading and writing checkpoints, for a model with `config` and `task`."""

    @classmethod
    def from_pretrained(
        cls,
        source,
        *,
        config: OPTConfig | None = None,
        dtype=None,
        torch_dtype=None,
        attn_implementation: str = "sdpa",
        revision: str | None = None,
        cache_dir=None,
        local_files_only: bool = False,
        force_download: bool = False,
        token=None,
        subfolder: str | None = None,
        device=None,
        device_mesh: dtensor.Mesh | None = None,
        output_loading_info: bool = False,
        **overrides,
    ):
        """Loads a folder, a weight file or a hub id.

        Weights are memory-mapped: where the file holds the dtype asked for, at addresses that TensorFlow takes
        (multiples of 64 bytes, as this project writes them), variables on a CPU share the file's pages; else they are
        copied once.

        Args:
            dtype: None for float32, "auto" for the stored one, a dtype or its name, or a Keras policy or its name, such
                as "mixed_bfloat16". `torch_dtype` is an alias.
            device: where the variables go, e.g. "/GPU:1"; by default where TensorFlow puts them.
            device_mesh: a mesh (`opt_tf.sharding.init_mesh`) over whose devices the model is cut, one weight after
                another, for inference; its layout is that of `opt_core.sharding.RULES`.
            output_loading_info: also return which weights the checkpoint lacked or had in excess, and "bytes_read", of
                weights from the files.
            overrides: fields of the config, e.g. `num_labels=3`.

        Raises:
            ConfigError, CheckpointError, InputError: everything wrong with the files or arguments; nothing is loaded.
        """
        only_one("from_pretrained", device=device, device_mesh=device_mesh)
        dtype = only_one("from_pretrained", dtype=dtype, torch_dtype=torch_dtype)
        policy = _mixed_policy(dtype)
        pretrained = open_pretrained(
            source,
            cls.task,
            config=config,
            overrides=overrides,
            dtype=name_of(dtype) if policy is None else policy.variable_dtype,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
            subfolder=subfolder,
        )
        placement = None if device_mesh is None else Placement(device_mesh, RULES)
        model = cls._from_checkpoint(pretrained, attn_implementation, device, policy, placement)
        if pretrained.generation_config is not None:
            model.generation_config = pretrained.generation_config
        info = {"missing_keys": list(pretrained.new), "unexpected_keys": list(pretrained.unused)}
        info["bytes_read"] = pretrained.checkpoint.bytes_read
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_checkpoint(
        cls, pretrained: Pretrained, attn_implementation: str, device, policy=None, placement: Placement | None = None
    ):
        with tf.device(device if placement is None else "CPU:0"), no_values():
            model = cls(pretrained.config, attn_implementation=attn_implementation, dtype=policy or pretrained.dtype)
        specs = {} if placement is None else specs_on(placement, model)
        for name in pretrained.new:
            owner_of(model, published_name(name, cls.task))[0].reset_parameters()
        stored = [name for name in shapes(pretrained.config, cls.task) if name not in pretrained.new]
        for name, array in read_parameters(pretrained.checkpoint, stored, pretrained.dtype, alignment=ALIGNMENT):
            if placement is None:
                model.weight(name).assign(from_numpy(array))
            else:
                set_value(model.weight(name), placement, array, specs[name])
                pretrained.checkpoint.close()  # with which the pages that were copied leave the memory
        if placement is not None:
            for name in pretrained.new:
                set_value(model.weight(name), placement, model.weight(name).numpy(), specs[name])
            place(model, placement)
        return model

    def save_pretrained(
        self,
        folder,
        *,
        max_shard_size: int | str = "5GB",
        overwrite: bool = True,
        allow_nonfinite: bool = False,
        **published,
    ) -> None:
        """Writes config.json and safetensors in the published layout, which any backend loads.

        NaN and infinities are refused unless `allow_nonfinite`. Options of generation that came with a checkpoint, or
        were given to the model, go into generation_config.json.

        Raises:
            InputError: the model has adapters, which this would leave out.
            KeywordError: an argument of the published method that asks for something else than this does.
        """
        check_keywords(published, arguments_of(self.save_pretrained), SAVING)
        if self.lora is not None:
            remedy = "save_adapter writes them alone, merge_lora adds them to the weights"
            raise InputError("save_pretrained", [f"model: expected one without adapters; {remedy}"])
        tensors = {name: lambda name=name: to_numpy(self.weight(name)) for name in shapes(self.config, self.task)}
        write_checkpoint(
            folder,
            self.config.replace(torch_dtype=self.dtype),
            tensors,
            task=self.task,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
        )
        if (generation_config := getattr(self, "generation_config", None)) is not None:
            generation_config.save_beside(self.config, folder)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **options) -> str:
        """Saves to a temporary folder and uploads it; `options` as in `conversion.push_folder`. Returns the address."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, repo_id, **options)

    def weight(self, name: str) -> keras.Variable:
        """The parameter of a canonical name, e.g. `decoder.layers.0.fc1.weight`."""
        owner, attribute = owner_of(self, published_name(name, self.task))
        return getattr(owner, attribute)

    def name_weights(self) -> None:
        """Gives each weight its published name as Keras path, which optimizers and summaries show."""
        for name in shapes(self.config, self.task):
            self.weight(name)._path = published_name(name, self.task).replace(".", "/")


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory, at a multiple of ALIGNMENT; NumPy's bfloat16 is that of ml_dtypes."""
    assert array.ctypes.data % ALIGNMENT == 0
    if array.dtype.name == "bfloat16":  # DLPack knows it, NumPy does not
        return tf.bitcast(from_numpy(array.view(np.uint16)), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def to_numpy(variable: keras.Variable) -> np.ndarray:
    """The values as a NumPy array, bfloat16 as that of ml_dtypes."""
    return variable.value.numpy()


def owner_of(model: keras.Model, name: str) -> tuple[Module, str]:
    """The module that holds what a dotted name says, and the name it has there."""
    *path, attribute = name.split(".")
    owner = model
    for step in path:
        owner = owner[int(step)] if step.isdigit() else getattr(owner, step)
    return owner, attribute


def name_of(dtype) -> str | None:
    """The name of a dtype of TensorFlow or NumPy; a name, a Keras policy or None stays, for others to judge."""
    return (
        np.dtype(getattr(dtype, "as_numpy_dtype", dtype)).name
        if isinstance(dtype, tf.DType | np.dtype | type)
        else dtype
    )


def _mixed_policy(dtype) -> keras.DTypePolicy | None:
    """The Keras policy that `dtype` is, or names if weights and products have different dtypes there."""
    if isinstance(dtype, keras.DTypePolicy):
        return dtype
    return keras.DTypePolicy(dtype) if dtype in ("mixed_bfloat16", "mixed_float16") else None
