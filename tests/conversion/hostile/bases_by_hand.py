"""Valid checkpoints in forms that are read but not written: as other programs save them, made here without these."""

import json
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import metaseq_files
import numpy as np
import torch
from checkpoints import config_of, tensors_of

from conversion import write_checkpoint
from conversion.formats import FORMATS, places
from conversion.layout import to_stored

CONFIG = config_of()
METASEQ = config_of(vocab_size=16 * 7, hidden_size=22, ffn_dim=38)  # two parts divide each of them
SHORT = struct.Struct("<H")


def metaseq(save: Callable, folder: Path, config=METASEQ, tensors=None, **options) -> None:
    """Files as metaseq's own programs save them."""
    folder.mkdir(parents=True)
    arrays = tensors or tensors_of(config)
    save(folder, config, {name: torch.from_numpy(array) for name, array in arrays.items()}, **options)


def saved_model(folder: Path, config=CONFIG, tensors=None) -> None:
    """Variables of a SavedModel, with a program that nothing looks at."""
    write_checkpoint(folder, config, tensors or tensors_of(config), format="tf-checkpoint")
    (folder / "variables").mkdir()
    for path in folder.glob("ckpt-1.*"):
        path.rename(folder / "variables" / path.name.replace("ckpt-1", "variables"))
    (folder / "checkpoint").unlink()
    (folder / "saved_model.pb").write_bytes(b"\x08\x01")


def orbax_folders(folder: Path, config=CONFIG, tensors=None) -> None:
    """Orbax without a database: a folder for each array, compressed as Orbax does it."""
    import tensorstore

    write_checkpoint(folder, config, tensors or tensors_of(config), format="orbax")
    inner = folder / "orbax"
    for path in [path for path in inner.rglob("*") if path.is_file() and path.name[0] != "_"]:
        path.unlink()
    for name, array in (tensors or tensors_of(config)).items():
        stored = f"model.{name}" if name.startswith("decoder.") else name
        kvstore = {"driver": "file", "path": f"{inner}/{stored}/"}
        metadata = dict(compressor={"id": "zstd", "level": 1}, dtype=array.dtype.str, shape=array.shape)
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": metadata | {"chunks": array.shape}}
        tensorstore.open(spec, create=True).result().write(array).result()
    fields = json.loads((inner / "_METADATA").read_text())
    (inner / "_METADATA").write_text(json.dumps({**fields, "use_ocdbt": False}))


def keras_hub_shards(folder: Path, config=CONFIG, tensors=None, count: int = 3) -> None:
    """A preset whose weights are in several files."""
    from conversion.keras.keras_hub_weights import write_file
    from conversion.safetensors_file import PlannedTensor

    write_checkpoint(folder, config, tensors or tensors_of(config), format="keras-hub")
    (folder / "model.weights.h5").unlink()
    stored = as_stored("keras-hub", config, tensors or tensors_of(config))
    planned = [PlannedTensor(name, str(array.dtype), array.shape) for name, array in stored.items()]
    shards = {f"model_{number:05d}.weights.h5": planned[number::count] for number in range(count)}
    for file_name, of_shard in shards.items():
        with open(folder / file_name, "wb") as file:
            write_file(file, of_shard, lambda file, tensor: file.write(stored[tensor.name].tobytes()))
    weight_map: dict[str, list[str]] = {}
    for file_name, of_shard in shards.items():
        for group in dict.fromkeys(tensor.name.rpartition("/")[0] for tensor in of_shard):
            weight_map.setdefault(f"/{group}", []).append(file_name)
    (folder / "model.weights.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def as_stored(format: str, config, tensors) -> dict[str, np.ndarray]:
    """The weights by a format's names and in its layout, joint ones joined."""
    joint: dict[str, list] = {}
    for name, place in places(FORMATS[format], config, "causal-lm").items():
        slot = place.layout.slot or (0, 1)
        joint.setdefault(place.name, []).append((slot, np.ascontiguousarray(to_stored(tensors[name], place.layout))))
    return {name: np.concatenate([array for _, array in sorted(blocks, key=lambda block: block[0])])
            for name, blocks in joint.items()}  # fmt: skip


# -- CTranslate2 ------------------------------------------------------------------------------------------------------


class CTranslate2Model:
    """A `model.bin` in parts to break."""

    def __init__(self, config=CONFIG, tensors=None):
        self.version, self.specification, self.revision = 6, "TransformerDecoderSpec", 8
        self.variables = {
            name: [array.shape, 0, array.tobytes()]
            for name, array in as_stored("ctranslate2", config, tensors or tensors_of(config)).items()
        }
        settings = dict(num_heads=config.num_attention_heads, pre_norm=1, activation=0, scale_embeddings=0)
        self.variables |= {f"decoder/{name}": [(), 1, struct.pack("<b", value)] for name, value in settings.items()}
        self.aliases = {"decoder/projection/weight": "decoder/embeddings/weight"}
        self.count: int | None = None

    def __bytes__(self) -> bytes:
        data = [struct.pack("<I", self.version), text(self.specification), struct.pack("<I", self.revision)]
        data.append(struct.pack("<I", len(self.variables) if self.count is None else self.count))
        for name, (shape, type_, content) in self.variables.items():
            head = struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, type_, len(content))
            data += [text(name), head, content]
        data += [struct.pack("<I", len(self.aliases))]
        data += [text(alias) + text(name) for alias, name in self.aliases.items()]
        return b"".join(data)


def text(name: str) -> bytes:
    encoded = name.encode() + b"\0"
    return SHORT.pack(len(encoded)) + encoded


def ctranslate2(folder: Path, config=CONFIG, tensors=None) -> None:
    folder.mkdir(parents=True)
    (folder / "model.bin").write_bytes(bytes(CTranslate2Model(config, tensors)))
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(f"t{number}" for number in range(config.vocab_size - 4))]
    (folder / "vocabulary.json").write_text(json.dumps(tokens[: config.vocab_size]))
    fields = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", layer_norm_epsilon=None)
    (folder / "config.json").write_text(json.dumps(fields))


BASES: dict[str, Callable[..., None]] = {
    "metaseq raw": partial(metaseq, metaseq_files.save_raw, parts=2, shards=3),
    "metaseq flat": partial(metaseq, metaseq_files.save_flat, parts=2),
    "metaseq unflattened": partial(metaseq, metaseq_files.save_unflattened, parts=2),
    "metaseq resharded": partial(metaseq, metaseq_files.save_resharded),
    "metaseq-singleton restored": partial(metaseq, metaseq_files.save_restored),
    "metaseq-singleton 350m": partial(
        metaseq,
        metaseq_files.save_350m,
        config=METASEQ.replace(do_layer_norm_before=False, word_embed_proj_dim=13),
    ),
    "orbax in folders": orbax_folders,
    "saved-model": saved_model,
    "keras-hub in shards": keras_hub_shards,
    "ctranslate2": ctranslate2,
}
