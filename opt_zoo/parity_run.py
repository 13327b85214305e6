"""Runs the parity measurement: every backend, dtype, attention implementation and padding case against float64.

Both sides have the same weights: the checkpoint's, rounded to the dtype. TF32 is switched off in all frameworks, since
it is not float32. XLA's flags are left as they are, because parity is to hold for what users run, and because an
unknown flag ends the process; what `XLA_FLAGS` holds is in the report.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

from conversion.pretrained import open_pretrained
from opt_core.checks import ATTENTION_IMPLEMENTATIONS
from opt_core.config import DTYPES, OPTConfig
from opt_core.reference import Reference
from opt_core.schema import shapes
from opt_zoo.backends import Backend, LoadedModel
from opt_zoo.comparison import BOUNDS, Comparison, Truth, compare, compare_with_eager
from opt_zoo.greedy import Agreement, GreedyText, compare_texts, judge_text
from opt_zoo.parity_cases import PADDINGS, TOKENS, Case, make_case, make_prompts, token_rows

NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
NEW_TOKENS = 40


@dataclass(frozen=True)
class ParityPlan:
    """What to measure."""

    source: str
    backends: Sequence[Backend]
    dtypes: Sequence[str] = DTYPES
    attentions: Sequence[str] = ATTENTION_IMPLEMENTATIONS
    paddings: Sequence[str] = PADDINGS
    tokens: int = TOKENS  # of the longest row
    new_tokens: int = NEW_TOKENS  # of the greedy texts; 0: none

    @property
    def steps(self) -> int:
        """Calls of `on_step` in a run."""
        models = len(self.dtypes) * len(self.backends) * len(self.attentions)
        return models * (len(self.paddings) + bool(self.new_tokens))


@dataclass
class ParityResult:
    """What was measured."""

    config: OPTConfig
    tokens_from: str  # "text" or "random ids"
    forward: list[Comparison] = field(default_factory=list)
    greedy: list[GreedyText] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(cell.passed for cell in self.forward) and all(text.passed for text in self.greedy)


def run_parity(plan: ParityPlan, on_step: Callable[[str], None] = lambda _: None) -> ParityResult:
    """Measures everything in `plan`; calls `on_step` with a description before each cell.

    Raises:
        ProblemsError: a source that is no causal language model, or one that a backend refuses.
    """
    for backend in plan.backends:
        backend.use_full_float32()
    opened = open_pretrained(plan.source, "causal-lm", overrides={})
    config = opened.config
    rows_BT, tokens_from = token_rows(plan.source, config, plan.tokens)
    cases = [make_case(padding, rows_BT, config.pad_token_id) for padding in plan.paddings]
    prompts = make_prompts(rows_BT, config.pad_token_id, config.max_position_embeddings)
    result = ParityResult(config, tokens_from)
    for dtype in plan.dtypes:
        reference = rounded_reference(opened.checkpoint.read, config, dtype)
        truths = [Truth.of(reference, case) for case in cases]
        for backend, attention, model in _models(plan, dtype):
            names = dict(backend=backend.name, dtype=dtype, attn_implementation=attention)
            result.forward += _forward_cells(model, cases, truths, names, on_step)
            if plan.new_tokens:
                on_step(_step_name(names, "greedy text"))
                result.greedy.append(_greedy_text(model, prompts, plan.new_tokens, reference, names))
    compare_with_eager(result.forward)
    result.agreements = compare_texts(result.greedy)
    return result


def rounded_reference(read: Callable[[str], np.ndarray], config: OPTConfig, dtype: str) -> Reference:
    """The float64 model on the weights that a backend has after loading them in `dtype`."""
    weights = {}
    for name in shapes(config, "causal-lm"):
        weights[name] = read(name).astype(NUMPY_DTYPES[dtype])
    return Reference(config, weights)


def _models(plan: ParityPlan, dtype: str) -> Iterator[tuple[Backend, str, LoadedModel]]:
    for backend in plan.backends:
        for attention in plan.attentions:
            yield backend, attention, backend.load(plan.source, dtype=dtype, attn_implementation=attention)


def _forward_cells(
    model: LoadedModel, cases: list[Case], truths: list[Truth], names: dict[str, str], on_step
) -> Iterator[Comparison]:
    for case, truth in zip(cases, truths, strict=True):
        on_step(_step_name(names, f"padding {case.padding}"))
        yield compare(model(case.input_ids, case.attention_mask, case.labels_BT), truth, case, **names)


def _greedy_text(
    model: LoadedModel, prompts: Case, new_tokens: int, reference: Reference, names: dict[str, str]
) -> GreedyText:
    room = reference.config.max_position_embeddings + 1 - int(prompts.real_BT.sum(1).max())
    tokens_BS = model.generate(prompts.input_ids, prompts.attention_mask, min(new_tokens, room))
    return judge_text(tokens_BS, prompts, reference, BOUNDS[names["dtype"]], **names)


def _step_name(names: dict[str, str], what: str) -> str:
    return " ".join((*names.values(), what))
