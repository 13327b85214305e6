"""Damaged metaseq checkpoints: parts and shards missing or mixed up, metadata that lies, settings of others."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hostile.case import Case, cases
from hostile.torch_bin_cases import Payload

RAW = "checkpoint_last-model_part-{}-shard{}.pt"
PART = "reshard-model_part-{}.pt"
LAYER = "decoder.layers.1.flat_param_0"
QKV = "decoder.layers.1.self_attn.qkv_proj.weight"
NORM = "decoder.layers.1.self_attn_layer_norm.weight"


def edited(file: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    """Changes what is saved in the files that match a pattern."""

    def damage(folder: Path) -> None:
        paths = sorted(folder.glob(file))
        assert paths, file
        for path in paths:
            state = torch.load(path, weights_only=False)
            change(state)
            torch.save(state, path)

    return damage


def in_model(change: Callable[[dict], Any], file: str = "*.pt") -> Callable[[Path], None]:
    return edited(file, lambda state: change(state["model"]))


def in_settings(file: str = "*.pt", **settings) -> Callable[[Path], None]:
    """Sets attributes of the model's settings; None removes one."""

    def change(state: dict) -> None:
        for name, value in settings.items():
            if value is None:
                delattr(state["cfg"]["model"], name)
            else:
                setattr(state["cfg"]["model"], name, value)

    return edited(file, change)


def in_metadata(change: Callable[[dict], Any], file: str = "*.pt", group: int = 2) -> Callable[[Path], None]:
    """Changes what the metadata says of one group: of layer 1."""
    return edited(
        file, lambda state: change(state["shard_metadata"]["param_metadata"][group]["params"]["flat_param_0"])
    )


def field(name: str, change: Callable[[Any], Any], file: str = "*.pt") -> Callable[[Path], None]:
    return in_metadata(lambda fields: fields.update({name: change(fields[name])}), file)


def item(name: str, value: Any, place: int = 0) -> Callable[[Path], None]:
    """One item of a list in the metadata."""
    return field(name, lambda items: [value if number == place else old for number, old in enumerate(items)])


def removed(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in list(folder.glob(pattern)):
            path.unlink()

    return damage


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: (folder / old).rename(folder / new)


def copied(old: str, new: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / new).write_bytes((folder / old).read_bytes())


def swapped(one: str, other: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / one).rename(folder / "aside")
        (folder / other).rename(folder / one)
        (folder / "aside").rename(folder / other)

    return damage


def changed_tensor(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], file: str = "*.pt"
) -> Callable[[Path], None]:
    return in_model(lambda model: model.update({name: change(model[name])}), file)


def called(name: str, old: str = QKV, file: str = "*.pt") -> Callable[[Path], None]:
    return in_model(lambda model: model.update({name: model.pop(old)}), file)


def paying(branch: str) -> Callable[[Path], None]:
    """A call in one branch of what is saved."""

    def damage(folder: Path) -> None:
        canary = folder.parent / "executed"
        edited("*.pt", lambda state: state.update({branch: {"a": Payload(os.system, f"touch {canary}")}}))(folder)

    return damage


