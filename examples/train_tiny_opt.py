"""Trains a small OPT on one text file and writes it as a checkpoint: how the embedded checkpoints were made.

    python examples/train_tiny_opt.py --text tinyshakespeare.txt --model opt-tiny --output my-opt-tiny

The last tenth of the text is held out; the weights with the lowest loss on it are kept and stored in float16, as the
published ones are. The optimiser is that of section 2.2 of Zhang et al. (arXiv:2205.01068), AdamW with betas 0.9 and
0.95 and weight decay 0.1, with a cosine in place of the linear decay. It runs on the CPU and is no recipe for large
models.
"""

import argparse
import copy
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from train_tokenizer import train_tokenizer

from opt_core import OPTConfig
from opt_core.reference import IGNORED_LABEL
from opt_torch import OPTForCausalLM
from opt_torch.losses import cross_entropy

HELD_OUT = 0.1  # of the characters, from the end

MODELS = {
    "opt-tiny": dict(hidden_size=192, ffn_dim=768, num_attention_heads=6),
    # Post-norm with projections; heads of 44, no power of two and no multiple of 8. With the published init_std of 0.02
    # so narrow a post-norm model stays at the loss of token frequencies; 0.075 is 1 / sqrt(hidden_size).
    "opt-tiny-350m-style": dict(
        hidden_size=176,
        ffn_dim=704,
        num_attention_heads=4,
        word_embed_proj_dim=96,
        do_layer_norm_before=False,
        init_std=0.075,
    ),
}
SHARED = dict(vocab_size=2048, num_hidden_layers=4, max_position_embeddings=256, architectures=["OPTForCausalLM"])


class Recipe(NamedTuple):
    """What the training does."""

    steps: int = 2400
    batch_size: int = 4
    peak_rate: float = 1.5e-3
    warm_up: int = 150
    final_share: float = 0.05  # of the peak rate, at the last step
    weight_decay: float = 0.1  # of matrices; not of norms and biases
    clip_norm: float = 1.0
    evaluate_every: int = 100
    seed: int = 0


RECIPES = {"opt-tiny": Recipe(), "opt-tiny-350m-style": Recipe(peak_rate=1e-3, warm_up=300)}


class Loss(NamedTuple):
    """Cross entropy of a text, each of its tokens counted once."""

    nats_per_token: float
    bits_per_byte: float


# -- data -------------------------------------------------------------------------------------------------------------


def split_text(text: str) -> tuple[str, str]:
    """The text to train on, and the end of it that is held out."""
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def make_inputs(targets_BT: Tensor, bos_token_id: int) -> Tensor:
    """The ids from which `targets_BT` are predicted: BOS, then all targets but the last.

    So each of the T positions has a target. With labels that are the inputs the last position has none, and the last
    row of the position table would stay untrained.
    """
    bos_B1 = targets_BT.new_full((len(targets_BT), 1), bos_token_id)
    return torch.cat([bos_B1, targets_BT[:, :-1].clamp(min=0)], dim=1)


