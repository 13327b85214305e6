"""Trains a model, on one device or on a mesh, and leaves what it got: the test asks for the first, this script does the
second.

python train_on_mesh.py FOLDER CASE ...    # with checkpoints in FOLDER/models, runs in FOLDER/single and FOLDER/torch

A case is a mesh and a function below, as in "fsdp=2 pre_norm". On 4 devices of one process, or on one device of each of
several.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from flax import nnx
from harness import VARIANTS, mask_named, token_ids

from opt_core import OPTConfig
from opt_core.errors import ProblemsError
from opt_core.lora import LoraConfig
from opt_core.optimization import TrainingRecipe
from opt_core.reference import IGNORED_LABEL
from opt_core.schema import shapes
from opt_flax import FlaxOPTForCausalLM, training
from opt_flax.lora import add_lora
from opt_flax.sharding import init_mesh, on_host, shard_model
from opt_flax.training import Trainer

SIZES = dict(vocab_size=94, hidden_size=4 * 14, num_hidden_layers=2, ffn_dim=58, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=41, dropout=0.0)
DROPPING = dict(dropout=0.2, layerdrop=0.2)  # the same values on any mesh
UNTIED = dict(word_embed_proj_dim=22, tie_word_embeddings=False, num_hidden_layers=1)
CONFIGS = {
    "pre-norm": OPTConfig(**SIZES | DROPPING),
    "350m style": OPTConfig(**SIZES | VARIANTS["350m style"] | UNTIED),
}
# With an epsilon of the usual 1e-8, Adam would make steps of the rounding of gradients that are nearly zero.
RECIPE = TrainingRecipe(learning_rate=0.01, warmup_steps=2, total_steps=9, max_gradient_norm=0.7, epsilon=1e-3)
STEPS = 5


def batch_of(step: int) -> dict[str, np.ndarray]:
    """Four rows of which the first two predict far fewer tokens than the others: a mean of means is another number."""
    ids = token_ids(CONFIGS["pre-norm"], seed=step)
    labels = np.where(np.random.default_rng(step).random(ids.shape) < 0.3, IGNORED_LABEL, ids)
    labels[:2, 3:] = IGNORED_LABEL
    return dict(input_ids=ids, labels=labels, attention_mask=mask_named("holes"))


def documents_of(step: int) -> dict[str, np.ndarray]:
    """The same rows without padding, two documents in each."""
    batch = batch_of(step)
    segments = np.repeat([[0, 1]], 13, axis=1)[:, [*range(9), *range(13, 17)]]
    return dict(input_ids=batch["input_ids"], labels=batch["labels"], segment_ids=np.repeat(segments, 4, axis=0))


def model_of(folder: Path, variant: str = "pre-norm", mesh=None, **changes) -> FlaxOPTForCausalLM:
    return FlaxOPTForCausalLM.from_pretrained(folder / "models" / variant, device_mesh=mesh, **changes)


def steps_of(trainer: Trainer, begin: int, count: int, batches=batch_of) -> np.ndarray:
    """The loss and the norm of each step."""
    return np.array([(trainer.step(batches(step)), trainer.gradient_norm) for step in range(begin, begin + count)])


def weights_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(on_host(model.weight(name))) for name in shapes(model.config)}


# -- cases ------------------------------------------------------------------------------------------------------------


def pre_norm(folder: Path, mesh=None) -> dict[str, np.ndarray]:
    """Loss and norm of some steps, the weights after them, what they compute then, and where arrays lie."""
    trainer = Trainer(model_of(folder, mesh=mesh), RECIPE, seed=5)
    gradients = training._gradients_for(trainer.model.placement)
    compiled = gradients._cache_size(), training._update._cache_size()
    found = {"steps": steps_of(trainer, 0, STEPS), "evaluated": np.float64(trainer.evaluate(batch_of(STEPS)))}
    out = trainer.predict(batch_of(STEPS))
    found |= {"predicted": np.array(out.logits), "predicted loss": np.array(out.loss), **weights_of(trainer.model)}
    if mesh is not None:
        programs = gradients._cache_size(), training._update._cache_size()
        found["programs"] = np.subtract(programs, compiled)
        found["misplaced"] = np.array(misplaced(trainer))
    return found


def style_of_350m(folder: Path, mesh=None) -> dict[str, np.ndarray]:
    """Projections, norms behind, an untied head; documents in rows, and a batch in parts."""
    trainer = Trainer(model_of(folder, "350m style", mesh), RECIPE, accumulate=2)
    return {"steps": steps_of(trainer, 0, STEPS, documents_of), **weights_of(trainer.model)}


def adapters(folder: Path, mesh=None) -> dict[str, np.ndarray]:
    """Some steps of adapters alone, and one more after they were saved and restored."""
    trainer = Trainer(adapted(folder, mesh), RECIPE)
    found = {"steps": steps_of(trainer, 0, 2)}
    name = f"adapter {mesh is None}"
    trainer.save(folder / name)
    again = Trainer(adapted(folder, mesh), RECIPE)
    again.restore(folder / name)
    return found | {"step after": steps_of(again, 2, 1)}


def resumed(folder: Path, mesh=None) -> dict[str, np.ndarray]:
    """Steps after what one device left, and after what PyTorch left, in FOLDER; and a run to be gone on with."""
    trainer, found = Trainer(model_of(folder, mesh=mesh), RECIPE), {}
    for name in ("single", "torch"):
        if (folder / name).exists():
            trainer.restore(folder / name)
            found[name] = steps_of(trainer, 2, 2)
            found[f"{name} state"] = np.array([trainer.step_count, trainer.seed])
    if mesh is not None:
        found["misplaced"] = np.array(misplaced(trainer))
        trainer.save(folder / f"from {mesh.axis_names[0]}")
        found["after"] = steps_of(trainer, 4, 1)
    return found


def refused(folder: Path, mesh) -> dict[str, np.ndarray]:
    """The messages of errors that every process must raise, and whether anything changed."""
    trainer, found = Trainer(model_of(folder, mesh=mesh), RECIPE), {}
    before = weights_of(trainer.model)
    (folder / "a file").write_text("")
    attempts = {
        "rows": lambda: trainer.step({name: x[:3] for name, x in batch_of(0).items()}),
        "evaluated rows": lambda: trainer.evaluate({name: x[:3] for name, x in batch_of(0).items()}),
        "not finite": lambda: trainer.step(batch_of(0)),
        "a file in the way": lambda: trainer.save(folder / "a file"),
    }
    bias = trainer.model.model.decoder.layers[1].fc1.bias
    for name, attempt in attempts.items():
        kept = bias.get_value()
        if name == "not finite":
            bias.set_value(kept * np.nan)
        try:
            attempt()
        except (ProblemsError, OSError) as raised:
            found[name] = np.array(f"{type(raised).__name__}: {raised}")
        bias.set_value(kept)
    after = weights_of(trainer.model)
    found["unchanged"] = np.array(all((after[name] == x).all() for name, x in before.items()))
    return found | {
        "steps done": np.array(trainer.step_count),
        "agreed": np.array(trainer.agree(trainer.process_index)),
    }


def shares(_: Path, mesh) -> dict[str, np.ndarray]:
    """Bytes on a device, as parts of those of all weights; and what a step holds more for one layer more, of a layer's.

    With a width so large that what is kept of a few tokens does not count.
    """
    found, held, weights = {}, {}, {}
    for layers in (1, 2):
        sizes = dict(hidden_size=128, ffn_dim=512, max_position_embeddings=997, num_hidden_layers=layers)
        config = OPTConfig(**SIZES | sizes)
        model = shard_model(FlaxOPTForCausalLM(config), mesh)
        trainer, weights[layers] = Trainer(model, RECIPE), 4 * model.num_parameters()
        ids = token_ids(config, 4, 2)
        graphdef, trained, rest = nnx.split(model, model.trainable, ...)
        batch = trainer._checked(dict(input_ids=ids, labels=ids))
        given = graphdef, trained, rest, batch, np.uint32([0, 0]), 1, trainer._layout()
        memory = training._gradients_for(model.placement).lower(*given).compile().memory_analysis()
        held[layers] = memory.temp_size_in_bytes
        found = dict(given=memory.argument_size_in_bytes, gradients=memory.output_size_in_bytes)
    optimizer, moments = nnx.split(trainer.optimizer)
    memory = training._update.lower(graphdef, optimizer, trained, moments, rest, trained).compile().memory_analysis()
    found = dict(found, written=memory.alias_size_in_bytes / 3, beside_it=memory.temp_size_in_bytes)
    found = {name: np.array(x / weights[2]) for name, x in found.items()}
    return found | {"a layer more": np.array((held[2] - held[1]) / (weights[2] - weights[1]))}


def adapted(folder: Path, mesh) -> FlaxOPTForCausalLM:
    model = model_of(folder, mesh=mesh, dropout=0.0, layerdrop=0.0)
    add_lora(model, LoraConfig(r=3, target_modules=("q_proj", "fc2")))
    return model


def misplaced(trainer: Trainer) -> list[str]:
    """The names of moments that do not lie as their weights, and of weights that do not lie as the rules say."""
    model, found = trainer.model, []
    rules = model.placement.weights(model.config, model.task)
    for name, pair in training._moments(nnx.state(trainer.optimizer)).items():
        weight = model.weight(name)
        arrays = [weight, *(variable.get_value() for variable in pair)]
        found += [name for x in arrays if not x.sharding.is_equivalent_to(rules[name], x.ndim)]
    return found


def main(folder: Path, *cases: str) -> None:
    found: dict[str, np.ndarray] = {}
    for case in cases:
        text, _, function = case.partition(" ")
        values = globals()[function](folder, init_mesh(text))
        found |= {f"{case}/{name}": x for name, x in values.items()}
    np.savez(folder / f"rank{jax.process_index()} of {jax.process_count()}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