FILES = [
    ("a missing shard", removed(RAW.format(0, 1)), RAW.format(0, 1), "missing"),
    ("a missing shard of the last part", removed(RAW.format(1, 0)), RAW.format(1, 0), "missing"),
    ("the last shards missing", removed(RAW.format("*", 2)), "flat_param_0", "expected .* elements"),
    ("a missing part", removed(RAW.format(0, "*")), RAW.format(0, 0), "missing"),
    ("the last part missing", removed(RAW.format(1, "*")), "out_proj.weight", "parts are missing"),
    ("a shard twice", copied(RAW.format(0, 1), RAW.format(0, "01")), RAW.format(0, 1), "expected one file, got"),
    (
        "a shard with a number of its own",
        renamed(RAW.format(1, 2), RAW.format(1, 9000)),
        "9001",
        "by the highest numbers",
    ),
    ("two checkpoints in one folder", copied(RAW.format(0, 0), "reshard.pt"), "reshard.pt", "expected"),
    ("two shards changed over", swapped(RAW.format(0, 0), RAW.format(0, 2)), "model_part-0", "padding|shard_metadata"),
    ("a shard that is cut", lambda folder: os.truncate(folder / RAW.format(0, 1), 3000), RAW.format(0, 1), "truncated"),
    (
        "a shard that is empty",
        lambda folder: os.truncate(folder / RAW.format(0, 1), 0),
        RAW.format(0, 1),
        "expected a zip",
    ),
]
SHARDS = [
    (
        "a flat tensor that one shard lacks",
        in_model(lambda model: model.pop(LAYER), RAW.format(0, 1)),
        LAYER,
        "missing",
    ),
    (
        "a flat tensor more",
        in_model(lambda m: m.update({"decoder.layers.7.flat_param_0": m[LAYER]}), RAW.format(0, 1)),
        "decoder.layers.7.flat_param_0",
        "neither a flat tensor that is known",
    ),
    (
        "a flat tensor of two axes",
        changed_tensor(LAYER, lambda flat: flat.reshape(1, -1)),
        LAYER,
        "expected one dimension",
    ),
    ("a flat tensor of integers", changed_tensor(LAYER, lambda flat: flat.to(torch.int64)), LAYER, "expected a dtype"),
    (
        "shards of two dtypes",
        changed_tensor(LAYER, lambda flat: flat.half(), RAW.format(0, 1)),
        LAYER,
        "one size and dtype",
    ),
    (
        "shards of two lengths",
        changed_tensor(LAYER, lambda flat: flat[:-1].clone(), RAW.format(0, 1)),
        LAYER,
        "one size",
    ),
    ("a flat tensor of no element", changed_tensor(LAYER, lambda flat: flat[:0]), LAYER, "an empty tensor"),
    ("a flat tensor with gaps", changed_tensor(LAYER, lambda flat: flat.repeat_interleave(2)[::2]), LAYER, "expected"),
    (
        "a bomb of a flat tensor",
        changed_tensor(LAYER, lambda flat: flat[:1].expand(10**12)),
        LAYER,
        "overlapping strides",
    ),
    (
        "a named tensor among flat ones",
        in_model(lambda m: m.update({NORM: torch.ones(22)})),
        NORM,
        "neither a flat tensor",
    ),
    (
        "no metadata in one shard",
        edited(RAW.format(0, 1), lambda state: state.pop("shard_metadata")),
        "shard 1",
        "shard_metadata: expected param",
    ),
    (
        "neither metadata nor settings",
        edited("*.pt", lambda s: (s.pop("shard_metadata"), s.pop("cfg"))),
        "cfg",
        "missing",
    ),
    (
        "metadata of another shape",
        field("shapes", lambda shapes: shapes[::-1], RAW.format(0, 1)),
        "shard 1",
        "qkv_proj.weight: expected a shape of 726 elements",
    ),
    (
        "metadata in another order",
        field("names", lambda names: names[::-1], RAW.format(0, 1)),
        "shard 1",
        "expected the shard_metadata of shard 0",
    ),
    (
        "metadata that is a list",
        edited("*.pt", lambda state: state.update(shard_metadata=[1])),
        "shard_metadata",
        "expected",
    ),
    (
        "groups that are a number",
        edited("*.pt", lambda s: s["shard_metadata"].update(param_metadata=7)),
        "shard 0",
        "expected param_metadata",
    ),
    (
        "a group without its path",
        edited("*.pt", lambda s: s["shard_metadata"]["param_metadata"][1].pop("fsdp_path")),
        "shard 0",
        "expected param_metadata of fsdp_path",
    ),
    (
        "a group twice",
        edited(
            "*.pt", lambda s: s["shard_metadata"]["param_metadata"].append(s["shard_metadata"]["param_metadata"][1])
        ),
        "decoder.layers.0.",
        "in two flat tensors",
    ),
    (
        "a group of experts",
        edited("*.pt", lambda s: s["shard_metadata"]["param_metadata"][1].update(no_broadcast_optim_state=True)),
        "decoder.layers.0",
        "an expert",
    ),
    ("a negative padding", field("padding", lambda _: -1), "layers.1", "expected a padding of at least 0, got -1"),
    ("a padding longer than the shard", field("padding", lambda _: 10**6), LAYER, "expected a padding of at most"),
    ("a padding that is a text", field("padding", lambda _: "1"), "layers.1", "expected a padding"),
    (
        "one element more of padding",
        field("padding", lambda old: old + 1, RAW.format("*", 2)),
        LAYER,
        "expected .* elements",
    ),
    ("numbers that are not the shapes'", item("numels", 7), "layers.1", "expected a shape of 7 elements"),
    ("a shape of another size", item("shapes", [1, 7]), "layers.1", "expected a shape of .* elements, got"),
    ("a shape of 2^80 elements", item("shapes", [2**40, 2**40]), "layers.1", "expected a shape of"),
    ("a negative shape", item("shapes", [-3, -7]), "layers.1", "expected a shape of"),
    ("a shape of a thousand axes", item("shapes", [1] * 1000), "layers.1", "expected a shape of"),
    ("fewer names than shapes", field("names", lambda names: names[1:]), "layers.1", "of one length"),
    ("a name twice", field("names", lambda names: [names[1], *names[1:]]), "layers.1", "names that differ"),
    ("names that are numbers", field("names", lambda names: list(range(len(names)))), "layers.1", "names that differ"),
    ("a name that leaves the model", item("names", "../../x"), "../../x", "not a weight of OPT in metaseq"),
    ("a name of NormFormer", item("names", "ffn_layernorm.weight"), "ffn_layernorm.weight", "not a weight of OPT"),
    ("a name of an encoder", item("names", "encoder_attn.k_proj.weight"), "encoder_attn", "not a weight of OPT"),
]
PARTS = [
    ("the last part missing", removed(PART.format(1)), "out_proj.weight", "parts are missing"),
    ("the first part missing", removed(PART.format(0)), PART.format(0), "missing"),
    ("a part of number 7", renamed(PART.format(1), PART.format(7)), PART.format(1), "missing"),
    (
        "a tensor that one part lacks",
        in_model(lambda model: model.pop(QKV), PART.format(1)),
        QKV,
        "missing, though part 0",
    ),
    (
        "a tensor more in one part",
        in_model(lambda m: m.update({"more": m[QKV]}), PART.format(1)),
        "more",
        "though part 0 lacks",
    ),
    ("a part of other shapes", changed_tensor(QKV, lambda t: t[:-3].clone(), PART.format(1)), QKV, "as in part 0, got"),
    ("parts of two dtypes", changed_tensor(QKV, torch.Tensor.half, PART.format(1)), QKV, "as in part 0, got float16"),
    (
        "copies that disagree",
        changed_tensor(NORM, lambda t: t + 1, PART.format(1)),
        NORM,
        "expected the values of .*part-0",
    ),
    (
        "a copy that is NaN",
        changed_tensor(NORM, lambda t: t * np.nan, PART.format(1)),
        NORM,
        "expected the values of .*part-0",
    ),
    (
        "keys, values and queries that three does not divide",
        changed_tensor(QKV, lambda t: t[:-1].clone()),
        "proj",
        "expected",
    ),
    ("a weight that was turned", changed_tensor(QKV, lambda t: t.T.contiguous()), "proj.weight", "expected"),
    ("integers", changed_tensor(QKV, lambda t: t.to(torch.int32)), QKV, "expected a dtype of .*, got int32"),
    ("NormFormer", called("decoder.layers.1.ffn_layernorm.weight"), "ffn_layernorm.weight", "not a weight of OPT"),
    ("alibi", called("decoder.alibi"), "decoder.alibi", "not a weight of OPT"),
    ("an encoder", called("encoder.layers.1.fc1.weight"), "encoder.layers.1.fc1.weight", "not a weight of OPT"),
    ("a layer of number 99", called("decoder.layers.99.fc1.weight"), "decoder_layers", "but the tensors have 4"),
    (
        "both joint and separate keys",
        in_model(lambda m: m.update({QKV.replace("qkv", "k"): m[QKV][:11].clone()})),
        "k_proj.weight",
        "not a weight of OPT",
    ),
    ("no weights", edited("*.pt", lambda state: state.update(model={})), PART.format(0), "got none"),
    ("a model that is a list", edited("*.pt", lambda state: state.update(model=[1])), "model", "expected"),
    (
        "a model of models",
        edited("*.pt", lambda state: state.update(model={"model": state["model"]})),
        "model",
        "expected",
    ),
    ("no settings", edited("*.pt", lambda state: state.pop("cfg")), "cfg", "missing.*give a config"),
    ("settings that are a number", edited("*.pt", lambda state: state.update(cfg=7)), "cfg", "missing"),
    (
        "settings without heads",
        in_settings(decoder_attention_heads=None),
        "decoder_attention_heads",
        "missing, expected",
    ),
    ("heads that do not divide the width", in_settings(decoder_attention_heads=7), "hidden_size", "a multiple of"),
    ("heads in a text", in_settings(decoder_attention_heads="2"), "decoder_attention_heads", "expected int, got '2'"),
    ("settings of more layers", in_settings(decoder_layers=4), "decoder_layers", "but the tensors have 3"),
    ("settings of 10^9 layers", in_settings(decoder_layers=10**9), "decoder_layers", "but the tensors have 3"),
    ("settings of another width", in_settings(decoder_embed_dim=44), "decoder_embed_dim", "but the tensors have"),
    ("settings with alibi", in_settings(alibi=True), "cfg.model.alibi", "OPT has False, got True"),
    ("settings of scaled embeddings", in_settings(no_scale_embedding=False), "no_scale_embedding", "OPT has True"),
    ("settings of sinusoids", in_settings(decoder_learned_pos=False), "decoder_learned_pos", "OPT has True"),
    ("settings of scaled heads", in_settings(scale_heads=True), "scale_heads", "OPT has False"),
    ("settings with gelu", in_settings(activation_fn="gelu"), "activation_fn", "erf form .* tanh form"),
    ("settings with swiglu", in_settings(activation_fn="swiglu"), "activation_fn", "expected relu, got 'swiglu'"),
]
CALLS = [
    ("a call in the model", paying("model"), "model.a", r"asks for posix\.system.*nothing was executed"),
    ("a call in the settings", paying("cfg"), "cfg.a", r"asks for posix\.system"),
    ("a call in the metadata", paying("shard_metadata"), "shard_metadata.a", r"asks for posix\.system"),
    ("a call in the arguments", paying("args"), "args.a", r"asks for posix\.system"),
]
FLAT = [
    (
        "an element less",
        changed_tensor("flat_param_0", lambda t: t[:-1].clone()),
        "flat_param_0",
        "expected .* elements|multiple of 8",
    ),
    ("a layer's element less", changed_tensor(LAYER, lambda t: t[:-1].clone()), LAYER, "expected .* elements"),
    ("a layer less", in_model(lambda model: model.pop("decoder.layers.2.flat_param_0")), "decoder.layers.2", "missing"),
    (
        "a layer more",
        in_model(lambda m: m.update({"decoder.layers.3.flat_param_0": m[LAYER]})),
        "decoder.layers.3",
        "neither",
    ),
    ("no settings", edited("*.pt", lambda state: state.pop("cfg")), "cfg", "missing.*give a config"),
    (
        "settings of other heads",
        in_settings(decoder_attention_heads=11),
        "num_attention_heads",
        "a multiple of 2 parts",
    ),
    ("settings of a wider model", in_settings(decoder_embed_dim=44), "flat_param_0", "expected"),
    ("settings of more layers", in_settings(decoder_layers=5), "decoder.layers.3", "missing"),
    ("settings without positions", in_settings(tokens_per_sample=None), "max_target_positions", "missing"),
    ("the last part missing", removed(PART.format(1)), "flat_param_0", "expected .* elements|multiple of 8"),
]
NO_FILES = [
    (
        "a folder for a shard",
        lambda folder: (removed(RAW.format(0, 1))(folder), (folder / RAW.format(0, 1)).mkdir()),
        RAW.format(0, 1),
        "missing|expected",
    ),
    (
        "a pipe for a shard, at which reading would wait",
        lambda folder: (removed(RAW.format(0, 1))(folder), os.mkfifo(folder / RAW.format(0, 1))),
        RAW.format(0, 1),
        "missing|expected",
    ),
]
CASES: list[Case] = [
    *cases("metaseq raw", 5, NO_FILES),
    *cases("metaseq raw", 5, [*FILES, *SHARDS]),
    *cases("metaseq unflattened", 5, PARTS),
    *cases("metaseq unflattened", 2, CALLS[:2] + CALLS[3:]),
    *cases("metaseq raw", 2, CALLS),
    *cases("metaseq flat", 5, FLAT),
    *cases(
        "metaseq resharded",
        5,
        [
            (
                "a head that is not the embedding",
                changed_tensor("decoder.output_projection.weight", lambda t: t + 1),
                "decoder.output_projection.weight",
                "expected .* of decoder.embed_tokens.weight, or its first rows",
            ),
            (
                "a head of half a row",
                changed_tensor("decoder.output_projection.weight", lambda t: t[:, :7].clone()),
                "decoder.output_projection.weight",
                "or its first rows, got",
            ),
        ],
    ),
]