def shuffled_windows(ids: Tensor, length: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [B, `length`] of windows in random order, cut anew from a random offset on each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(length, (), generator=generator))
        windows = ids[offset : offset + (len(ids) - offset) // length * length].view(-1, length)
        yield from windows[torch.randperm(len(windows), generator=generator)].split(batch_size)


def consecutive_windows(ids: Tensor, length: int) -> Tensor:
    """All of `ids` in rows of `length`, the last filled with -100, which the loss ignores."""
    rows = -(-len(ids) // length)
    padded = torch.full((rows * length,), IGNORED_LABEL)
    padded[: len(ids)] = ids
    return padded.view(rows, length)


# -- training ---------------------------------------------------------------------------------------------------------


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to `final_share` of the peak."""
    if step < recipe.warm_up:
        return recipe.peak_rate * (step + 1) / recipe.warm_up
    progress = (step - recipe.warm_up) / max(1, recipe.steps - recipe.warm_up)
    return recipe.peak_rate * (recipe.final_share + (1 - recipe.final_share) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: OPTForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.95), eps=1e-8)


def window_loss(model: OPTForCausalLM, targets_BT: Tensor) -> Tensor:
    """The mean loss over the targets that are not -100."""
    inputs_BT = make_inputs(targets_BT, model.config.bos_token_id)
    return cross_entropy(model(inputs_BT, use_cache=False).logits, targets_BT)


@torch.no_grad()
def text_loss(model: OPTForCausalLM, ids: Tensor, text_bytes: int, batch_size: int = 8) -> Loss:
    """The loss of a text, read in windows that know nothing of each other; dropout off."""
    was_training = model.training
    model.eval()
    total = 0.0
    for targets_BT in consecutive_windows(ids, model.config.max_position_embeddings).split(batch_size):
        total += float(window_loss(model, targets_BT)) * int((targets_BT != IGNORED_LABEL).sum())
    model.train(was_training)
    return Loss(total / len(ids), total / math.log(2) / text_bytes)


def train(
    model: OPTForCausalLM, ids: Tensor, recipe: Recipe, evaluate: Callable[[OPTForCausalLM], float]
) -> tuple[list[float], list[tuple[int, float]]]:
    """Trains in place and leaves the model, in evaluation mode, with the weights that `evaluate` found best.

    Returns the training loss of each step, and the evaluations as (steps done, loss).

    Raises:
        FloatingPointError: no evaluation was finite.
    """
    torch.manual_seed(recipe.seed)  # of dropout
    optimizer = make_optimizer(model, recipe)
    batches = shuffled_windows(ids, model.config.max_position_embeddings, recipe.batch_size, recipe.seed)
    losses, evaluations, best, start = [], [], None, time.perf_counter()
    model.train()
    for step in range(1, recipe.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, recipe)
        losses.append(train_step(model, next(batches), optimizer, recipe.clip_norm))
        if step % recipe.evaluate_every == 0 or step == recipe.steps:
            held_out = evaluate(model)
            if held_out < min((loss for _, loss in evaluations), default=math.inf):
                best = copy.deepcopy(model.state_dict())
            evaluations.append((step, held_out))
            recent, seconds = np.mean(losses[-recipe.evaluate_every :]), time.perf_counter() - start
            print(f"step {step:5}  train {recent:.4f}  held out {held_out:.4f}  {seconds:.0f} s", flush=True)
    if best is None:
        raise FloatingPointError("the held-out loss was never finite: lower the peak rate")
    model.load_state_dict(best)
    model.eval()
    return losses, evaluations


def train_step(model: OPTForCausalLM, targets_BT: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float) -> float:
    loss = window_loss(model, targets_BT)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return loss.item()


def unigram_loss(train_ids: Tensor, held_out_ids: Tensor, vocab_size: int) -> float:
    """Nats per token of the best model that looks at no context: token frequencies, one added to each count."""
    counts_V = np.bincount(train_ids.numpy(), minlength=vocab_size) + 1.0
    return float(-np.log(counts_V / counts_V.sum())[held_out_ids.numpy()].mean())


# -- the checkpoint ---------------------------------------------------------------------------------------------------

CARD = """\
# {name}

A small OPT, {style}.
It is for demonstrations and tests that need trained weights and no network. Greedy text soon repeats itself.

- Architecture: {sizes}; {parameters:,} parameters, stored in float16.
- Data: Tiny Shakespeare, about 1 MB of Shakespeare's plays, which are in the public domain. The last 10 % of the
  characters were held out. Its last third is in `examples/data`.
- Tokenizer: byte-level BPE of {vocab_size} tokens with OPT's special ids, trained on the same 90 %. Prompts begin with
  `</s>` (id 2), as OPT's do; training never showed where a text ends, so the model goes on until it is stopped.
- Licence: that of this repository.

| weights | held-out loss, nats per token | bits per byte |
|---|---|---|
| as trained, float32 | {exact.nats_per_token:.4f} | {exact.bits_per_byte:.4f} |
| as stored, rounded to float16 | {stored.nats_per_token:.4f} | {stored.bits_per_byte:.4f} |
| token frequencies alone | {unigram:.4f} | |

Kept: the best of {evaluations} evaluations, at step {best_step} of {steps}, each of {batch_tokens} tokens.
The mean training loss of the {evaluate_every} steps before it, with dropout, was {train_loss:.4f}.

Made by, with PyTorch {torch_version}:

    {command}
"""


def write_card(folder: Path, model: OPTForCausalLM, **measured) -> None:
    c = model.config
    style_350m = "in the style of opt-350m (post-norm, with projections of the word embeddings)"
    style = "pre-norm" if c.do_layer_norm_before else style_350m
    sizes = (
        f"{c.num_hidden_layers} layers of width {c.hidden_size}, {c.num_attention_heads} heads of {c.head_size}, "
        f"feed-forward {c.ffn_dim},\n"
        f"  word embeddings of {c.word_embed_proj_dim}, {c.max_position_embeddings} positions"
    )
    card = CARD.format(
        name=folder.name,
        style=style,
        sizes=sizes,
        parameters=model.num_parameters(),
        vocab_size=c.vocab_size,
        torch_version=torch.__version__.partition("+")[0],
        **measured,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def make_checkpoint(text: str, name: str, folder: Path, recipe: Recipe, command: str) -> None:
    """Trains tokenizer and model, and writes weights, tokenizer and card to `folder`."""
    train_text, held_out_text = split_text(text)
    config = OPTConfig(**SHARED, **MODELS[name])
    tokenizer = train_tokenizer(train_text, config.vocab_size)
    train_ids, held_out_ids = (
        torch.tensor(tokenizer(part, add_special_tokens=False).input_ids) for part in (train_text, held_out_text)
    )
    held_out_bytes = len(held_out_text.encode())
    unigram = unigram_loss(train_ids, held_out_ids, config.vocab_size)
    print(f"{len(train_ids)} tokens to train on, {len(held_out_ids)} held out; unigram loss {unigram:.4f}", flush=True)

    torch.manual_seed(recipe.seed)
    model = OPTForCausalLM(config)
    losses, evaluations = train(
        model, train_ids, recipe, lambda model: text_loss(model, held_out_ids, held_out_bytes).nats_per_token
    )
    best_step = min(evaluations, key=lambda evaluation: evaluation[1])[0]
    exact = text_loss(model, held_out_ids, held_out_bytes)
    model.to(torch.float16).save_pretrained(folder)
    stored = text_loss(model.float(), held_out_ids, held_out_bytes)
    print(f"held out: {exact}, rounded to float16: {stored}")
    tokenizer.save_pretrained(folder)
    recent = losses[max(0, best_step - recipe.evaluate_every) : best_step]
    write_card(
        folder,
        model,
        exact=exact,
        stored=stored,
        unigram=unigram,
        train_loss=sum(recent) / len(recent),
        evaluate_every=len(recent),
        evaluations=len(evaluations),
        best_step=best_step,
        steps=recipe.steps,
        batch_tokens=recipe.batch_size * config.max_position_embeddings,
        command=command,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="a UTF-8 text file")
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--threads", type=int, default=1)
    for name, kind in (("steps", int), ("batch_size", int), ("peak_rate", float), ("seed", int)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="by default that of the embedded checkpoint")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    given = {name: value for name in Recipe._fields if (value := getattr(arguments, name, None)) is not None}
    recipe = RECIPES[arguments.model]._replace(**given)
    folders = {str(arguments.text): arguments.text.name, str(arguments.output): arguments.output.name}
    command = shlex.join(["python", "examples/train_tiny_opt.py", *(folders.get(word, word) for word in sys.argv[1:])])
    make_checkpoint(arguments.text.read_text(encoding="utf-8"), arguments.model, arguments.output, recipe, command)


if __name__ == "__main__":
    main()
