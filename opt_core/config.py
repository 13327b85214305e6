"""The configuration of an OPT model: published field names and defaults, presets by name, strict validation.

Field names, their order and their defaults are those of the published `OPTConfig`.
"""

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from opt_core.errors import ConfigError, raise_if
from opt_core.json_file import read_json_object
from opt_core.keywords import OnlyItsFields
from opt_core.presets import PRESETS
from opt_core.small_files import find_file, write_whole

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
POSITION_OFFSET = 2  # rows of the position table before that of position 0; row 1 was metaseq's padding row
LAYER_NORM_EPS = 1e-5
ACTIVATIONS = ("relu", "gelu", "gelu_new", "silu")  # gelu is the erf form, gelu_new the tanh form
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
DTYPES = ("float32", "float16", "bfloat16")

# Bounds far above any published size: a damaged config must not lead to a giant allocation.
_SIZE_BOUNDS = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "num_hidden_layers": 10_000,
    "ffn_dim": 10_000_000,
    "max_position_embeddings": 10_000_000,
    "word_embed_proj_dim": 1_000_000,
    "num_attention_heads": 100_000,
}

_MOST_EXTRA_BYTES = 1 << 20  # of unknown fields, which every copy of a config copies

# Published spelling -> field; the alias is read, the field is written.
ALIASES = {"bias": "enable_bias", "dtype": "torch_dtype"}

# Fields of foreign files that would change the arithmetic: only the value that OPT has is accepted.
_FIXED_BY_THE_ARCHITECTURE = {
    "scale_embeddings": False,
    "learned_embeddings": True,
    "alibi": False,
    "rotary": False,
    "use_stable_embedding": False,
    "activation_dropout": 0.0,
}

# Fields that every published config carries and that say nothing about the computation.
_KNOWN_AND_INERT = frozenset(
    {"prefix", "output_projection", "_name_or_path", "transformers_version", "return_dict"}
    | set(_FIXED_BY_THE_ARCHITECTURE)
)


