"""Low-rank adapters: which linear modules get one, their shapes and first values, and the published config of them.

    y = W x + b + (lora_alpha / r) B (A x)

A is (r, in), B is (out, r); B starts as zeros, so that a new adapter changes nothing. Files are `conversion.adapters`'
business, modules each backend's. Sources: Hu et al., arXiv:2106.09685; fields and defaults of `adapter_config.json` are
those of PEFT (0.21), but for the default of `lora_alpha`.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError, raise_if
from opt_core.schema import TASKS, weights
from opt_core.synthetic import generator_of

MODULES = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
Pair = dict[str, np.ndarray]  # "A": (r, in), "B": (out, r)

_TASK_TYPES = {
    "base": "FEATURE_EXTRACTION",
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}
_TASKS_WITH_A_HEAD = ("sequence-classification", "question-answering")
_OWN = frozenset({"peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules"})
# Fields that say nothing about what a trained adapter computes.
_INERT = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "megatron_core"}
    | {"qalora_group_size", "init_lora_weights", "eva_config"}
)
# First values that leave the base model as it is; the others subtract the adapter's from its weights, or quantise them.
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and place of an adapter.

    `target_modules` names linear modules of the layers, each in every layer. `lora_dropout` acts on the adapter's input
    in training. `task` is the class of the base model (None: not said), `base_model_name_or_path` where it came from.

    Raises:
        ConfigError: lists every field that is out of range.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "v_proj")
    task: str | None = None
    base_model_name_or_path: str | None = None

    def __post_init__(self):
        if isinstance(self.target_modules, (list, tuple, set, frozenset)):  # their order means nothing
            object.__setattr__(self, "target_modules", tuple(sorted(self.target_modules, key=str)))
        raise_if(ConfigError, "LoraConfig", self._problems())

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r

    def _problems(self) -> list[str]:
        problems = []
        if not isinstance(self.r, int) or isinstance(self.r, bool) or not 0 < self.r <= 1_000_000:
            problems.append(f"r: expected a positive integer, got {self.r!r}")
        for name, highest in (("lora_alpha", sys.float_info.max), ("lora_dropout", 1)):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < highest:
                problems.append(f"{name}: expected a number from 0 to below {highest}, got {value!r}")
        modules = self.target_modules
        if not isinstance(modules, tuple) or not modules or any(module not in MODULES for module in modules):
            problems.append(f"target_modules: expected some of {', '.join(MODULES)}, got {modules!r}")
        if self.task is not None and self.task not in TASKS:
            problems.append(f"task: expected one of {', '.join(TASKS)}, or None, got {self.task!r}")
        return problems

    # -- adapter_config.json ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields of PEFT's `adapter_config.json`; those left out have PEFT's defaults, all of them switched off.

        A task whose head is trained anew is not said: PEFT asks the files of those two types for that head, too.
        """
        task_type = None if self.task is None or self.task in _TASKS_WITH_A_HEAD else _TASK_TYPES[self.task]
        return {
            "peft_type": "LORA",
            "task_type": task_type,
            "base_model_name_or_path": self.base_model_name_or_path,
            "inference_mode": True,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "target_modules": list(self.target_modules),
            "bias": "none",
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, source: str = "LoraConfig") -> "LoraConfig":
        """What `to_dict` or any version of PEFT wrote.

        Raises:
            ConfigError: lists every wrong field, and every one that would change the arithmetic: all but those above
                must be switched off.
        """
        problems = [*_foreign_problems(fields)]
        own = {name: fields[name] for name in ("r", "lora_alpha", "lora_dropout", "target_modules") if name in fields}
        own.setdefault("lora_alpha", 8)  # PEFT's default, of a file that lacks it
        tasks = [task for task, published in _TASK_TYPES.items() if published == fields.get("task_type")]
        name = fields.get("base_model_name_or_path")
        try:
            lora = cls(
                **own,
                task=tasks[0] if tasks else None,
                base_model_name_or_path=name if isinstance(name, str) else None,
            )
        except ConfigError as error:
            raise ConfigError(source, [*problems, *error.problems]) from None
        raise_if(ConfigError, source, problems)
        return lora


def _foreign_problems(fields: Mapping[str, Any]):
    if fields.get("peft_type") != "LORA":
        yield f"peft_type: expected 'LORA', got {fields.get('peft_type')!r}"
    task_type = fields.get("task_type")
    if task_type is not None and task_type not in _TASK_TYPES.values():
        yield f"task_type: expected one of {', '.join(_TASK_TYPES.values())}, or null, got {task_type!r}"
    if "target_modules" not in fields:
        yield f"target_modules: missing, expected some of {', '.join(MODULES)}"
    if fields.get("init_lora_weights") not in _HARMLESS_STARTS:
        yield f"init_lora_weights: {fields['init_lora_weights']!r} changes the weights of the base model, not read"
    for name, value in fields.items():
        is_off = value is None or value is False or value in ("none", [], {})
        if name not in _OWN | _INERT and not is_off:
            yield f"{name}: expected it switched off, got {value!r}, which this code does not compute"


# -- shapes and values ------------------------------------------------------------------------------------------------


def adapter_shapes(config: OPTConfig, lora: LoraConfig) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Canonical module name (`decoder.layers.0.self_attn.q_proj`) to the shapes of A and B, in the schema's order."""
    shapes = {}
    for weight in weights(config, "base"):
        module, _, parameter = weight.name.rpartition(".")
        if parameter == "weight" and ".layers." in module and module.rpartition(".")[2] in lora.target_modules:
            out_features, in_features = weight.shape(config)
            shapes[module] = (lora.r, in_features), (out_features, lora.r)
    return shapes


def new_adapter(config: OPTConfig, lora: LoraConfig, seed: int = 0) -> dict[str, Pair]:
    """Canonical module name to float32 first values: A uniform within 1 / sqrt(in), as PEFT draws it; B zeros.

    A pair depends on the seed, the module's name and its shape alone, so every framework starts with the same.
    """
    return {
        module: {"A": _draw(f"{module}.lora_A.weight", shape_A, seed), "B": np.zeros(shape_B, np.float32)}
        for module, (shape_A, shape_B) in adapter_shapes(config, lora).items()
    }


def _draw(name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    bound = shape[1] ** -0.5
    return generator_of(name, seed).uniform(-bound, bound, shape).astype(np.float32)
