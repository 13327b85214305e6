"""Trains a model, whole or over two processes, and leaves what it got: the test does the first, this script the second.

torchrun --nproc-per-node 2 train_sharded.py FOLDER    # with a checkpoint in FOLDER/model, a run in FOLDER/single
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from harness import VARIANTS, mask_named, token_ids
from torch.distributed.device_mesh import init_device_mesh

from opt_core import OPTConfig
from opt_core.errors import InputError, TrainingError
from opt_core.optimization import TrainingRecipe
from opt_core.reference import IGNORED_LABEL
from opt_core.schema import shapes
from opt_core.sharding import Rules
from opt_torch import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification
from opt_torch.distributed_checkpoint import restore_distributed, save_distributed
from opt_torch.sharding import init_mesh, shard_model, whole_tensor
from opt_torch.training import Trainer

SIZES = dict(vocab_size=94, hidden_size=4 * 14, num_hidden_layers=2, ffn_dim=58, num_attention_heads=4, dropout=0.0)
SIZES |= dict(max_position_embeddings=41)
CONFIGS = {
    "pre-norm": OPTConfig(**SIZES),
    "350m style": OPTConfig(**SIZES | VARIANTS["350m style"] | dict(word_embed_proj_dim=22)),
    "untied, without biases": OPTConfig(**SIZES, enable_bias=False, tie_word_embeddings=False),
}
RECIPE = TrainingRecipe(learning_rate=0.01, warmup_steps=2, total_steps=9, max_gradient_norm=0.7)
STEPS = 5
DROPOUT = dict(dropout=0.3, layerdrop=0.2)


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Eight rows, the first four of which predict far fewer tokens: a mean of means is another number."""
    ids = token_ids(CONFIGS["pre-norm"], 8, seed=step)
    labels = np.where(np.random.default_rng(step).random(ids.shape) < 0.3, IGNORED_LABEL, ids)
    labels[:4, 3:] = IGNORED_LABEL
    return dict(input_ids=ids, labels=labels, attention_mask=np.concatenate([mask_named("holes"), mask_named("left")]))


def doubled(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([x, x]) for name, x in batch.items()}


def model_of(folder: Path, variant: str = "pre-norm", mesh=None, double: bool = True, **changes) -> OPTForCausalLM:
    model = OPTForCausalLM.from_pretrained(folder / "models" / variant, **changes)
    model = model.double() if double else model
    return model if mesh is None else shard_model(model, mesh)


def steps_of(trainer: Trainer, begin: int, count: int) -> np.ndarray:
    """The loss and the norm of each step."""
    return np.array([(trainer.step(batch_of(step)), trainer.gradient_norm) for step in range(begin, begin + count)])


def training(folder: Path, variant: str, mesh=None, **options) -> dict[str, np.ndarray]:
    """Loss and norm of some steps, the weights after them, and what they compute then."""
    model = model_of(folder, variant, mesh)
    trainer = Trainer(model, RECIPE, **options)
    found = {"steps": steps_of(trainer, 0, STEPS), "evaluated": np.float64(trainer.evaluate(batch_of(STEPS)))}
    out = trainer.predict(batch_of(STEPS))
    found |= {"predicted": out.logits.numpy(), "predicted loss": out.loss.numpy()}
    return found | {name: whole_tensor(model.weight(name)).numpy() for name in shapes(model.config)}


def other_heads(folder: Path, mesh=None, **options) -> dict[str, np.ndarray]:
    """Two steps of a classifier and of one that answers questions, and what they say then.

    Labels are left out in the first rows; starts and ends, many at padding, count unequally often.
    """
    found, numbers = {}, np.arange(8)
    for model_class, labels, output in (
        (OPTForSequenceClassification, dict(labels=np.where(numbers < 3, IGNORED_LABEL, numbers % 3)), "logits"),
        (OPTForQuestionAnswering, dict(start_positions=numbers + 3, end_positions=numbers), "end_logits"),
    ):
        torch.manual_seed(0)  # of the head, which the checkpoint has not
        model = model_class.from_pretrained(folder / "models" / "pre-norm", num_labels=3).double()
        trainer = Trainer(model if mesh is None else shard_model(model, mesh), RECIPE, **options)
        batch = {name: batch_of(0)[name] for name in ("input_ids", "attention_mask")} | labels
        losses = [*(trainer.step(batch) for _ in range(2)), trainer.evaluate(batch)]
        out = trainer.predict({name: x for name, x in batch.items() if name not in labels})
        assert out.loss is None
        found |= {f"{output} {name}": x for name, x in (("losses", losses), ("values", getattr(out, output).numpy()))}
    return {name: np.array(x) for name, x in found.items()}


