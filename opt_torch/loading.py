"""`from_pretrained` and `save_pretrained`, PyTorch."""

import functools
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from conversion import push_folder, write_checkpoint
from conversion.parameters import read_parameters
from conversion.pretrained import Pretrained, open_pretrained
from opt_core.config import DTYPES, OPTConfig
from opt_core.errors import InputError
from opt_core.keywords import SAVING, arguments_of, check_keywords, only_one
from opt_core.schema import published_name, shapes


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
        device_mesh=None,
        device_map=None,
        max_memory=None,
        offload_folder=None,
        output_loading_info: bool = False,
        **overrides,
    ):
        """Loads a folder, a weight file or a hub id; returns the model in evaluation mode.

        Weights are memory-mapped: where the file holds the dtype asked for, a CPU model shares the file's pages.

        Args:
            dtype: None for float32, "auto" for the stored one, or a torch dtype or its name. `torch_dtype` is an alias.
            device: where the parameters go; the CPU by default.
            device_mesh: of `opt_torch.sharding.init_mesh`; every process reads its own parts of the weights alone.
            device_map: where each layer goes (`opt_torch.offloading`): "auto", "balanced", "balanced_low_0" or
                "sequential"; one place for all; or a dict of modules to places. A place is a GPU's number, a device,
                "cpu", or "disk", where the weights of a layer stay in the checkpoint until its turn comes.
            max_memory: for the first four, place to bytes or "10GB": how much may be used of it.
            offload_folder: for copies of weights "on disk" that would have to be converted whenever they are used.
            output_loading_info: also return which weights the checkpoint lacked or had in excess, and the bytes of
                weights that this process has read.
            overrides: fields of the config, e.g. `num_labels=3`.

        Raises:
            ConfigError, CheckpointError, InputError: everything wrong with the files or arguments; nothing is loaded.
        """
        only_one("from_pretrained", device=device, device_mesh=device_mesh, device_map=device_map)
        if device_map is not None or max_memory is not None:
            from opt_torch.offloading import check_places, load_placed

            check_places(device_map, max_memory)
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
        if device_map is not None:
            model = load_placed(cls, pretrained, attn_implementation, device_map, max_memory, offload_folder)
        else:
            device = device_mesh.device_type if device_mesh is not None else device or "cpu"
            model = cls._from_checkpoint(pretrained, attn_implementation, device, device_mesh)
        if pretrained.generation_config is not None:
            model.generation_config = pretrained.generation_config
        info = {"missing_keys": list(pretrained.new), "unexpected_keys": list(pretrained.unused)}
        info["bytes_read"] = pretrained.checkpoint.bytes_read
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_checkpoint(cls, pretrained: Pretrained, attn_implementation: str, device, device_mesh=None):
        dtype = getattr(torch, pretrained.dtype)
        with torch.device("meta"):
            model = cls(pretrained.config, attn_implementation=attn_implementation).to(dtype)
        for name in pretrained.new:
            owner, _ = owner_of(model, published_name(name, cls.task))
            owner.to_empty(device=device).reset_parameters()
        slices, part = None, _whole
        if device_mesh is not None:
            from opt_torch.sharding import as_part, own_slices, shard_model

            slices, part = own_slices(shard_model(model, device_mesh)), as_part
        stored = [name for name in shapes(pretrained.config, cls.task) if name not in pretrained.new]
        for name, array in read_parameters(pretrained.checkpoint, stored, pretrained.dtype, slices=slices):
            owner, attribute = owner_of(model, published_name(name, cls.task))
            setattr(owner, attribute, nn.Parameter(part(from_numpy(array).to(device), getattr(owner, attribute))))
        model.tie_weights()
        return model.eval()

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
        were given to the model, go into generation_config.json. Of a sharded model every process must call this, and
        process 0 writes; no more than one weight is whole at a time.

        Raises:
            InputError: the model has adapters, which this would leave out.
            KeywordError: an argument of the published method that asks for something else than this does.
        """
        check_keywords(published, arguments_of(self.save_pretrained), SAVING)
        if self.lora is not None:
            remedy = "save_adapter writes them alone, merge_lora adds them to the weights"
            raise InputError("save_pretrained", [f"model: expected one without adapters; {remedy}"])

        dtype, names = str(self.dtype).removeprefix("torch."), shapes(self.config, self.task)

        def write(weight: Callable[[str], Tensor], **options) -> None:
            tensors = {name: lambda name=name: to_numpy(weight(name)) for name in names}
            write_checkpoint(
                folder,
                self.config.replace(torch_dtype=dtype),
                tensors,
                task=self.task,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                allow_nonfinite=allow_nonfinite,
                **options,
            )
            if (generation_config := getattr(self, "generation_config", None)) is not None:
                generation_config.save_beside(self.config, folder)

        if self.offloaded is not None:
            self.offloaded.check_target(folder)
        if self.mesh is None:
            return write(self.weight)
        from opt_torch.sharding import write_from_first

        has_one_dtype = dtype in DTYPES and {self.weight(name).dtype for name in names} == {self.dtype}
        options = dict(dtype=dtype) if has_one_dtype else {}  # else each is gathered once more, to be asked for it
        write_from_first(self.weight, functools.partial(write, **options))

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str = "5GB", **options) -> str:
        """Saves to a temporary folder and uploads it; `options` as in `conversion.push_folder`. Returns the address.

        Raises:
            InputError: the model is sharded, and every process would upload it.
        """
        if self.mesh is not None:
            remedy = "save_pretrained on all, then conversion.push_folder on one"
            raise InputError("push_to_hub", [f"model: expected one that is not sharded; {remedy}"])
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size)
            return push_folder(folder, repo_id, **options)

    def weight(self, name: str) -> Tensor:
        """The parameter of a canonical name, e.g. `decoder.layers.0.fc1.weight`; of a sharded model a DTensor."""
        owner, attribute = owner_of(self, published_name(name, self.task))
        weight = getattr(owner, attribute)
        return self.offloaded[published_name(name, self.task)] if weight.is_meta and self.offloaded else weight


def accept_published_names(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_) -> None:
    """Lets `load_state_dict` take published files as they are: with or without `model.`, tied head stored or not."""
    if prefix:  # a part of a larger module: its owner has done this
        return
    for name in [name for name in state_dict if name.startswith(("decoder.", "model.decoder."))]:
        state_dict[published_name(name.removeprefix("model."), model.task)] = state_dict.pop(name)
    embeddings = published_name("decoder.embed_tokens.weight", model.task)
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings and embeddings in state_dict:
        state_dict.setdefault("lm_head.weight", state_dict[embeddings])


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor that shares the array's memory; NumPy's bfloat16 is that of ml_dtypes."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray:
    """The values as a NumPy array, bfloat16 as that of ml_dtypes."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds what a dotted name says, and the name it has there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _whole(loaded: Tensor, like: Tensor) -> Tensor:
    """What a process loads where there is but one."""
    return loaded


def _name_of(dtype) -> str | None:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
