"""A model over several memories of one process, PyTorch: GPUs, that of the CPU, and the checkpoint itself.

accelerate says which layer goes where, and brings what a layer needs to the device that computes just before its turn.
Weights "on disk" stay in the checkpoint's own files, whatever their format: they are mapped when they are needed and
let go of again, so that a model larger than memory runs in what its largest layer takes. Training such a model, and
several processes (`opt_torch.sharding`), are not the business of this module.
Source of the hooks: Hugging Face's guide to big model inference with accelerate.
"""

import re
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from conversion.parameters import read_parameters
from conversion.pretrained import Pretrained
from conversion.safetensors_file import PlannedTensor, read_header, write_file
from conversion.slices import map_of
from conversion.stored import MappedFile
from opt_core.errors import InputError, MissingFrameworkError, raise_if
from opt_core.schema import published_name, shapes
from opt_torch.decoder import DecoderLayer
from opt_torch.loading import from_numpy, owner_of

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # what accelerate works out; "auto" is "balanced"
DISK = "disk"
EMBEDDING, HEAD = "decoder.embed_tokens.weight", "lm_head.weight"
Place = int | str  # a GPU's number, "cpu", "mps" or "disk"
_PLACES = "the number of a GPU of this machine, 'cpu' or 'disk'"
_SIZE = re.compile(r"\d+(\.\d+)?([KMG]i?B)", re.IGNORECASE)


def load_placed(model_class, pretrained: Pretrained, attn_implementation: str, device_map, max_memory, offload_folder):
    """The model with each part where `device_map` says; arguments as those of `from_pretrained`.

    Raises:
        InputError: lists every key and place of `device_map` and `max_memory` that there is not.
        MissingFrameworkError: accelerate is not installed.
        CheckpointError: values that the dtype cannot hold, among those that are read now.
    """
    with torch.device("meta"):
        model = model_class(pretrained.config, attn_implementation=attn_implementation)
        model = model.to(getattr(torch, pretrained.dtype))
    model.tie_weights()
    places = plan_places(model, device_map, max_memory)
    model.offloaded = StoredWeights(model, pretrained, _place_of(places))
    _load(model, pretrained, places)
    if offload_folder is not None:
        model.offloaded.convert(Path(offload_folder))
    _dispatch(model, places)
    return model.eval()


def plan_places(model: nn.Module, device_map, max_memory: Mapping | None = None) -> dict[str, Place]:
    """Where each layer goes, and each module with weights outside the layers, by its name in the model.

    A tied head goes with the embeddings. The weights of `model` need no memory.

    Raises:
        InputError, MissingFrameworkError: as `load_placed`.
    """
    check_places(device_map, max_memory)
    if _is_automatic(device_map):
        device_map = _worked_out(model, device_map, max_memory)
    elif not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    units = units_of(model)
    raise_if(InputError, "from_pretrained", _map_problems(device_map, units, model))
    places = {unit: _known_place(device_map[_holder(unit, device_map)]) for unit in units}
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        places["lm_head"] = places[published_name(EMBEDDING, model.task).removesuffix(".weight")]
    return places


def units_of(model: nn.Module) -> list[str]:
    """What has one place: a layer, or a module with weights outside them."""
    units: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{unit}.") for unit in units):
            continue
        if isinstance(module, DecoderLayer) or next(module.parameters(recurse=False), None) is not None:
            units.append(path)
    return units


def import_accelerate():
    """The `accelerate` package.

    Raises:
        MissingFrameworkError: says what to install.
    """
    try:
        import accelerate
    except ImportError:
        raise MissingFrameworkError("device_map goes through accelerate: pip install opt-zoo[offload]") from None
    return accelerate


