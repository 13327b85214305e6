"""What models compute that are cut over virtual devices of this process; the test compares it with the reference.

python compute_on_mesh.py FOLDER MESH ...    # with a checkpoint of each of CONFIGS in FOLDER
"""

import copy
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from harness import VARIANTS, config_of, mask_named, token_ids

from opt_core import OPTConfig
from opt_core.errors import InputError
from opt_core.lora import LoraConfig
from opt_core.schema import shapes
from opt_core.sharding import Mesh
from opt_tf import TFOPTForCausalLM, TFOPTForQuestionAnswering, TFOPTForSequenceClassification
from opt_tf.lora import add_lora
from opt_tf.sharding import init_mesh, shard_model
from opt_tf.training import Trainer

SIZES = dict(vocab_size=94, hidden_size=4 * 14, num_hidden_layers=2, ffn_dim=58, num_attention_heads=4, dropout=0.0)
SIZES |= dict(max_position_embeddings=41)
CONFIGS = {
    "pre-norm": OPTConfig(**SIZES),
    "350m style": OPTConfig(**SIZES | VARIANTS["350m style"] | dict(word_embed_proj_dim=22)),
    "untied, no biases, pruned": OPTConfig(
        **SIZES, enable_bias=False, tie_word_embeddings=False, pruned_heads={1: [0, 2]}
    ),
}
IDS = token_ids(CONFIGS["pre-norm"])
SEGMENTS = np.array([[0] * 4 + [1] * 7 + [0] * 2, [3] * 13, [0] * 6 + [1] * 7, [0, 1] + [2] * 11])
HEADS = {"sequence-classification": TFOPTForSequenceClassification, "question-answering": TFOPTForQuestionAnswering}


def computed(model) -> dict[str, np.ndarray]:
    """The outputs of a padded batch, and greedy tokens after it."""
    mask = mask_named("left")
    out = model(IDS, mask, labels=IDS, output_attentions=True, output_hidden_states=True)
    found = {"logits": out.logits, "loss": out.loss, "tokens": model.generate(IDS, mask, max_new_tokens=6)}
    found |= {f"hidden {i}": x for i, x in enumerate(out.hidden_states)}
    return found | {f"attention {i}": x for i, x in enumerate(out.attentions)}


def computed_in_parts(model) -> dict[str, np.ndarray]:
    """Logits of several documents in a row; of tokens after cached ones, whose buffers are cut by heads and rows."""
    first = model(IDS[:, :9]).past_key_values
    parts = tf.experimental.dtensor.unpack(first.keys[0])
    rest = model(IDS[:, 9:], past_key_values=first).logits
    found = {"documents": model(IDS, segment_ids=SEGMENTS).logits, "after a cache": rest}
    return found | {"part of a cache": parts[0].shape, "parts of a cache": len(parts)}


def parts_of(model) -> dict[str, np.ndarray]:
    """The shape of what each device has of every weight."""
    variables = {name: model.weight(name).value for name in shapes(model.config, model.task)}
    return {name: [x.shape for x in tf.experimental.dtensor.unpack(v.read_value())] for name, v in variables.items()}


def saved(folder: Path, mesh) -> dict[str, np.ndarray]:
    """Weights after each way out of a mesh, and into one."""
    load, ids = TFOPTForCausalLM.from_pretrained, IDS[:2]
    model, single = load(folder / "350m style", device_mesh=mesh), load(folder / "350m style")
    model.save_pretrained(folder / "saved")
    model.save_weights(folder / "saved.weights.h5")
    model.save(folder / "saved.keras")
    loaded = TFOPTForCausalLM(model.config)
    loaded.load_weights(folder / "saved.weights.h5")
    others = [load(folder / "saved"), loaded, keras.saving.load_model(folder / "saved.keras"), copy.deepcopy(model)]
    equal = [np.array_equal(a, b.numpy()) for x in others for a, b in zip(x.get_weights(), single.weights, strict=True)]
    cut = shard_model(TFOPTForCausalLM(model.config), mesh)
    cut.load_weights(folder / "saved.weights.h5")
    return {"equal": equal, "logits": cut(ids).logits, "wanted": model(ids).logits}


