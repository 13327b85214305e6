"""Names of weights as met in published torch files, to the schema's names.

Wrappers (`module.` of DataParallel, `_orig_mod.` of torch.compile, ...), the leading `model.`, a missing `decoder.` and
the final norm's older name are undone here. What is none of OPT's weights is refused with a guess at what the file is.
"""

import re
from collections.abc import Iterable

from opt_core.schema import SCHEMA

_SCHEMA_NAMES = frozenset(row.name for row in SCHEMA)
_DECODER_CHILDREN = frozenset(name.split(".")[1] for name in _SCHEMA_NAMES if name.startswith("decoder."))
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_ALIASES = {"decoder.layer_norm.": "decoder.final_layer_norm."}  # metaseq and the first Galactica files
_LAYER = re.compile(r"(?<=\blayers\.)(0|[1-9][0-9]{0,5})(?=\.)")

# Part of a foreign name -> what the file is.
_FOREIGN = {
    r"qweight|qzeros|scales$|g_idx|SCB$|absmax|quant_(map|state)|weight_format": "a quantised file, which is not read",
    r"lora_|base_model\.|\.base_layer\.|modules_to_save": "a LoRA adapter: merge it, or use load_adapter",
    r"flat_param|qkv_proj|version$|output_projection|_(in|out)_dim": "metaseq's layout, whose files end in .pt",
    r"/|:0$": "a TensorFlow layout, in a file that does not say so",
    r"\.kernel$|\.embedding$|\.scale$": "a Flax layout, in a file that does not say so",
    r"^language_model\.": "a model that contains OPT: extract its language model first",
}


def canonical_name(stored: str) -> str:
    """The schema's name of a stored one, or what is left after unwrapping when the schema has no such weight."""
    parts = [part for part in stored.split(".") if part not in _WRAPPERS]
    if parts[:1] == ["model"]:
        parts = parts[1:]
    if parts and (parts[0] in _DECODER_CHILDREN or parts[0] == "layer_norm"):
        parts = ["decoder", *parts]
    name = ".".join(parts)
    for old, new in _ALIASES.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def is_weight_name(name: str) -> bool:
    """True for a name of the schema, whatever the layer."""
    return _LAYER.sub("{layer}", name, count=1) in _SCHEMA_NAMES


def canonical_names(stored: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Canonical name to stored name, and the problems: unknown names, and two stored tensors for one weight."""
    found: dict[str, str] = {}
    problems = []
    for name in stored:
        canonical = canonical_name(name)
        if not is_weight_name(canonical):
            problems.append(f"{name[:200]}: not a weight of OPT{_guess(name)}")
        elif canonical in found:
            problems.append(f"{canonical}: stored twice, as {found[canonical]} and as {name}")
        else:
            found[canonical] = name
    return found, problems


def task_of(stored: Iterable[str]) -> str:
    """The class that saved these names; a tied head must be left out of them, since any class may have stored it."""
    stored = set(stored)
    heads = {canonical_name(name) for name in stored}
    if "score.weight" in heads:
        return "sequence-classification"
    if "qa_outputs.weight" in heads:
        return "question-answering"
    return "causal-lm" if "lm_head.weight" in heads or any(map(_is_below_model, stored)) else "base"


def _is_below_model(stored: str) -> bool:
    return next((part for part in stored.split(".") if part not in _WRAPPERS), "") == "model"


def _guess(name: str) -> str:
    return next((f"; this looks like {what}" for pattern, what in _FOREIGN.items() if re.search(pattern, name)), "")