def dropping(folder: Path, mesh=None) -> dict[str, np.ndarray]:
    """Losses with dropout: of a batch, and of one whose second half is its first again."""
    trainers = [Trainer(model_of(folder, mesh=mesh, **DROPOUT), RECIPE, seed=5) for _ in range(2)]
    return {"steps": steps_of(trainers[0], 0, 2), "doubled": np.float64(trainers[1].step(doubled(batch_of(0))))}


def refusals(folder: Path, mesh) -> dict:
    """The messages of errors that every process must raise."""
    trainer, found = Trainer(model_of(folder, mesh=mesh, double=False), RECIPE), {}
    parameter = trainer.parameters["decoder.layers.0.fc1.bias"]
    before = whole_tensor(parameter)
    for name, rows, error in (("rows", 7, InputError), ("not finite", 8, TrainingError)):
        if name == "not finite" and os.environ["RANK"] == "1":
            trainer.parameters["decoder.layers.1.fc1.weight"].data.to_local()[0] = np.nan
        try:
            trainer.step({name: x[:rows] for name, x in batch_of(0).items()})
        except error as raised:
            found[name] = str(raised)
    try:
        trainer.save(folder / "models" / "pre-norm" / "config.json")
    except FileExistsError as raised:
        found["a file in the way"] = str(raised)
    return found | {"unchanged": bool((whole_tensor(parameter) == before).all()), "steps done": trainer.step_count}


def saved_and_restored(folder: Path, text: str, mesh) -> dict[str, np.ndarray]:
    """Steps after a checkpoint of its own, which the test goes on from, and after one of a single process."""
    trainer = Trainer(model_of(folder, mesh=mesh, double=False), RECIPE, seed=3)
    steps_of(trainer, 0, 2)
    trainer.save(folder / text)
    found = {"own": steps_of(trainer, 2, 2)}
    trainer.restore(folder / "single")
    return found | {"single": steps_of(trainer, 2, 2), "state": np.array([trainer.step_count, trainer.seed])}


def distributed(folder: Path, text: str, mesh, first: str) -> dict[str, np.ndarray]:
    """Steps after a checkpoint of parts: of its own, of a single process, and of the first mesh."""
    trainer = Trainer(model_of(folder, mesh=mesh, double=False), RECIPE, seed=3)
    steps_of(trainer, 0, 2)
    save_distributed(trainer, folder / "parts" / text)
    found = {"own": steps_of(trainer, 2, 2)}
    for source in ("single", first):
        trainer = Trainer(model_of(folder, mesh=mesh, double=False), RECIPE)
        restore_distributed(trainer, folder / "parts" / source)
        found[source] = steps_of(trainer, 2, 2)
    return found | {"state": np.array([trainer.step_count, trainer.seed])}


def by_other_rules(folder: Path) -> dict[str, np.ndarray]:
    """Of axes with names of one's own, which the rules know."""
    rules = Rules((("A", "model"), ("F", "model"), ("D", "shards")), batch=("shards",))
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("shards", "model"))
    trainer = Trainer(shard_model(model_of(folder, double=False), mesh, rules), RECIPE)
    losses = steps_of(trainer, 0, 2)
    trainer.save(folder / "by other rules")
    trainer.restore(folder / "by other rules")
    return {
        "steps": losses,
        "evaluated": np.float64(trainer.evaluate(batch_of(STEPS))),
        "parts": np.array(trainer.parts),
    }


def main(folder: Path, meshes: Sequence[str]) -> None:
    found: dict[str, np.ndarray] = {}
    for text in meshes:
        mesh = init_mesh(text, "cpu")
        cases = {variant: training(folder, variant, mesh) for variant in CONFIGS}
        cases["in parts"] = training(folder, "pre-norm", mesh, accumulate=2)
        cases["other heads"] = other_heads(folder, mesh)
        cases["dropout"] = dropping(folder, mesh)
        cases["saved"] = saved_and_restored(folder, text, mesh)
        cases["distributed"] = distributed(folder, text, mesh, meshes[0])
        if text == "fsdp=2":  # rows of which each process has its own
            cases |= {"refused": refusals(folder, mesh), "other rules": by_other_rules(folder)}
        found |= {f"{text}/{case}/{name}": x for case, values in cases.items() for name, x in values.items()}
    np.savez(folder / f"rank{os.environ['RANK']}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
