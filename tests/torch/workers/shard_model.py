"""What a model computes, whole or over several processes: the test asks for the first, this script does the second.

torchrun --nproc-per-node 2 shard_model.py FOLDER    # with checkpoints in FOLDER/models
"""

import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from harness import VARIANTS, mask_named, token_ids
from torch.distributed.tensor import DTensor

from opt_core import OPTConfig
from opt_core.errors import InputError
from opt_core.lora import LoraConfig
from opt_core.reference import IGNORED_LABEL
from opt_core.schema import shapes
from opt_core.sharding import Rules, batch_axes, batch_rows
from opt_torch import OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification
from opt_torch.lora import add_lora
from opt_torch.sharding import init_mesh, own_slices, shard_model, whole_tensor, write_from_first

SIZES = dict(vocab_size=4 * 23, hidden_size=4 * 14, num_hidden_layers=2, ffn_dim=4 * 13, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=41, dropout=0.0)
CONFIGS = {
    "pre-norm": OPTConfig(**SIZES),
    "350m style": OPTConfig(**SIZES | VARIANTS["350m style"] | dict(word_embed_proj_dim=4 * 11)),
    "untied, without biases": OPTConfig(**SIZES, enable_bias=False, tie_word_embeddings=False),
    "norms without weights, pruned": OPTConfig(**SIZES, layer_norm_elementwise_affine=False, pruned_heads={1: [0, 2]}),
}
MESHES = {2: ("tensor=2", "fsdp=2"), 4: ("fsdp=2,tensor=2", "data=2,tensor=2", "data=2,fsdp=2", "fsdp=4")}
VARIANTS_ON = {2: tuple(CONFIGS), 4: ("pre-norm", "350m style")}
HEADS = {"classes": OPTForSequenceClassification, "answers": OPTForQuestionAnswering}
IDS = token_ids(CONFIGS["pre-norm"])
SEGMENTS = np.array([[0] * 4 + [1] * 7 + [0] * 2, [3] * 13, [0] * 6 + [1] * 7, [0, 1] + [2] * 11])
LABELS = np.where(np.random.default_rng(1).random(IDS.shape) < 0.3, IGNORED_LABEL, IDS)
HEAD_MASK = np.random.default_rng(2).random((2, 4)).astype(np.float32)
GENERATIONS = {
    "greedy": {},
    "sampled": dict(do_sample=True, seed=3, top_k=7),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "contrastive": dict(penalty_alpha=0.6, top_k=3),
}


@torch.no_grad()
def outputs(model) -> dict[str, np.ndarray]:
    """Logits and what else a call returns, without and with padding, documents, a mask of heads and a cache."""
    whole = model(IDS, output_attentions=True, output_hidden_states=True, head_mask=HEAD_MASK)
    found = {"head mask": whole.logits, "attentions": torch.stack([a.mean(1) for a in whole.attentions])}
    found |= {"hidden": torch.stack(whole.hidden_states[:-1]), "last hidden": whole.hidden_states[-1]}
    found |= {"plain": model(IDS).logits, "padded": model(IDS, attention_mask=mask_named("holes")).logits}
    found["documents"] = model(IDS, segment_ids=SEGMENTS).logits
    cache = model.init_cache(len(IDS), 16)
    first = model(IDS[:, :9], past_key_values=cache)
    found["cached"] = model(IDS[:, 9:], past_key_values=first.past_key_values).logits
    return {name: x.numpy() for name, x in found.items()}


def generations(model, assistant=None) -> dict[str, np.ndarray]:
    given = dict(attention_mask=mask_named("left"), max_new_tokens=6)
    found = {name: model.generate(IDS, **given, **options).numpy() for name, options in GENERATIONS.items()}
    found["streamed"] = np.stack(list(model.stream(IDS, **given)), axis=1)
    if assistant is not None:
        found["assisted"] = model.generate(IDS[:1], max_new_tokens=6, assistant_model=assistant).numpy()
    return found


