"""`from_pretrained` and `save_pretrained`, Flax NNX."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from conversion import push_folder, write_checkpoint
from conversion.parameters import read_parameters
from conversion.pretrained import Pretrained, open_pretrained
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.keywords import SAVING, arguments_of, check_keywords, only_one
from opt_core.schema import published_name, shapes
from opt_flax.layers import shapes_only
from opt_flax.processes import Whole, write_from_first
from opt_flax.sharding import Placement, local_parts, on_host, place, placement_on

ALIGNMENT = 64  # bytes; XLA copies memory of a smaller one


class LoadingMixin:
    """Reading and writing checkpoints, for a module with `config` and `task`."""

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
        device_mesh: jax.sharding.Mesh | None = None,
        compute_dtype=None,
        output_loading_info: bool = False,
        rngs: nnx.Rngs | None = None,
        **overrides,
    ):
        """Loads a folder, a weight file or a hub id; returns the model in evaluation mode.

        Weights are memory-mapped: where the file holds the dtype asked for, at addresses that XLA takes (multiples of
        64 bytes, as this project writes them), a CPU model shares the file's pages; else they are copied once.

        Args:
            dtype: None for float32, "auto" for the stored one, or a JAX dtype or its name. `torch_dtype` is an alias.
            device: where the parameters go: a device, a sharding, or a platform's name; by default JAX's own.
            device_mesh: a mesh (`opt_flax.sharding.init_mesh`) over whose devices the model is cut, by the rules of
                `opt_core.sharding`; every device gets its own part of each weight alone.
            compute_dtype: what is computed with, bfloat16 for mixed precision; by default the dtype of the parameters.
            output_loading_info: also return which weights the checkpoint lacked or had in excess, and "bytes_read", of
                weights, from the files.
            rngs: for the weights of a new head, and dropout in later training.
            overrides: fields of the config, e.g. `num_labels=3`.

        Raises:
            ConfigError, CheckpointError, InputError: everything wrong with the files or arguments; nothing is loaded.
        """
        only_one("from_pretrained", device=device, device_mesh=device_mesh)
        pretrained = open_pretrained(
            source,
            cls.task,
            config=config,
            overrides=overrides,
            dtype=_name_of(only_one("from_pretrained", dtype=dtype, torch_dtype=torch_dtype)),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
            token=token,
            subfolder=subfolder,
        )
        placement = None if device_mesh is None else placement_on(device_mesh, pretrained.config, cls.task)
        model = cls._from_checkpoint(pretrained, attn_implementation, device, placement, rngs, compute_dtype)
        if pretrained.generation_config is not None:
            model.generation_config = pretrained.generation_config
        info = {"missing_keys": list(pretrained.new), "unexpected_keys": list(pretrained.unused)}
        info["bytes_read"] = pretrained.checkpoint.bytes_read
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_checkpoint(
        cls,
        pretrained: Pretrained,
        attn_implementation: str,
        device,
        placement: Placement | None,
        rngs: nnx.Rngs | None,
        compute_dtype,
    ):
        dtypes = dict(dtype=jnp.dtype(pretrained.dtype), compute_dtype=compute_dtype)
        with shapes_only():
            model = nnx.eval_shape(lambda: cls(pretrained.config, attn_implementation=attn_implementation, **dtypes))
        for name in pretrained.new:
            rngs = rngs or nnx.Rngs(0)
            owner_of(model, published_name(name, cls.task))[0].reset_parameters(rngs)
        stored = [name for name in shapes(pretrained.config, cls.task) if name not in pretrained.new]
        if placement is None:
            read = _read(pretrained, stored, device)
        else:
            read = _read_parts(pretrained, stored, placement, cls.task)
        for name, array in read:
            owner, attribute = owner_of(model, published_name(name, cls.task))
            setattr(owner, attribute, nnx.Param(array))
        _start_streams(model, rngs)
        model.set_placement(placement)
        place(model)
        model.eval()
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
        were given to the model, go into generation_config.json. Of a model of several processes, each calls this; the
        first writes, and one weight at a time is whole.

        Raises:
            InputError: the model has adapters, which this would leave out.
            KeywordError: an argument of the published method that asks for something else than this does.
        """
        check_keywords(published, arguments_of(self.save_pretrained), SAVING)
        if self.lora is not None:
            remedy = "save_adapter writes them alone, merge_lora adds them to the weights"
            raise InputError("save_pretrained", [f"model: expected one without adapters; {remedy}"])
        parameters = {name: self.weight(name) for name in shapes(self.config, self.task)}

        def write(whole: Mapping[str, Whole]) -> None:
            write_checkpoint(
                folder,
                self.config.replace(torch_dtype=self.dtype.name),
                _Tensors(parameters, whole),
                task=self.task,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                allow_nonfinite=allow_nonfinite,
            )
            if (generation_config := getattr(self, "generation_config", None)) is not None:
                generation_config.save_beside(self.config, folder)

        write_from_first(self.placement, parameters, write)

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **options) -> str:
        """Saves to a temporary folder and uploads it; `options` as in `conversion.push_folder`. Returns the address.

        Raises:
            InputError: the model is that of several processes, of which none has the others' temporary folders.
        """
        if self.placement is not None and self.placement.has_processes:
            remedy = "save_pretrained writes a folder that conversion.push_folder uploads"
            raise InputError("push_to_hub", [f"model: expected one of a single process; {remedy}"])
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, repo_id, **options)

    def weight(self, name: str) -> Array:
        """The parameter of a canonical name, e.g. `decoder.layers.0.fc1.weight`."""
        owner, attribute = owner_of(self, published_name(name, self.task))
        return getattr(owner, attribute).get_value()


