"""What a model computes, on one device or on a mesh: the test asks for the first, this script does the second.

python shard_model.py FOLDER FILE "fsdp=2,tensor=2|350m style|generations" ...    # with checkpoints in FOLDER/models

On 8 devices of one process, or on one device of each of several.
"""

import functools
import json
import os
import re
import sys
from pathlib import Path

if __name__ == "__main__" and int(os.environ.get("WORLD_SIZE", 1)) == 1:
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import SIZES, VARIANTS, mask_named, token_ids

from opt_core import OPTConfig
from opt_core.errors import ProblemsError
from opt_core.lora import LoraConfig
from opt_core.reference import IGNORED_LABEL
from opt_core.schema import published_name, shapes
from opt_core.sharding import RULES, Rules
from opt_flax import FlaxOPTForCausalLM, FlaxOPTForSequenceClassification, generation
from opt_flax.attention import eager_attention
from opt_flax.lora import add_lora, merge_lora
from opt_flax.pallas_attention import pallas_attention
from opt_flax.sharding import by_heads, init_mesh, on_host, placement_on, shard_model

# Every length that is cut divides by 4, and no two are the same.
CUT = SIZES | dict(vocab_size=4 * 23, hidden_size=4 * 14, num_hidden_layers=2, ffn_dim=4 * 17, num_attention_heads=4)
CONFIGS = {
    "pre-norm": OPTConfig(**CUT),
    "350m style": OPTConfig(**CUT | VARIANTS["350m style"] | dict(word_embed_proj_dim=4 * 11, num_hidden_layers=1)),
    "untied, without biases": OPTConfig(**CUT, enable_bias=False, tie_word_embeddings=False),
    "norms without weights, pruned": OPTConfig(**CUT, layer_norm_elementwise_affine=False, pruned_heads={1: [0, 2]}),
}
IDS = token_ids(CONFIGS["pre-norm"])
SEGMENTS = np.array([[0] * 4 + [1] * 7 + [0] * 2, [3] * 13, [0] * 6 + [1] * 7, [0, 1] + [2] * 11])
LABELS = np.where(np.random.default_rng(1).random(IDS.shape) < 0.3, IGNORED_LABEL, IDS)
HEAD_MASK = np.random.default_rng(2).random(4).astype(np.float32)
GENERATIONS = {
    "greedy": {},
    "sampled": dict(do_sample=True, seed=3, top_k=7),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "contrastive": dict(penalty_alpha=0.6, top_k=3),
}


def outputs(model) -> dict[str, np.ndarray]:
    """Logits and what else a call returns, also of rows that no mesh divides, and behind a cache."""
    whole = model(IDS, output_attentions=True, output_hidden_states=True, head_mask=HEAD_MASK)
    found = {"head mask": whole.logits, "last hidden": whole.hidden_states[-1]}
    found |= {f"attentions {i}": x for i, x in enumerate(whole.attentions)}
    found |= {f"hidden {i}": x for i, x in enumerate(whole.hidden_states)}
    found["padded documents"] = model(IDS, attention_mask=mask_named("holes"), segment_ids=SEGMENTS).logits
    found["three rows"] = model(IDS[:3]).logits
    first = model(IDS[:, :9], past_key_values=model.init_cache(len(IDS), 16))
    found["cached"] = model(IDS[:, 9:], past_key_values=first.past_key_values).logits
    return {name: on_host(x) for name, x in found.items()}


def generated(model, *names: str) -> dict[str, np.ndarray]:
    given = dict(attention_mask=mask_named("left"), max_new_tokens=6)
    found = {name: np.asarray(model.generate(IDS, **given, **GENERATIONS[name])) for name in names or GENERATIONS}
    if names:
        return found
    found["streamed"] = np.stack(list(model.stream(IDS, **given)), axis=1)
    assistant = FlaxOPTForCausalLM(CONFIGS["350m style"])
    found["assisted"] = np.asarray(model.generate(IDS[:1], max_new_tokens=6, assistant_model=assistant))
    return found


