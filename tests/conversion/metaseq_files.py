"""metaseq's checkpoints at tiny size, in every layout, saved by torch itself from the truth in the schema's names.

The splitting, joining, flattening and padding are written out here once more, independent of `conversion`.
"""

import argparse
import collections
import sys
import types

import torch
from checkpoints import tensors_of

from opt_core import OPTConfig

LAYERS = 3
_SPLIT_ALONG = {"k_proj": 0, "v_proj": 0, "q_proj": 0, "fc1": 0, "embed_tokens": 0, "lm_head": 0}
_SPLIT_WEIGHT_ALONG = {"out_proj": 1, "fc2": 1}
_NAMES = {
    "decoder.final_layer_norm": "decoder.layer_norm",
    "decoder.project_in": "decoder.project_in_dim",
    "decoder.project_out": "decoder.project_out_dim",
    "lm_head": "decoder.output_projection",
}


def config_of(parts: int = 1, **more) -> OPTConfig:
    sizes = dict(vocab_size=8 * 7 * parts, hidden_size=11 * 6, num_attention_heads=6, ffn_dim=17 * parts)
    return OPTConfig(**{**sizes, "num_hidden_layers": LAYERS, "max_position_embeddings": 37, **more})


def config_of_350m(**more) -> OPTConfig:
    return config_of(1, do_layer_norm_before=False, word_embed_proj_dim=13, **more)


def truth_of(config: OPTConfig, dtype: str = "float16") -> dict[str, torch.Tensor]:
    arrays = tensors_of(config, dtype="float32")
    return {name: torch.from_numpy(array).to(getattr(torch, dtype)) for name, array in arrays.items()}


def namespace_of(config: OPTConfig, parts: int = 1, **more) -> argparse.Namespace:
    arch = "transformer_lm_megatron" if config.do_layer_norm_before else "transformer_lm"
    settings = dict(
        _name=arch,
        arch=arch,
        activation_fn="relu",
        alibi=False,
        attention_dropout=0.1,
        decoder_attention_heads=config.num_attention_heads,
        decoder_embed_dim=config.hidden_size,
        decoder_ffn_embed_dim=config.ffn_dim,
        decoder_input_dim=config.word_embed_proj_dim,
        decoder_layers=config.num_hidden_layers,
        decoder_learned_pos=True,
        decoder_learned_sinusoidal=False,
        decoder_normalize_before=config.do_layer_norm_before,
        decoder_output_dim=config.word_embed_proj_dim,
        dropout=0.1,
        max_target_positions=None,
        model_parallel_size=parts,
        no_scale_embedding=True,
        scale_attn=False,
        scale_fc=False,
        scale_heads=False,
        share_decoder_input_output_embed=config.tie_word_embeddings,
        tokens_per_sample=config.max_position_embeddings,
        betas="(0.9, 0.95)",
        lr=[0.0006],
        restore_file="checkpoint_last.pt",
    )
    for field, setting in (("enable_bias", "disable_bias"), ("layer_norm_elementwise_affine", "disable_affine_ln")):
        if not getattr(config, field):  # files from before these settings lack them
            settings[setting] = True
    return argparse.Namespace(**{**settings, **more})


def cfg_of(config: OPTConfig, parts: int = 1, **more) -> dict:
    return {"_name": None, "common": {"fp16": True, "seed": 1}, "model": namespace_of(config, parts, **more)}


# -- names and parts --------------------------------------------------------------------------------------------------


def parts_of(truth: dict[str, torch.Tensor], config: OPTConfig, parts: int, *, joint: bool = True) -> list[dict]:
    """metaseq's named tensors of each part, in the order of its modules."""
    return [_in_order(_part(truth, part, parts, joint), config) for part in range(parts)]


def _part(truth: dict[str, torch.Tensor], part: int, parts: int, joint: bool) -> dict[str, torch.Tensor]:
    named = {}
    for name, tensor in truth.items():
        module, _, kind = name.rpartition(".")
        last = module.rpartition(".")[2]
        axis = _SPLIT_ALONG.get(last, _SPLIT_WEIGHT_ALONG.get(last) if kind == "weight" else None)
        piece = tensor if axis is None else tensor.chunk(parts, axis)[part]
        named[f"{_NAMES.get(module, module)}.{kind}"] = piece
    if joint:
        for name in [name for name in named if "k_proj" in name]:
            of_three = [named.pop(name.replace("k_proj", f"{letter}_proj")) for letter in "kvq"]
            named[name.replace("k_proj", "qkv_proj")] = torch.cat(of_three)
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _in_order(named: dict[str, torch.Tensor], config: OPTConfig) -> dict[str, torch.Tensor]:
    attention = [f"self_attn.{name}_proj" for name in ("qkv", "k", "v", "q", "out")]
    modules = [*attention, "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"]
    layers = [f"decoder.layers.{layer}.{module}" for layer in range(config.num_hidden_layers) for module in modules]
    ends = ["decoder.layer_norm", "decoder.project_out_dim", "decoder.output_projection"]
    order = ["decoder.embed_tokens", "decoder.project_in_dim", "decoder.embed_positions", *layers, *ends]
    names = [f"{module}.{kind}" for module in order for kind in ("weight", "bias")]
    assert set(named) <= set(names)
    return {name: named[name] for name in names if name in named}