class _Tensors(NamedTuple):
    """What is written: shapes and dtypes are known before an array is gathered, which happens once."""

    parameters: Mapping[str, Array]
    whole: Mapping[str, Whole]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: x.shape for name, x in self.parameters.items()}

    @property
    def dtypes(self) -> dict[str, str]:
        return {name: x.dtype.name for name, x in self.parameters.items()}

    def read(self, name: str) -> np.ndarray:
        array = self.whole[name]()
        if array.flags.owndata or len(self.parameters[name].sharding.device_set) == 1:
            return array
        return array.copy()  # counted among what waits to be written, as views are not


def _read(pretrained: Pretrained, names: Iterable[str], device) -> Iterator[tuple[str, Array]]:
    """Name and weight, on a device."""
    device = jax.devices(device)[0] if isinstance(device, str) else device
    for name, array in read_parameters(pretrained.checkpoint, names, pretrained.dtype, alignment=ALIGNMENT):
        yield name, from_numpy(array, device)


def _read_parts(
    pretrained: Pretrained, names: Sequence[str], placement: Placement, task: str
) -> Iterator[tuple[str, Array]]:
    """Name and weight, of which each device of this process is given its part, and no more is read.

    Devices that have the same part share what is read; a format that cannot be read in part is read for each part.
    """
    checkpoint, placed = pretrained.checkpoint, placement.weights(pretrained.config, task)
    parts = {name: local_parts(placed[name], checkpoint.shapes[name]) for name in names}
    arrays: dict[str, list[Array]] = {name: [] for name in names}
    for number in range(max(map(len, parts.values()), default=0)):
        now = {name: found[number] for name, found in parts.items() if number < len(found)}
        slices = {name: index for name, (index, _) in now.items()}
        for name, array in read_parameters(checkpoint, now, pretrained.dtype, alignment=ALIGNMENT, slices=slices):
            arrays[name] += [from_numpy(array, device) for device in now[name][1]]
    for name in names:
        sharded = checkpoint.shapes[name], placed[name], arrays.pop(name)
        yield name, jax.make_array_from_single_device_arrays(*sharded)


def from_numpy(array: np.ndarray, device=None) -> Array:
    """An array that shares the memory, where that is the CPU's and aligned; NumPy's bfloat16 is that of ml_dtypes."""
    return jax.device_put(array, device)


def to_numpy(array: Array) -> np.ndarray:
    """The values as a NumPy array, bfloat16 as that of ml_dtypes."""
    return on_host(array)


def owner_of(model: nnx.Module, name: str) -> tuple[nnx.Module, str]:
    """The module that holds what a dotted name says, and the name it has there."""
    *path, attribute = name.split(".")
    for part in path:
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model, attribute


def _name_of(dtype) -> str | None:
    return dtype if dtype is None or isinstance(dtype, str) else jnp.dtype(dtype).name


def _start_streams(model: nnx.Module, rngs: nnx.Rngs | None) -> None:
    """Gives the random streams of an abstract model, one per dropout, a key each.

    NumPy spreads the seed over them: splitting a key would compile functions, which takes longer than loading.
    """
    streams = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.RngStream)]
    seed = 0 if rngs is None else np.asarray(jax.random.key_data(rngs.dropout()))
    for stream, key_seed in zip(streams, np.random.default_rng(seed).integers(2**32, size=len(streams)), strict=True):
        stream.key.set_value(jax.random.key(key_seed.astype(np.uint32)))
        stream.count.set_value(jax.device_put(np.zeros((), np.uint32)))