def differentiated(model, keep: int = 1) -> dict[str, np.ndarray]:
    """The loss, and the gradient of every weight; with 0, of a loss whose logits are kept."""
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights):
        inputs = dict(attention_mask=mask_named("holes"), labels=LABELS, logits_to_keep=keep)
        return nnx.merge(graphdef, weights, rest)(IDS, **inputs).loss

    value, gradients = jax.jit(jax.value_and_grad(loss))(weights)
    flat = {".".join(map(str, path)): x.get_value() for path, x in nnx.to_flat_state(gradients)}
    found = {f"gradient {keep}/{name}": on_host(flat[published_name(name)]) for name in shapes(model.config)}
    return found | {f"loss {keep}": on_host(value)}


def with_new_head(folder: Path, mesh=None) -> np.ndarray:
    """Logits of a head that the checkpoint lacks."""
    model = FlaxOPTForSequenceClassification.from_pretrained(folder / "models" / "pre-norm", device_mesh=mesh)
    return on_host(model(IDS).logits)


def dropped(model) -> dict[str, np.ndarray]:
    """A loss with dropout of all kinds."""
    config = model.config.replace(dropout=0.3, attention_dropout=0.2, layerdrop=0.1)
    fresh = FlaxOPTForCausalLM(config, rngs=nnx.Rngs(5))
    if model.placement is not None:
        fresh = shard_model(fresh, model.device_mesh)
    graphdef, state = nnx.split(fresh)
    return {"dropped": on_host(jax.jit(lambda state: nnx.merge(graphdef, state)(IDS, labels=LABELS).loss)(state))}


def adapted(model) -> dict[str, np.ndarray]:
    """Gradients of adapters, and logits when they are merged; the model is then another."""
    add_lora(model, LoraConfig(r=2, lora_alpha=8, target_modules=("q_proj", "out_proj", "fc1")), seed=3)
    gradients = nnx.grad(lambda m: m(IDS, labels=LABELS).loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    found = {".".join(map(str, path)): on_host(x.get_value()) for path, x in nnx.to_flat_state(gradients)}
    for path, node in nnx.iter_graph(model):
        if path and path[-1] == "lora_B":
            node.set_value(node.get_value() + 0.1)
    merge_lora(model)
    return {f"adapters/{name}": x for name, x in found.items()} | {"merged": on_host(model(IDS).logits)}


def edited(model) -> dict[str, np.ndarray]:
    """Logits of a model that has become another, whose weights lie as they should."""
    model.prune_heads({0: [0, 3]})
    model.resize_token_embeddings(4 * 24, rngs=nnx.Rngs(1))
    model.resize_position_embeddings(47, rngs=nnx.Rngs(2))
    if model.placement is not None:
        for name, sharding in model.placement.weights(model.config, model.task).items():
            assert model.weight(name).sharding == sharding, name
    return {"edited": on_host(model(IDS).logits)}


def parts(model) -> dict[str, np.ndarray]:
    """What devices of this process hold, by their number in the mesh."""
    number = {device: i for i, device in enumerate(model.device_mesh.devices.flat)}
    found = {name: model.weight(name).addressable_shards for name in shapes(model.config)}
    return {f"part {number[x.device]}/{name}": np.asarray(x.data) for name, shards in found.items() for x in shards}


# -- programs ---------------------------------------------------------------------------------------------------------

COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


def collectives(compiled) -> list[tuple[str, list[int], bool]]:
    """Of each array that devices tell each other: how, its shape, and whether in a loop."""
    found, in_loop = [], False
    for line in compiled.as_text().splitlines():
        if line.endswith("{"):
            in_loop = not line.startswith("ENTRY")
        if match := re.search(rf" = (.*?) ({COLLECTIVES})(?:-start)?\(", line):
            for shape in re.findall(r"\w+\[([\d,]*)\]", match[1]):
                found.append((match[2], [int(n) for n in shape.split(",") if n], in_loop))
    return found


def programs(model) -> dict[str, list]:
    """What devices tell each other in the forward pass, for gradients, in a prefill and in a loop of steps."""
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights):
        return nnx.merge(graphdef, weights, rest)(IDS, labels=LABELS, logits_to_keep=1, use_cache=False).loss

    state, ids = nnx.state(model), IDS.astype(np.int32)
    whole = nnx.graphdef(model)
    logits, eos, cache = (
        jnp.zeros((len(IDS), model.config.vocab_size)),
        np.array([2], np.int32),
        model.init_cache(4, 16),
    )
    compiled = {
        "forward": jax.jit(lambda state: nnx.merge(whole, state)(IDS, use_cache=False).logits).lower(state),
        "gradients": jax.jit(jax.grad(loss)).lower(weights),
        "prefill": generation._prefill.lower(whole, state, ids, np.ones_like(ids, bool), 16),
        "steps": generation._decode.lower(whole, state, logits, cache, eos, 1, 5),
    }
    compiled = {name: lowered.compile() for name, lowered in compiled.items()}
    shardings = jax.tree.leaves(compiled["gradients"].output_shardings)
    uncut = [
        jax.tree_util.keystr(path)
        for (path, x), sharding in zip(jax.tree.leaves_with_path(weights), shardings, strict=True)
        if not sharding.is_equivalent_to(x.sharding, x.ndim)
    ]
    return {name: collectives(program) for name, program in compiled.items()} | {"uncut gradients": uncut}