class StoredWeights(Mapping):
    """The weights of a model by the names of its parameters, each read when it is asked for.

    Those "on disk" come from the checkpoint, or once `convert` has been called from where it put them. `in_memory` are
    those that a GPU is given when it needs them, and weights that no file has.
    """

    def __init__(self, model, pretrained: Pretrained, place_of):
        self.in_memory: dict[str, Tensor] = {}
        self._checkpoint, self._dtype = pretrained.checkpoint, getattr(torch, pretrained.dtype)
        stored = [name for name in shapes(pretrained.config, model.task) if name not in pretrained.new]
        names = {published_name(name, model.task): name for name in stored}
        if model.get_output_embeddings() is not None:
            names.setdefault(HEAD, EMBEDDING)  # a tied one
        self._stored = {name: stored for name, stored in names.items() if place_of(name) == DISK}
        self._converted: MappedFile | None = None

    def __getitem__(self, name: str) -> Tensor:
        if name in self.in_memory:
            return self.in_memory[name]
        return self._read(self._stored[name])

    def __contains__(self, name) -> bool:
        return name in self.in_memory or name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter({**self.in_memory, **self._stored})

    def __len__(self) -> int:
        return len({**self.in_memory, **self._stored})

    def convert(self, folder: Path) -> None:
        """Writes what has to be converted at every use into a file in `folder`, which goes with the last use of it."""
        names = [name for name in dict.fromkeys(self._stored.values()) if not self._lies_ready(name)]
        if not names:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="opt-", suffix=".safetensors", delete=False) as file:
            weakref.finalize(self, Path(file.name).unlink, missing_ok=True)
            dtype = str(self._dtype).removeprefix("torch.")
            planned = [PlannedTensor(name, dtype, self._checkpoint.shapes[name]) for name in names]
            write_file(
                file, planned, lambda file, tensor: file.write(self._read(tensor.name).view(torch.uint8).numpy())
            )
        self._converted = MappedFile(Path(file.name), read_header(Path(file.name)).tensors)

    def check_target(self, folder) -> None:
        """Refuses a folder to save into whose files the model is reading."""
        source = Path(self._checkpoint.source).resolve()
        if self._stored and Path(folder).resolve() == (source if source.is_dir() else source.parent):
            problem = f"folder: expected another than {folder}, from which the model reads weights"
            raise InputError("save_pretrained", [problem])

    def _read(self, name: str) -> Tensor:
        """One weight in the model's dtype; its pages leave the memory with the tensor."""
        if self._converted is not None and name in self._converted.tensors:
            array = self._converted.read(name)
            self._converted.close()
            return from_numpy(array)
        pieces, dim = self._checkpoint.pieces(name)
        self._checkpoint.close()
        stored = torch.cat([from_numpy(piece) for piece in pieces], dim) if len(pieces) > 1 else from_numpy(pieces[0])
        weight = stored.to(self._dtype).contiguous()  # PyTorch converts and turns 10 times as fast as NumPy
        if self._dtype == torch.float16 != stored.dtype and weight.isinf().any():
            list(read_parameters(self._checkpoint, [name], "float16"))  # says which values it cannot hold
        return weight

    def _lies_ready(self, name: str) -> bool:
        """Whether the file has the weight as the model takes it."""
        pieces, _ = self._checkpoint.views(name)
        flags = pieces[0].flags
        is_view = len(pieces) == 1 and map_of(pieces[0]) is not None and flags.c_contiguous and flags.aligned
        return is_view and getattr(torch, self._checkpoint.dtypes[name]) == self._dtype


# -- arguments --------------------------------------------------------------------------------------------------------