@dataclass
class OPTConfig(OnlyItsFields):
    """Sizes and switches of one OPT model.

    `word_embed_proj_dim=None` means `hidden_size`. `activation_function` is one of `ACTIVATIONS` or a callable on
    the arrays of the framework in use. `torch_dtype` names the dtype of the stored weights ("float16" in the published
    files). `pruned_heads` names by layer the heads that are gone, numbered as before any was; `num_attention_heads` and
    `head_size` stay as they were. `extra` keeps the unknown fields of a file through a round trip; nothing reads them.

    Raises:
        ConfigError: lists every field that is out of range or inconsistent.
        TypeError: an unknown keyword.
        AttributeError: something is set that is no field; `extra` takes what is the user's own.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int = None  # type: ignore[assignment]  # hidden_size
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str | Callable = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    torch_dtype: str | None = None
    num_labels: int = None  # type: ignore[assignment]  # as many as id2label has, or 2
    id2label: dict[int, str] = None  # type: ignore[assignment]
    label2id: dict[str, int] = None  # type: ignore[assignment]
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    architectures: list[str] | None = None
    pruned_heads: dict[int, list[int]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    model_type: ClassVar[str] = "opt"

    def __post_init__(self):
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size
        if self.activation_function == "swish":
            self.activation_function = "silu"
        if self.torch_dtype is not None:
            self.torch_dtype = str(self.torch_dtype).rpartition(".")[2]  # "torch.float16" in old files
        self._complete_labels()
        self._sort_pruned_heads()
        self.check()

    def _complete_labels(self) -> None:
        if self.id2label is None:
            count = 2 if self.num_labels is None else self.num_labels
            if isinstance(count, int) and 0 < count <= 1_000_000:
                self.id2label = {i: f"LABEL_{i}" for i in range(count)}
        if isinstance(self.id2label, dict):
            self.id2label = {_int_if_digits(key): label for key, label in self.id2label.items()}
            if self.num_labels is None:
                self.num_labels = len(self.id2label)
            if self.label2id is None:
                self.label2id = {label: i for i, label in self.id2label.items() if _is_name(label)}

    def _sort_pruned_heads(self) -> None:
        """One spelling of each: numbers for layers, each head once and in order, no layer without a pruned head."""
        if isinstance(self.pruned_heads, dict) and all(map(_are_ints, self.pruned_heads.values())):
            pruned: dict[int, set[int]] = {}
            for layer, heads in self.pruned_heads.items():
                pruned.setdefault(_int_if_digits(layer), set()).update(heads)
            self.pruned_heads = {layer: sorted(heads) for layer, heads in pruned.items() if heads}

    # -- derived sizes ------------------------------------------------------------------------------------------------

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def remaining_heads(self, layer: int) -> list[int]:
        """The heads that a layer has, numbered as before any was pruned."""
        pruned = set(self.pruned_heads.get(layer, ()))
        return [head for head in range(self.num_attention_heads) if head not in pruned]

    def heads_of(self, layer: int) -> int:
        """How many heads a layer has."""
        return self.num_attention_heads - len(self.pruned_heads.get(layer, ()))

    @property
    def has_all_heads(self) -> bool:
        return not self.pruned_heads

    @property
    def has_projections(self) -> bool:
        """True where word embeddings are narrower than the model (350m): `project_in` and `project_out` exist."""
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        if self.eos_token_id is None:
            return ()
        return tuple(self.eos_token_id) if isinstance(self.eos_token_id, list) else (self.eos_token_id,)

    def problem_type_of(self, labels_dtype: str) -> str:
        """`problem_type`, or what the published classes infer from the number of labels and the dtype of `labels`."""
        if self.problem_type is not None:
            return self.problem_type
        if self.num_labels == 1:
            return "regression"
        is_integer = labels_dtype.startswith(("int", "uint"))
        return "single_label_classification" if is_integer else "multi_label_classification"

    # -- validation ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises one ConfigError that lists everything wrong with the fields."""
        raise_if(ConfigError, "OPTConfig", self._problems())

    def _problems(self) -> list[str]:
        return [
            *self._size_problems(),
            *self._switch_problems(),
            *self._token_problems(),
            *self._label_problems(),
            *self._pruning_problems(),
        ]

    def _size_problems(self) -> list[str]:
        problems = []
        for name, bound in _SIZE_BOUNDS.items():
            value, lowest = getattr(self, name), 0 if name == "num_hidden_layers" else 1
            if not _is_int(value) or not lowest <= value <= bound:
                problems.append(f"{name}: expected an integer from {lowest} to {bound}, got {value!r}")
        width, heads = self.hidden_size, self.num_attention_heads
        if _is_int(width) and _is_int(heads) and width > 0 and heads > 0 and width % heads:
            problems.append(f"hidden_size: expected a multiple of num_attention_heads ({heads}), got {width}")
        return problems

    def _switch_problems(self) -> list[str]:
        problems = []
        for f in dataclasses.fields(self):
            if f.type is bool and not isinstance(getattr(self, f.name), bool):
                problems.append(f"{f.name}: expected true or false, got {getattr(self, f.name)!r}")
        for name in ("dropout", "attention_dropout", "layerdrop"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value <= 1:
                problems.append(f"{name}: expected a probability from 0 to 1, got {value!r}")
        if not _is_number(self.init_std) or not 0 <= self.init_std < float("inf"):
            problems.append(f"init_std: expected a finite number of at least 0, got {self.init_std!r}")
        if not callable(self.activation_function) and self.activation_function not in ACTIVATIONS:
            problems.append(
                f"activation_function: expected one of {', '.join(ACTIVATIONS)} or a callable, "
                f"got {self.activation_function!r}"
            )
        if not (self.architectures is None or _are_texts(self.architectures)):
            problems.append(f"architectures: expected a list of names or null, got {self.architectures!r}")
        if self.torch_dtype is not None and self.torch_dtype not in DTYPES:
            problems.append(f"torch_dtype: expected one of {', '.join(DTYPES)}, got {self.torch_dtype!r}")
        return problems

    def _token_problems(self) -> list[str]:
        problems, pad, eos = [], self.pad_token_id, self.eos_token_id
        for name in ("pad_token_id", "bos_token_id"):
            if getattr(self, name) is not None and not _is_int(getattr(self, name)):
                problems.append(f"{name}: expected an integer or null, got {getattr(self, name)!r}")
        if eos is not None and not all(map(_is_int, eos if isinstance(eos, list) else [eos])):
            problems.append(f"eos_token_id: expected an integer, a list of integers or null, got {eos!r}")
        vocabulary_is_known = _is_int(self.vocab_size) and self.vocab_size > 0
        if _is_int(pad) and vocabulary_is_known and not 0 <= pad < self.vocab_size:
            problems.append(f"pad_token_id: expected an id from 0 to {self.vocab_size - 1}, got {pad}")
        return problems

    def _label_problems(self) -> list[str]:
        problems = []
        if not isinstance(self.id2label, dict) and self.id2label is not None:
            problems.append(f"id2label: expected an object of number to name, got {self.id2label!r}")
        elif not _is_int(self.num_labels) or not 0 < self.num_labels <= 1_000_000:
            problems.append(f"num_labels: expected a positive integer, got {self.num_labels!r}")
        elif len(self.id2label) != self.num_labels or set(self.id2label) != set(range(self.num_labels)):
            problems.append(f"id2label: expected names of the labels 0 to {self.num_labels - 1}, got {self.id2label!r}")
        elif not all(map(_is_name, self.id2label.values())):
            problems.append(f"id2label: expected texts or numbers for names, got {self.id2label!r}")
        if not isinstance(self.label2id, dict) and self.label2id is not None:
            problems.append(f"label2id: expected an object of name to number, got {self.label2id!r}")
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            problems.append(f"problem_type: expected one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}")
        return problems

    def _pruning_problems(self) -> list[str]:
        pruned, layers, heads = self.pruned_heads, self.num_hidden_layers, self.num_attention_heads
        if not isinstance(pruned, dict) or not all(map(_are_ints, pruned.values())):
            return [f"pruned_heads: expected an object of layer to a list of heads, got {pruned!r}"]
        if not _is_int(layers) or not _is_int(heads):
            return []
        problems = []
        for layer, gone in pruned.items():
            if not _is_int(layer) or not 0 <= layer < layers:
                problems.append(f"pruned_heads: expected layers from 0 to {layers - 1}, got {layer!r}")
            elif gone[0] < 0 or gone[-1] >= heads:
                problems.append(f"pruned_heads: expected heads from 0 to {heads - 1} in layer {layer}, got {gone}")
            elif len(gone) == heads:
                problems.append(f"pruned_heads: expected at least one head to remain in layer {layer}, got {gone}")
        return problems

    # -- presets and JSON ---------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str, **overrides) -> "OPTConfig":
        """The configuration of a published size: "opt-125m", "facebook/opt-350m", "galactica-6.7b", or just "125m"."""
        key = name.rpartition("/")[2].lower()
        key = key if key in PRESETS else f"opt-{key}"
        if key not in PRESETS:
            raise ConfigError("OPTConfig.preset", [f"name: expected one of {', '.join(PRESETS)}, got {name!r}"])
        return cls(**{**copy.deepcopy(PRESETS[key]), **overrides})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, source: str = CONFIG_NAME) -> "OPTConfig":
        """Builds a config from published fields; unknown ones are kept in `extra` and reported, never obeyed.

        Raises:
            ConfigError: lists every wrong field, naming `source`.
        """
        fields, problems = dict(fields), []
        if fields.get("model_type", cls.model_type) != cls.model_type:
            problems.append(f"model_type: expected {cls.model_type!r}, got {fields['model_type']!r}")
        fields.pop("model_type", None)
        for alias in ("bias", "dtype"):
            if alias in fields:
                value = fields.pop(alias)
                if fields.setdefault(ALIASES[alias], value) != value:
                    problems.append(f"{alias}: {value!r} contradicts {ALIASES[alias]}: {fields[ALIASES[alias]]!r}")
        for name, only in _FIXED_BY_THE_ARCHITECTURE.items():
            if name in fields and fields[name] != only:
                problems.append(f"{name}: OPT has {only!r}, got {fields[name]!r}, which this code does not compute")
        known = {f.name for f in dataclasses.fields(cls)} - {"extra"}
        extra = {name: fields.pop(name) for name in list(fields) if name not in known}
        unknown = sorted(extra.keys() - _KNOWN_AND_INERT)
        if len(json.dumps(extra, default=str)) > _MOST_EXTRA_BYTES:
            raise ConfigError(source, [f"expected at most {_MOST_EXTRA_BYTES} bytes of fields that OPT does not have"])
        if unknown:
            logger.warning("%s: fields that OPT does not have are kept and not obeyed: %s", source, ", ".join(unknown))
        try:
            config = cls(**fields, extra=extra)
        except ConfigError as error:
            raise ConfigError(source, [*problems, *error.problems]) from None
        raise_if(ConfigError, source, problems)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The published fields and the kept unknown ones, ready for JSON.

        Raises:
            ConfigError: the activation is a callable, which JSON cannot hold.
        """
        if not isinstance(self.activation_function, str):
            raise ConfigError("OPTConfig.to_dict", ["activation_function: a callable cannot be written as JSON"])
        fields = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "extra"}
        optional = ("torch_dtype", "problem_type", "architectures")
        fields = {name: value for name, value in fields.items() if value is not None or name not in optional}
        default = {0: "LABEL_0", 1: "LABEL_1"}  # of the published config, which leaves it out
        if self.id2label == default and self.label2id == {label: i for i, label in default.items()}:
            del fields["id2label"], fields["label2id"]
        if self.has_all_heads:
            del fields["pruned_heads"]
        del fields["num_labels"]  # follows from id2label, as in the published files
        return {**self.extra, **fields, "model_type": self.model_type}

    @classmethod
    def from_json(cls, path: str | Path) -> "OPTConfig":
        """Reads `config.json`, or the folder that holds it."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        return cls.from_dict(read_json_object(path), source=str(path))

    def to_json(self, path: str | Path) -> None:
        """Writes `config.json` with sorted keys, to `path` itself or into the folder `path`."""
        path = Path(path)
        path = path / CONFIG_NAME if path.is_dir() else path
        write_whole(path, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
        **changes,
    ) -> "OPTConfig":
        """The config of a folder, a `config.json` or a hub id; `changes` are fields that win over its own.

        Checkpoints that keep their config elsewhere are opened by `conversion.open_checkpoint`; the sizes as published
        need no file: `OPTConfig.preset`.

        Raises:
            ConfigError: lists every wrong field, or says where no config was found.
            TypeError: an unknown keyword.
        """
        hub_options = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        path = find_file(
            source, CONFIG_NAME, subfolder=subfolder, error=ConfigError, force_download=force_download, **hub_options
        )
        return cls.from_json(path).replace(**changes)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` into a folder, which is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.check()
        self.to_json(folder)

    def replace(self, **changes) -> "OPTConfig":
        """A copy with `changes`; a new number of labels renames the labels, a new width keeps no old projection."""
        fields = {f.name: copy.deepcopy(getattr(self, f.name)) for f in dataclasses.fields(self)}
        for alias in ("bias", "dtype"):
            if alias in changes:
                changes[ALIASES[alias]] = changes.pop(alias)
        if changes.keys() & {"num_labels", "id2label"}:
            fields.update(num_labels=None, id2label=None, label2id=None)
        if "hidden_size" in changes and not self.has_projections:
            fields["word_embed_proj_dim"] = None
        return OPTConfig(**{**fields, **changes})

    def without_heads(self, heads: Mapping[int, Iterable[int]]) -> "OPTConfig":
        """A copy without these heads of these layers either, numbered as before any was pruned.

        Raises:
            ConfigError: lists every layer or head that there is not, and every layer that would have no head left.
        """
        pruned = {layer: [*gone, *self.pruned_heads.get(layer, ())] for layer, gone in heads.items()}
        return self.replace(pruned_heads={**self.pruned_heads, **pruned})


def _is_int(value) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_name(label) -> bool:
    return isinstance(label, (str, int, float))


def _are_texts(values) -> bool:
    return isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values)


def _are_ints(values) -> bool:
    return isinstance(values, (list, tuple, set)) and all(map(_is_int, values))


def _int_if_digits(key):
    return int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