def version(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {"decoder.version": torch.tensor([3.0], dtype=dtype)}


# -- flat tensors -----------------------------------------------------------------------------------------------------


def groups_of(named: dict[str, torch.Tensor], *, per_layer: bool = True, wrapped: int = 1) -> dict[str, dict]:
    """Path of a group to its tensors, by their names within it; `wrapped` layers in one group count through inside."""
    groups: dict[str, dict] = {"": {}}
    for name, tensor in named.items():
        words = name.split(".")
        if words[1] == "layers" and per_layer:
            block, inner = divmod(int(words[2]), wrapped)
            within = ".".join(words[3:] if wrapped == 1 else ["layers", str(inner), *words[3:]])
            groups.setdefault(f"decoder.layers.{block}", {})[within] = tensor
        else:
            groups[""][name] = tensor
    return groups


def key_of(path: str, name: str = "flat_param_0") -> str:
    return f"{path}.{name}" if path else name


def shards_of(flat: torch.Tensor, shards: int) -> list[tuple[torch.Tensor, int]]:
    """fairscale's rule: chunks of the first's size, the last padded with zeros; each with its padding."""
    chunks = list(flat.chunk(shards))
    chunks += [flat[:0]] * (shards - len(chunks))
    paddings = [len(chunks[0]) - len(chunk) for chunk in chunks]
    return [
        (torch.nn.functional.pad(chunk, [0, padding]), padding) for chunk, padding in zip(chunks, paddings, strict=True)
    ]


def raw_shards(named: dict[str, torch.Tensor], shards: int, **grouping) -> list[dict]:
    """`model` and `shard_metadata` of each shard of one part."""
    dtype = next(iter(named.values())).dtype
    saved = [{"model": collections.OrderedDict(), "shard_metadata": _metadata()} for _ in range(shards)]
    for path, tensors in groups_of(named, **grouping).items():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        for one, (piece, padding) in zip(saved, shards_of(flat, shards), strict=True):
            one["model"][key_of(path)] = piece.clone()
            one["shard_metadata"]["param_metadata"].append(_group_metadata(path, tensors, padding))
    for one in saved:
        one["model"].update(version(dtype))
    return saved


def _metadata() -> dict:
    return {"param_metadata": [], "buffer_names": ["decoder.version"]}


def _group_metadata(path: str, tensors: dict[str, torch.Tensor], padding: int) -> dict:
    fields = {
        "names": list(tensors),
        "shapes": [tensor.shape for tensor in tensors.values()],
        "numels": [tensor.numel() for tensor in tensors.values()],
        "padding": padding,
    }
    alias = [] if path else [("decoder.embed_tokens.weight", "decoder.output_projection.weight")]
    return {
        "fsdp_path": path,
        "params": {"flat_param_0": fields},
        "no_broadcast_optim_state": False,
        "shared_param_info": alias,
    }


# -- layouts: each saves the files of one checkpoint into a folder ----------------------------------------------------


def save_raw(folder, config, truth, parts=1, shards=3, stem="checkpoint_last", has_metadata=True, **grouping):
    """Training state of `parts` x `shards` workers; without metadata, what the first reshard_mp made of it."""
    for part, named in enumerate(parts_of(truth, config, parts)):
        for shard, saved in enumerate(raw_shards(named, shards, **grouping)):
            state = {"cfg": cfg_of(config, parts), **training_state(), **saved}
            if not has_metadata:
                del state["shard_metadata"]
            middle = f"-model_part-{part}" if parts > 1 else ""
            torch.save(state, folder / f"{stem}{middle}-shard{shard}.pt")


def save_flat(folder, config, truth, parts=1, *, per_layer=True, joint=True, **more):
    """The files of May 2022: one flat tensor, or one per layer, and nothing that says what is in them."""
    for part, named in enumerate(parts_of(truth, config, parts, joint=joint)):
        groups = groups_of(named, per_layer=per_layer)
        flats = {key_of(path): torch.cat([t.reshape(-1) for t in of.values()]) for path, of in groups.items()}
        model = collections.OrderedDict(**flats, **version(next(iter(truth.values())).dtype))
        name = f"reshard-model_part-{part}.pt" if joint else "reshard.pt"
        torch.save({"cfg": cfg_of(config, parts, **more), "model": model}, folder / name)


def save_unflattened(folder, config, truth, parts=1, stem="reshard", **more):
    """What reshard_fsdp saves: named views on one storage per group; with the metadata of before."""
    for part, named in enumerate(parts_of(truth, config, parts)):
        model = collections.OrderedDict()
        for path, tensors in groups_of(named).items():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
            pieces = flat.split([tensor.numel() for tensor in tensors.values()])
            for (name, tensor), piece in zip(tensors.items(), pieces, strict=True):
                model[key_of(path, name)] = piece.view(tensor.shape)
        model.update(version(flat.dtype))
        stale = raw_shards(named, 3)[0]["shard_metadata"]
        state = {"model": model, "shard_metadata": stale, "cfg": cfg_of(config, parts, **more), **training_state()}
        torch.save(state, folder / f"{stem}-model_part-{part}.pt")


def save_resharded(folder, config, truth, parts=1):
    """What reshard_mp saves, here of twice as many parts: with their metadata, and the head of their first in each."""
    head = truth["decoder.embed_tokens.weight"].chunk(2 * parts)[0].clone()
    for part, named in enumerate(parts_of(truth, config, parts)):
        model = {**named, **version(head.dtype), "decoder.output_projection.weight": head}
        stale = raw_shards(parts_of(truth, config, 1)[0], 1)[0]["shard_metadata"]
        state = {"model": model, "cfg": cfg_of(config, parts), "extra_state": None, "optimizer_history": None}
        torch.save({**state, "args": None, "shard_metadata": stale}, folder / f"reshard-model_part-{part}.pt")


def save_restored(folder, config, truth):
    """What convert_to_singleton saves: keys, values and queries apart, the settings in omegaconf's containers."""
    from omegaconf import OmegaConf

    (named,) = parts_of(truth, config, 1, joint=False)
    cfg = OmegaConf.create({"common": {"seed": 1, "betas": [0.9, 0.95]}}, flags={"allow_objects": True})
    cfg.model = namespace_of(config)
    torch.save({"cfg": cfg, "model": {**named, **version(torch.float16)}, **training_state()}, folder / "restored.pt")


def save_350m(folder, config, truth):
    """The one published file of a model that is not model-parallel, with settings as one namespace."""
    (named,) = parts_of(truth, config, 1, joint=False)
    model = {
        **version(torch.float16),
        **named,
        "decoder.output_projection.weight": named["decoder.embed_tokens.weight"],
    }
    torch.save({"args": namespace_of(config), "model": model}, folder / "reshard.pt")


def save_bare(folder, config, truth):
    (named,) = parts_of(truth, config, 1)
    torch.save({**version(torch.float16), **named}, folder / "reshard.pt")


def training_state() -> dict:
    """What a trainer saves beside the weights, classes of its own among it."""
    moments = {0: {"step": 7, "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(5)}}
    return {
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "Adam", "lr_scheduler_state": {"best": None}, "num_updates": 7}],
        "task_state": {},
        "extra_state": {
            "metrics": [(0, "default", "loss", {"val": torch.tensor(2.5), "round": 3})],
            "train_iterator": {"epoch": 1, "tokenization_cache": instance_of("metaseq.data.cache", "LockingArray")},
            "seen": {3, 5},
            "empty": torch.zeros(0),
        },
        "last_optimizer_state": {"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }


def instance_of(module: str, name: str):
    """An object of a class of a package that is not installed: made up, so that it can be pickled."""
    words = module.split(".")
    for depth in range(len(words)):
        sys.modules.setdefault(".".join(words[: depth + 1]), types.ModuleType(".".join(words[: depth + 1])))
    owner = sys.modules[module]
    if not hasattr(owner, name):
        setattr(owner, name, type(name, (), {"__module__": module}))
    made = getattr(owner, name)()
    made.lengths = [5, 7]
    return made


LAYOUTS = {
    "raw shards": (save_raw, {}),
    "raw shards, one group": (save_raw, dict(per_layer=False)),
    "raw shards, five": (save_raw, dict(shards=5)),
    "raw shards, layers wrapped by three": (save_raw, dict(wrapped=3)),
    "raw, not sharded": (save_raw, dict(shards=1)),
    "shards without metadata": (save_raw, dict(has_metadata=False)),
    "shards without metadata, one group": (save_raw, dict(has_metadata=False, per_layer=False, shards=5)),
    "flat": (save_flat, dict(per_layer=False)),
    "flat by layer": (save_flat, {}),
    "unflattened": (save_unflattened, {}),
    "unflattened, OPT-IML's names": (save_unflattened, dict(stem="checkpoint_1_4000.pt")),
    "resharded": (save_resharded, {}),
}


# -- comparing ---------------------------------------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_holds(opened, expected: list[dict[str, torch.Tensor]]) -> None:
    """The parts are the expected ones, bit for bit, but for the heads that some layouts add."""
    assert len(opened.parts) == len(expected)
    for part, named in zip(opened.parts, expected, strict=True):
        assert part.tensors.keys() - {"decoder.output_projection.weight"} == named.keys()
        for name, tensor in named.items():
            array = part.read(name)
            assert array.shape == part.tensors[name].shape == tuple(tensor.shape), name
            assert str(array.dtype) == str(tensor.dtype).removeprefix("torch."), name
            assert array.tobytes() == bytes_of(tensor), name