def kernels(mesh) -> dict[str, np.ndarray]:
    """Output and gradients of a fused kernel, interpreted, on each device and on one."""
    placement = placement_on(mesh, CONFIGS["pre-norm"], "base")
    first = jnp.asarray(np.repeat([[0, 5, 20]], [5, 15, 17], axis=1).repeat(4, axis=0))
    q, k, v, d_out = (jax.random.normal(jax.random.key(i), (4, 4, 37, 64)) for i in range(4))

    def local(q, k, v):
        return by_heads(placement, functools.partial(pallas_attention, interpret=True), q, k, v, None, first)

    def whole(q, k, v):
        return eager_attention(q, k, v, None, None, first)[0]

    found = {}
    for name, attend in (("local", local), ("whole", whole)):
        out, vjp = jax.vjp(jax.jit(attend), q * 64**-0.5, k, v)
        found |= {
            f"{name}/{part}": on_host(x) for part, x in zip(("out", "q", "k", "v"), (out, *vjp(d_out)), strict=True)
        }
    return found


def lowered_for_cuda(mesh) -> list[str]:
    """The calls of fused kernels in the gradient of a sharded model, as a host with an H100 would lower it."""
    import jax._src.cudnn.fused_attention_stablehlo as cudnn_in_jax

    from opt_flax import attention

    attention.compute_capability = lambda: (9, 0)
    attention.compile_problems = lambda: ()
    cudnn_in_jax.check_cudnn_version = lambda: 91500
    cudnn_in_jax.check_compute_capability = lambda capability: True
    cudnn_in_jax.is_cuda_compute_capability_equal = lambda capability: False
    config = OPTConfig(**CUT | dict(hidden_size=4 * 64, num_hidden_layers=1))
    model = shard_model(FlaxOPTForCausalLM(config, dtype=jnp.bfloat16), mesh)
    model.eval()
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights):
        return nnx.merge(graphdef, weights, rest)(IDS, labels=LABELS).loss

    text = jax.jit(jax.grad(loss)).trace(weights).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"@(__cudnn\$\w+)\(.*tensor<(\d+x\d+x\d+x\d+)xbf16>", text)


# -- what is refused --------------------------------------------------------------------------------------------------