def check_places(device_map, max_memory: Mapping | None) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        InputError: lists every place that there is not, every limit that is none.
        MissingFrameworkError: accelerate is not installed.
    """
    problems = [] if _is_automatic(device_map) else list(_place_problems(device_map))
    if max_memory is not None:
        problems += _memory_problems(device_map, max_memory)
    raise_if(InputError, "from_pretrained", problems)
    import_accelerate()


def _is_automatic(device_map) -> bool:
    return isinstance(device_map, str) and device_map in AUTOMATIC


def _place_problems(device_map) -> Iterator[str]:
    if not isinstance(device_map, Mapping):
        if _known_place(device_map) is None:
            yield f"device_map: expected one of {', '.join(AUTOMATIC)}, a dict, or {_PLACES}, got {device_map!r}"
        return
    for key, place in device_map.items():
        if _known_place(place) is None:
            yield f"device_map[{key!r}]: expected {_PLACES}, got {place!r}"


def _memory_problems(device_map, max_memory) -> Iterator[str]:
    if not _is_automatic(device_map):
        yield f"max_memory: expected it beside a device_map of {', '.join(AUTOMATIC)}, got {device_map!r}"
    if not isinstance(max_memory, Mapping):
        yield f"max_memory: expected a dict of places to bytes, got {max_memory!r}"
        return
    for place, limit in max_memory.items():
        if _known_place(place) != place:
            yield f"max_memory: expected {_PLACES}, got {place!r}"
        if not (isinstance(limit, int) if not isinstance(limit, str) else _SIZE.fullmatch(limit)):
            yield f"max_memory[{place!r}]: expected bytes or a text such as '10GB', got {limit!r}"


def _worked_out(model: nn.Module, how: str, max_memory: Mapping | None) -> dict[str, Place]:
    accelerate = import_accelerate()
    options = dict(no_split_module_classes=model._no_split_modules, dtype=model.dtype)
    max_memory = None if max_memory is None else dict(max_memory)  # accelerate writes into it
    if how != "sequential":
        is_low = how == "balanced_low_0"
        max_memory = accelerate.utils.get_balanced_memory(model, max_memory, low_zero=is_low, **options)
    return accelerate.infer_auto_device_map(model, max_memory, **options)


def _map_problems(device_map: Mapping, units: list[str], model: nn.Module) -> list[str]:
    known = dict(model.named_modules()) | dict(model.named_parameters(remove_duplicate=False))
    problems = [f"device_map: {key!r}: there is no such module" for key in device_map if key not in known]
    for unit in units:
        if any(key.startswith(f"{unit}.") for key in device_map):
            problems.append(f"device_map: {unit}: expected one place for all of it")
        elif _holder(unit, device_map) is None:
            problems.append(f"device_map: {unit}: missing")
    return problems


def _holder(name: str, paths) -> str | None:
    """The longest of the paths that `name` is or lies under."""
    return max((path for path in paths if path in ("", name) or name.startswith(f"{path}.")), key=len, default=None)


def _place_of(places: Mapping[str, Place]):
    """From the name of a parameter to its place."""
    return lambda name: places[_holder(name, places)]


def _known_place(place) -> Place | None:
    """In accelerate's words; None for what is no place of this machine."""
    accelerator = torch.accelerator.current_accelerator()
    if isinstance(place, bool) or not isinstance(place, int | str | torch.device):
        return None
    if isinstance(place, int):
        return place if 0 <= place < torch.accelerator.device_count() else None
    if place == DISK:
        return place
    try:
        device = torch.device(place)
    except RuntimeError:
        return None
    if device.type == "cpu" or (accelerator is not None and device.type == accelerator.type == "mps"):
        return device.type
    return _known_place(device.index or 0) if accelerator is not None and device.type == accelerator.type else None


# -- loading ----------------------------------------------------------------------------------------------------------


def _load(model, pretrained: Pretrained, places: Mapping[str, Place]) -> None:
    """Reads what is not to stay on disk, straight to where it goes."""
    place_of, task = _place_of(places), model.task
    for name in pretrained.new:
        owner, _ = owner_of(model, published_name(name, task))
        place = place_of(published_name(name, task))
        owner.to_empty(device="cpu" if place == DISK else place).reset_parameters()
    kept = [
        name
        for name in shapes(pretrained.config, task)
        if name not in pretrained.new and place_of(published_name(name, task)) != DISK
    ]
    for name, array in read_parameters(pretrained.checkpoint, kept, pretrained.dtype):
        owner, attribute = owner_of(model, published_name(name, task))
        place = place_of(published_name(name, task))
        setattr(owner, attribute, nn.Parameter(from_numpy(array).to(place)))
    model.tie_weights()


def _dispatch(model, places: dict[str, Place]) -> None:
    """Has accelerate put a hook on every module; none where one device has all."""
    devices = list(dict.fromkeys(places.values()))
    if len(devices) == 1 and devices != [DISK]:
        model.hf_device_map, model.offloaded = {"": devices[0]}, None
        return
    computing = [place for place in devices if place not in ("cpu", DISK)]
    main = computing[0] if computing else "cpu"
    waiting = ("cpu", DISK) if computing else (DISK,)  # places from which weights are brought to where it is computed
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta and _place_of(places)(name) in waiting:
            model.offloaded.in_memory[name] = parameter.detach()
    if any(place in waiting for place in devices):
        model.requires_grad_(False)  # or a call would keep each layer's weights for a backward pass that changes none
    import_accelerate().hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={"": main, **{unit: main if place in waiting else place for unit, place in places.items()}},
        offload={unit: place in waiting for unit, place in places.items()},
        weights_map=model.offloaded,
    )
    return_to_inputs(model, places)
    model.hf_device_map = places


def return_to_inputs(model: nn.Module, units: Iterable[str]) -> None:
    """Has what is outside the layers give its output to the device that the input came from.

    Between layers hidden states stay where they are, as keys and values do for good.
    """
    for module in map(model.get_submodule, units):
        if not isinstance(module, DecoderLayer):
            module._hf_hook.io_same_device = True