def differentiated(model, parts: list[slice]) -> dict[str, np.ndarray]:
    """The mean of the losses of some parts of the batch, and its gradients; then two steps of a plain optimizer."""
    model.train()
    found, head_mask = {}, torch.tensor(HEAD_MASK, dtype=model.dtype, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step, keep in enumerate((0, 1)):
        optimizer.zero_grad()
        total = 0.0
        for rows in parts:
            inputs = dict(attention_mask=mask_named("holes")[rows], labels=LABELS[rows], head_mask=head_mask)
            loss = model(IDS[rows], logits_to_keep=keep, **inputs).loss / len(parts)
            loss.backward()
            total += float(loss.detach())
        found[f"{step}/loss"] = np.float64(total)
        found |= {f"{step}/{name}": _numpy(model.weight(name).grad) for name in shapes(model.config)}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    model.eval()
    found |= {f"after/{name}": _numpy(model.weight(name)) for name in shapes(model.config)}
    return found | {"gradient of the head mask": head_mask.grad.numpy()}


def with_new_head(folder: Path, mesh=None) -> dict[str, np.ndarray]:
    """Logits of heads that the checkpoint lacks, by a seed; of another one on every process but the first."""
    found = {}
    for name, cls in HEADS.items():
        torch.manual_seed(7 + (dist.get_rank() if mesh else 0))
        model = cls.from_pretrained(folder / "models" / "pre-norm", device_mesh=mesh)
        out = model(IDS, **({} if name == "classes" else dict(start_positions=[1] * 4, end_positions=[2] * 4)))
        if name == "answers":
            out.loss.backward()
            found["answers' gradient"] = _numpy(model.qa_outputs.weight.grad)
        found[name] = (out.logits if name == "classes" else out.end_logits).detach().numpy()
    return found


def with_other_rules(folder: Path, mesh) -> dict[str, np.ndarray]:
    """Logits and a loss where only heads, the feed-forward or the vocabulary are cut."""
    found = {}
    for letter in "AFV":
        model = OPTForCausalLM.from_pretrained(folder / "models" / "pre-norm")
        model = shard_model(model, mesh, Rules(((letter, "tensor"),)))
        assert model.init_cache(1, 5).keys[0].shape[1] == (2 if letter == "A" else 4)
        with torch.no_grad():
            found[letter] = model(IDS).logits.numpy()
            found[f"{letter}'s loss"] = model(IDS, labels=LABELS, logits_to_keep=1).loss.numpy()
    return found


def refusals(folder: Path, mesh) -> dict[str, str]:
    """The messages of errors, which every process must raise."""
    rank, load = dist.get_rank(), OPTForCausalLM.from_pretrained
    model = load(folder / "models" / "pre-norm", device_mesh=mesh)
    odd = OPTForCausalLM(OPTConfig(**SIZES | dict(vocab_size=97, num_attention_heads=7, ffn_dim=13)))
    adapted = OPTForCausalLM(CONFIGS["pre-norm"])
    add_lora(adapted, LoraConfig(r=2))
    placed = OPTForCausalLM(CONFIGS["pre-norm"])
    placed.offloaded = {}
    (folder / "a file").touch()
    calls = {
        "sizes": lambda: shard_model(odd, mesh),
        "twice": lambda: shard_model(model, mesh),
        "adapters": lambda: shard_model(adapted, mesh),
        "placed": lambda: shard_model(placed, mesh),
        "rules": lambda: shard_model(odd, mesh, Rules((("D", "tensor"),))),
        "processes": lambda: init_mesh("fsdp=3"),
        "device": lambda: load(folder / "models" / "pre-norm", device_mesh=mesh, device="cpu"),
        "inputs": lambda: model.generate(IDS + (rank == 1), max_new_tokens=3),
        "options": lambda: model.generate(IDS, max_new_tokens=3, do_sample=True, temperature=1.5 + rank),
        "seeds": lambda: model.generate(IDS, max_new_tokens=3, do_sample=True, seed=rank),
        "one process": lambda: model.generate(IDS * (1 - 2 * (rank == 1)), max_new_tokens=3),
        "time": lambda: model.generate(IDS, max_new_tokens=3, max_time=1.0),
        "resize": lambda: model.resize_token_embeddings(100),
        "positions": lambda: model.resize_position_embeddings(100),
        "prune": lambda: model.prune_heads({0: [1]}),
        "add_lora": lambda: add_lora(model, LoraConfig(r=2)),
        "push": lambda: model.push_to_hub("a/b"),
        "save": lambda: model.save_pretrained(folder / "a file"),
        "write": lambda: write_from_first(model.weight, _fail),
    }
    found = {name: _message(call) for name, call in calls.items()}
    assert not any(isinstance(p, DTensor) for p in odd.parameters())  # refused before anything was changed
    assert odd.base_model.decoder.layers[0].self_attn.num_heads == 7
    return found


class _Unsendable(OSError):
    """An error that cannot be sent to another process."""

    def __reduce__(self):
        raise TypeError("cannot be pickled")


def _fail(whole) -> None:
    whole("decoder.embed_tokens.weight")
    raise _Unsendable("the disk is gone")


def _message(call) -> str:
    try:
        call()
    except (InputError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def _numpy(x: torch.Tensor) -> np.ndarray:
    return whole_tensor(x).numpy().copy()  # of what an optimizer changes in place


def loaded(folder: Path, variant: str, mesh, text: str) -> dict[str, np.ndarray]:
    """Of a model that was loaded in parts: what it computes, what was read for it, and what it saves."""
    name = folder / "models" / variant
    model, info = OPTForCausalLM.from_pretrained(name, device_mesh=mesh, output_loading_info=True)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    assistant = OPTForCausalLM.from_pretrained(folder / "models" / "pre-norm") if variant == "350m style" else None
    found = outputs(model) | generations(model, assistant) | {"bytes read": np.array(info["bytes_read"])}
    found |= {f"slices/{n}": np.array([(s.start, s.stop) for s in x]) for n, x in own_slices(model).items()}
    found["unseeded"] = model.generate(IDS, max_new_tokens=6, do_sample=True).numpy()
    model.save_pretrained(folder / "saved" / text / variant)
    return found


def sharded(folder: Path, variant: str, mesh) -> dict[str, np.ndarray]:
    """Of a model of which process 0 alone has the weights, in float64."""
    model = OPTForCausalLM(CONFIGS[variant]).double()
    if dist.get_rank() == 0:
        model = OPTForCausalLM.from_pretrained(folder / "models" / variant).double()
    model = shard_model(model, mesh)
    if variant == "pre-norm":
        model.gradient_checkpointing_enable()
    assert not batch_axes(model.mesh) or type(model).__mro__[2] is OPTForCausalLM  # FSDP's own class is in between
    return differentiated(model, [batch_rows(len(IDS), model.mesh, mesh.get_coordinate())])


def main(folder: Path) -> None:
    warnings.simplefilter("error", UserWarning)
    found, refused, processes = {}, {}, int(os.environ["WORLD_SIZE"])
    for text in MESHES[processes]:
        mesh = init_mesh(text, "cpu")
        for variant in VARIANTS_ON[processes]:
            arrays = loaded(folder, variant, mesh, text) | sharded(folder, variant, mesh)
            found |= {f"{text}/{variant}/{name}": x for name, x in arrays.items()}
        found |= {f"{text}/heads/{name}": x for name, x in with_new_head(folder, mesh).items()}
        if text == "tensor=2":
            found |= {f"{text}/rules/{name}": x for name, x in with_other_rules(folder, mesh).items()}
        refused[text] = refusals(folder, mesh)
    rank = dist.get_rank()
    np.savez(folder / f"{processes}.{rank}.npz", **found)
    (folder / f"{processes}.{rank}.json").write_text(json.dumps(refused))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