def with_new_heads(folder: Path, mesh) -> dict[str, np.ndarray]:
    """What classes with a head that the checkpoint lacks compute, beside a single device."""
    found = {}
    for task, model_class in HEADS.items():
        for name, options in (("mesh", {"device_mesh": mesh}), ("single", {})):
            tf.random.set_seed(7)
            out = model_class.from_pretrained(folder / "pre-norm", **options)(IDS, mask_named("right"))
            found[f"{task}/{name}"] = np.concatenate([x.numpy().ravel() for x in out[1:3] if tf.is_tensor(x)])
    return found


def refusals(folder: Path, mesh) -> dict[str, str]:
    model = TFOPTForCausalLM.from_pretrained(folder / "pre-norm", device_mesh=mesh)
    adapted = TFOPTForCausalLM(CONFIGS["pre-norm"])
    add_lora(adapted, LoraConfig())
    cases = {
        "training": lambda: model(IDS, training=True),
        "in a function": lambda: tf.function(lambda ids: model(ids).logits, autograph=False)(IDS),
        "in a model": lambda: model(keras.Input((5,), dtype="int64")),
        "an id out of range": lambda: model(IDS + 90),
        "a label out of range": lambda: model(IDS, labels=IDS + 90),
        "predict": lambda: model.predict({"input_ids": IDS}, verbose=0),
        "evaluate": lambda: model.evaluate({"input_ids": IDS, "labels": IDS}, verbose=0),
        "Trainer": lambda: Trainer(model),
        "add_lora": lambda: add_lora(model, LoraConfig()),
        "prune_heads": lambda: model.prune_heads({0: [1]}),
        "resize_token_embeddings": lambda: model.resize_token_embeddings(96),
        "resize_position_embeddings": lambda: model.resize_position_embeddings(96),
        "export": lambda: model.export(folder / "exported"),
        "twice": lambda: shard_model(model, mesh),
        "adapters": lambda: shard_model(adapted, mesh),
        "what does not divide": lambda: shard_model(TFOPTForCausalLM(config_of()), mesh),
        "a device, too": lambda: TFOPTForCausalLM.from_pretrained(
            folder / "pre-norm", device_mesh=mesh, device="CPU:0"
        ),
        "too many devices": lambda: init_mesh("tensor=8", "CPU"),
        "no such device": lambda: init_mesh("tensor=2", "XPU"),
    }
    model.compile("sgd")
    return {name: refusal(case) for name, case in cases.items()}


def refusal(case) -> str:
    try:
        return f"no error: {case()}"
    except InputError as error:
        return str(error)


def cases(folder: Path, mesh) -> dict[str, dict]:
    found = {}
    for name in CONFIGS:
        model, info = TFOPTForCausalLM.from_pretrained(folder / name, device_mesh=mesh, output_loading_info=True)
        found[name] = computed(model) | {"bytes": info["bytes_read"]}
        found[f"{name} parts"] = parts_of(model)
    return found | {
        "in parts": computed_in_parts(TFOPTForCausalLM.from_pretrained(folder / "350m style", device_mesh=mesh))
    }


if __name__ == "__main__":
    folder, texts = Path(sys.argv[1]), sys.argv[2:]
    meshes = {text: init_mesh(text, "CPU") for text in sorted(texts, key=lambda text: -Mesh.parse(text).devices)}
    found = {f"{text}/{name}": x for text in texts for name, x in cases(folder, meshes[text]).items()}
    if "tensor=2" in texts:
        mesh = meshes["tensor=2"]
        found |= {"saved": saved(folder, mesh), "new heads": with_new_heads(folder, mesh)}
        found["refused"] = refusals(folder, mesh)
    arrays = {f"{case}/{name}": np.asarray(x) for case, parts in found.items() for name, x in parts.items()}
    np.savez(folder / "found.npz", **arrays)