def refusals(folder: Path, mesh) -> dict[str, str]:
    """The messages of errors; with several processes, every one must raise."""
    load, rank = FlaxOPTForCausalLM.from_pretrained, jax.process_index()
    model = load(folder / "models" / "pre-norm", device_mesh=mesh)
    odd = FlaxOPTForCausalLM(OPTConfig(**CUT | dict(vocab_size=97, num_attention_heads=7, ffn_dim=13)))
    strange = jax.sharding.Mesh(mesh.devices, [f"{name}s" for name in mesh.axis_names])
    (folder / "a file").touch()
    calls = {
        "sizes": lambda: shard_model(odd, mesh),
        "twice": lambda: shard_model(model, mesh),
        "rules": lambda: shard_model(odd, mesh, Rules((("Z", "tensor"),), RULES.batch)),
        "axes": lambda: load(folder / "models" / "pre-norm", device_mesh=strange),
        "no mesh": lambda: shard_model(odd, "fsdp=2"),
        "device": lambda: load(folder / "models" / "pre-norm", device_mesh=mesh, device="cpu"),
        "devices": lambda: init_mesh("fsdp=3,tensor=5"),
        "save": lambda: model.save_pretrained(folder / "a file"),
    }
    if "tensor" in mesh.axis_names:
        calls["prune"] = lambda: model.prune_heads({0: [1]})
        calls["resize"] = lambda: model.resize_token_embeddings(93)
    if jax.process_count() > 1:
        calls |= {
            "inputs": lambda: model.generate(IDS + (rank == 1), max_new_tokens=3),
            "options": lambda: model.generate(IDS, max_new_tokens=3, do_sample=True, temperature=1.5 + rank),
            "seeds": lambda: model.generate(IDS, max_new_tokens=3, do_sample=True, seed=rank),
            "one process": lambda: model.generate(IDS * (1 - 2 * (rank == 1)), max_new_tokens=3),
            "time": lambda: model.generate(IDS, max_new_tokens=3, max_time=1.0),
            "push": lambda: model.push_to_hub("a/b"),
        }
    found = {name: _message(call) for name, call in calls.items()}
    assert odd.placement is None  # refused before anything was changed
    assert (model.config.vocab_size, model.config.heads_of(0)) == (CUT["vocab_size"], 4)
    return found


def _message(call) -> str:
    try:
        call()
    except (ProblemsError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


# -- the cases --------------------------------------------------------------------------------------------------------


def computed(folder: Path, variant: str, what: str, mesh=None) -> dict[str, np.ndarray]:
    """A part of what is compared with a single device, which is that without a mesh."""
    model = FlaxOPTForCausalLM.from_pretrained(folder / "models" / variant, device_mesh=mesh)
    if what == "outputs":
        return outputs(model)
    if what == "generations":
        return generated(model)
    if what == "tokens":
        return generated(model, "greedy", "sampled")
    if what == "gradients":
        return differentiated(model)
    if what == "gradients with logits":
        return differentiated(model, keep=0)
    if what == "recomputed":
        model.gradient_checkpointing_enable()
        model.train()
        return {f"recomputed {name}": x for name, x in differentiated(model).items()}
    if what == "head":
        return {"head": with_new_head(folder, mesh)}
    return {"dropout": dropped, "adapters": adapted, "edited": edited}[what](model)


def held(folder: Path, variant: str, text: str, mesh) -> dict[str, np.ndarray]:
    """What devices have been given, what was read for it, and, in a folder, what is saved of it."""
    path, saved = folder / "models" / variant, folder / "saved" / text / variant
    model, info = FlaxOPTForCausalLM.from_pretrained(path, device_mesh=mesh, output_loading_info=True)
    of_memory = shard_model(FlaxOPTForCausalLM.from_pretrained(path), mesh)
    model.save_pretrained(saved)
    unseeded = np.asarray(model.generate(IDS, max_new_tokens=2, do_sample=True))
    found = parts(model) | {f"of memory, {name}": x for name, x in parts(of_memory).items()}
    return found | {"bytes read": np.array(info["bytes_read"]), "unseeded": unseeded}


def main(folder: Path, file: str, *cases: str) -> None:
    found, said = {}, {}
    for case in cases:
        text, variant, *rest = case.split("|")
        mesh = init_mesh(text)
        for what in rest:
            if what == "refusals":
                said[f"{text}|refusals"] = refusals(folder, mesh)
            elif what == "programs":
                model = FlaxOPTForCausalLM.from_pretrained(folder / "models" / variant, device_mesh=mesh)
                said[f"{text}|{variant}|programs"] = programs(model)
            elif what == "CUDA":
                said[f"{text}|CUDA"] = lowered_for_cuda(mesh)
            else:
                if what == "parts":
                    arrays = held(folder, variant, text, mesh)
                else:
                    arrays = kernels(mesh) if what == "kernels" else computed(folder, variant, what, mesh)
                found |= {f"{text}|{variant}|{name}": x for name, x in arrays.items()}
    rank = jax.process_index()
    np.savez(folder / f"{file}.{rank}.npz", **found)
    (folder / f"{file}.{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
