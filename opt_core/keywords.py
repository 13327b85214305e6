"""The keywords of a call: which there are, what a misspelt one may have meant, what becomes of the published ones.

Arguments of the published classes (Hugging Face transformers 4.57.6, the three frameworks) that have no place here are
taken where their value asks for what happens anyway. Any other value is refused, with what to write instead.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from opt_core.errors import InputError, KeywordError, raise_if


class Published(NamedTuple):
    """An argument that is not one here: what to write instead, and the values for which that is nothing."""

    instead: str
    taken: tuple[bool | None, ...] = (None,)


_NAME_THE_FILE = "the format is found by content: leave it out, or give the file itself for the folder"
_NOT_QUANTIZED = "weights are float32, float16 or bfloat16 (dtype=)"

LOADING = {
    "low_cpu_mem_usage": Published("weights are mapped from the file in any case", (None, True, False)),
    "use_safetensors": Published(f"{_NAME_THE_FILE}; no format executes anything", (None, True)),
    "weights_only": Published("nothing is unpickled in any case", (None, True)),
    "trust_remote_code": Published("no code is ever fetched", (None, True, False)),
    "from_pt": Published(_NAME_THE_FILE, (None, True, False)),  # preferred in any case
    "from_tf": Published(_NAME_THE_FILE, (None, False)),
    "from_flax": Published(_NAME_THE_FILE, (None, False)),
    "variant": Published("give the file itself for the folder"),
    "ignore_mismatched_sizes": Published("shapes must fit; a head that the file lacks starts anew", (None, False)),
    "state_dict": Published("make the model from a config, then load_state_dict"),
    "load_in_8bit": Published(_NOT_QUANTIZED, (None, False)),
    "load_in_4bit": Published(_NOT_QUANTIZED, (None, False)),
    "quantization_config": Published(_NOT_QUANTIZED),
    "use_auth_token": Published("it is called token"),
    "use_flash_attention_2": Published('write attn_implementation="flash_attention_2"', (None, False)),
    "generation_config": Published("set model.generation_config afterwards"),
    "proxies": Published("set HTTPS_PROXY in the environment"),
    "resume_download": Published("downloads are resumed in any case", (None, True)),
    "tp_plan": Published("device_mesh= cuts a model over devices"),
    "device_map": Published("device= is where weights go, device_mesh= cuts a model over devices"),
    "_do_init": Published("weights are always in the model", (None, True)),
}
SAVING = {
    "safe_serialization": Published("opt-zoo convert writes other formats than safetensors", (None, True)),
    "is_main_process": Published("call it on the main process alone", (True,)),
    "save_function": Published("files are written by the model itself"),
    "state_dict": Published("load_state_dict puts it into the model"),
    "params": Published("nnx.update puts them into the model"),
    "saved_model": Published("export(folder) writes a SavedModel", (None, False)),
    "variant": Published("rename the file"),
    "push_to_hub": Published("push_to_hub(repo_id) is a method of its own", (None, False)),
}
CALLING = {
    "return_dict": Published("outputs are named tuples, with fields by name", (None, True)),
    "cache_position": Published("it follows from the cache"),
    "token_type_ids": Published("OPT has none"),
    "num_items_in_batch": Published("divide the loss of a step yourself, or use the Trainer with accumulate"),
    "params": Published("the module holds its parameters; nnx.merge puts others in"),
    "dropout_rng": Published("dropout draws from the rngs= that the model was made with"),
    "train": Published("model.train() and model.eval(), or training= in TensorFlow"),
    "deterministic": Published("model.train() and model.eval()"),
}
GENERATING = {
    "inputs": Published("it is called input_ids"),
    "inputs_embeds": Published("generate continues input_ids"),
    "params": CALLING["params"],
    "prng_key": Published("seed= makes sampling repeatable"),
    "trace": Published("steps are compiled in any case", (None, True)),
    "synced_gpus": Published("processes stop together in any case", (None, False)),
}


def arguments_of(function: Callable) -> tuple[str, ...]:
    """The names of the arguments of `function` that a caller may give by keyword."""
    parameters = inspect.signature(function).parameters.values()
    named = (p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    return tuple(p.name for p in named if p.name != "self")


def check_keywords(given: Mapping[str, Any], known: Iterable[str], published: Mapping[str, Published]) -> None:
    """Raises a KeywordError that lists the keywords `given` which are not `known`, each with what may be meant."""
    if given:
        known = tuple(known)
        unknown = (unknown_keyword(name, known) for name in given if name not in known and name not in published)
        raise_if(KeywordError, "invalid arguments", [*published_problems(given, published), *unknown])


def published_problems(given: Mapping[str, Any], published: Mapping[str, Published]) -> list[str]:
    """A line for each published argument whose value would not be honoured."""
    return [
        f"{name}: expected {' or '.join(map(repr, row.taken))}, got {_short(given[name])}; {row.instead}"
        for name, row in published.items()
        if name in given and not any(given[name] is value for value in row.taken)
    ]


def unknown_keyword(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, tuple(known), n=1)
    return f"{name}: unknown keyword" + (f"; did you mean {close[0]}?" if close else "")


def only_one(title: str, **given) -> Any:
    """The one argument that was given, of several that exclude each other; None where none was.

    Raises:
        InputError: several were given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise InputError(title, [f"{', '.join(given)}: expected one of them, got {len(given)}"])
    return next(iter(given.values()), None)


def _short(value) -> str:
    return repr(value) if isinstance(value, bool | int | str) and len(str(value)) < 60 else type(value).__name__


@dataclasses.dataclass
class OnlyItsFields:
    """A dataclass that takes no other attribute than its fields: nobody would obey a misspelt one."""

    def __setattr__(self, name: str, value) -> None:
        if name not in (fields := [field.name for field in dataclasses.fields(self)]):
            problem = unknown_keyword(name, fields).replace("keyword", "field")
            raise AttributeError(f"{type(self).__name__}.{problem}")
        super().__setattr__(name, value)
