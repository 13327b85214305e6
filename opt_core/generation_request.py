"""A checked call of `generate`: all that a search needs to know besides the model."""

import hashlib
import secrets
from typing import Any, NamedTuple

import numpy as np

from opt_core.checks import Known
from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if
from opt_core.generation import GenerationPlan, plan_prompt
from opt_core.generation_config import GenerationConfig
from opt_core.generation_options import (
    BEAM,
    CALL_ARGUMENTS,
    CONTRASTIVE,
    GREEDY,
    Call,
    call_problems,
    checked_settings,
    planned_problems,
    strategy_of,
)
from opt_core.logits_pipeline import logits_rules
from opt_core.logits_rules import LogitsRule
from opt_core.stopping import Stopping


class GenerationRequest(NamedTuple):
    """All that a search needs to know besides the model."""

    plan: GenerationPlan
    settings: GenerationConfig  # of the config, overridden by the call
    strategy: str
    rules: tuple[LogitsRule, ...]
    stopping: Stopping
    seeds: tuple[int, ...]  # one, or one for each prompt
    streamer: Any  # has put(ids) and end(), or None
    is_plain: bool  # nothing but greedy search to a length or an id: what a backend has compiled

    @property
    def rows_per_prompt(self) -> int:
        return self.settings.num_beams if self.strategy == BEAM else self.settings.num_return_sequences

    @property
    def max_positions(self) -> int:
        """Tokens that the longest row of this request can have in the cache."""
        return int(self.plan.real.sum(1).max()) + self.plan.max_new_tokens - 1

    def digest(self, *, is_seeded: bool) -> bytes:
        """32 bytes that are the same where two processes ask for the same: of the prompt and the options that have
        values, with the seeds if the caller gave them. Functions among the options are the caller's business."""
        arrays = [np.ascontiguousarray(x) for x in (self.plan.input_ids, self.plan.real)]
        options = (self.settings.to_dict(), self.strategy, self.plan.max_new_tokens, is_seeded and self.seeds)
        content = b"".join(repr((x.shape, x.dtype)).encode() + x.tobytes() for x in arrays)
        return hashlib.sha256(content + repr(options).encode()).digest()


def call_options(
    options: dict[str, Any], max_new_tokens: int | None, assistant_model: Any, generating: type[Any]
) -> dict[str, Any]:
    """The options of `plan_request`, of a call that may name a draft model; `generating` is what that must be.

    Raises:
        InputError: it is something else.
    """
    if assistant_model is not None:
        if not isinstance(assistant_model, generating):
            text = f"expected a model of this package that generates, got {type(assistant_model).__name__}"
            raise InputError("generate", [f"assistant_model: {text}"])
        options = {**options, "assistant_config": assistant_model.config}
    return options if max_new_tokens is None else {**options, "max_new_tokens": max_new_tokens}


def plan_request(
    config: OPTConfig,
    input_ids: Known | None,
    attention_mask: Known | None,
    generation_config: GenerationConfig | None = None,
    **options,
) -> GenerationRequest:
    """Checks a call of `generate` and fills in what it left out.

    `options` are fields of `GenerationConfig`, which override those of `generation_config`, and of
    `generation_options.Call`. Without `seed` and `generator`, sampling has a fresh seed.

    Raises:
        KeywordError: an option that does not exist.
        InputError: everything else, all at once (lengths once the prompt is right), before anything is computed.
    """
    call = Call(**{name: options.pop(name) for name in CALL_ARGUMENTS if name in options})
    settings, problems = checked_settings(_checked(generation_config), options)
    strategy = strategy_of(settings, assisted=call.assistant_config is not None)
    problems += call_problems(config, settings, strategy, options, call)
    plan = _plan(config, input_ids, attention_mask, settings, strategy, options, problems)
    raise_if(InputError, "generate", planned_problems(config, settings, plan, call))
    rules = logits_rules(settings, plan, processors=call.processors, allowed_tokens=call.prefix_allowed_tokens_fn)
    stopping = Stopping(
        plan.eos_token_ids, plan.max_new_tokens, max_time=settings.max_time, stop_texts=settings.stop_texts,
        tokenizer=call.tokenizer, criteria=call.criteria,
    )  # fmt: skip
    is_plain = strategy == GREEDY and not (rules or call.streamer or call.criteria or settings.stop_texts)
    is_plain = is_plain and settings.max_time is None and not settings.return_dict_in_generate
    return GenerationRequest(plan, settings, strategy, rules, stopping, _seeds(call), call.streamer, is_plain)


def _checked(generation_config: GenerationConfig | None) -> GenerationConfig:
    if not isinstance(generation_config, GenerationConfig | None):
        got = f"{type(generation_config).__module__}.{type(generation_config).__name__}".removeprefix("builtins.")
        problem = f"expected an opt_core.GenerationConfig, got {got}; options may be given to the call, too"
        raise InputError("generate", [f"generation_config: {problem}"])
    return generation_config or GenerationConfig()


def _plan(
    config: OPTConfig, input_ids: Known | None, attention_mask: Known | None, settings: GenerationConfig,
    strategy: str, options: dict[str, Any], problems: list[str],
) -> GenerationPlan:  # fmt: skip
    """The plan of the prompt. The default of `max_length`, unless a call gives it, is the default length."""
    is_default = options.get("max_length") is None and settings.max_length == GenerationConfig.max_length
    max_length = None if is_default else settings.max_length
    begin = config.bos_token_id if settings.bos_token_id is None else settings.bos_token_id
    if input_ids is None and begin is not None:
        input_ids = Known((1, 1), "int64", np.array([[begin]]))
    plan = plan_prompt(
        config, input_ids, attention_mask, max_new_tokens=settings.max_new_tokens, max_length=max_length,
        eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id, problems=problems,
    )  # fmt: skip
    if strategy != CONTRASTIVE:
        return plan
    return _leaving_a_position(plan, config, is_default=not (settings.max_new_tokens or max_length))


def _leaving_a_position(plan: GenerationPlan, config: OPTConfig, *, is_default: bool) -> GenerationPlan:
    """Contrastive search feeds a token before it chooses it, so its last token needs a position, too."""
    room = config.max_position_embeddings - int(plan.real.sum(1).max())
    if plan.max_new_tokens <= room:
        return plan
    if is_default and room > 0:
        return plan._replace(max_new_tokens=room)
    asked = f"the prompt leaves room for {room} new tokens in contrastive search, got {plan.max_new_tokens}"
    raise InputError("generate", [f"max_new_tokens: {asked}"])


def _seeds(call: Call) -> tuple[int, ...]:
    if call.generator is not None:
        return (int(call.generator.integers(2**63)),)
    return call.seeds or (secrets.randbits(63),)
