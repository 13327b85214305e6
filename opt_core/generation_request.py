"""A checked call of `generate`: which strategy its options make, and every reason to refuse it, before it starts.

The strategy follows `get_generation_mode` of Hugging Face transformers 4.57.6. Where that warns that options "may be
ignored", this refuses: an option given in a call either has an effect or is an error. Options that stand in a
`GenerationConfig` wait until a call makes the strategy that they are for. The length given in a call wins over any
length in the config (there `max_new_tokens` of the config would win over `max_length` of the call).
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_core.checks import Known, arguments_of, check_keywords
from opt_core.config import OPTConfig
from opt_core.errors import InputError, ProblemsError, raise_if
from opt_core.generation import GenerationPlan, bucketed, id_problems, plan_prompt
from opt_core.generation_config import GenerationConfig, plain
from opt_core.logits_pipeline import logits_rules
from opt_core.logits_rules import LogitsRule
from opt_core.stopping import Stopping

GREEDY, SAMPLE, BEAM, CONTRASTIVE, ASSISTED = "greedy", "sample", "beam", "contrastive", "assisted"

# Published options that are not done here, each with the values that ask for nothing. Any other value is refused.
NOT_DONE: dict[str, tuple] = {
    "cache_implementation": (None,),
    "cache_config": (None,),
    "return_legacy_cache": (None, False),
    "prefill_chunk_size": (None,),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "token_healing": (False, None),
    "output_attentions": (False, None),
    "output_hidden_states": (False, None),
    "encoder_repetition_penalty": (1.0, None),
    "encoder_no_repeat_ngram_size": (0, None),
    "assistant_early_exit": (None,),
    "assistant_lookbehind": (10, None),
    "target_lookbehind": (10, None),
    "compile_config": (None,),
    "disable_compile": (False, None),
    "low_memory": (None, False),
    "dola_layers": (None,),
    "diversity_penalty": (0.0, None),
    "num_beam_groups": (1, None),
    "constraints": (None,),
    "force_words_ids": (None,),
}
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty")
_OF_DRAFT_MODELS = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
_OF_OUTPUTS = ("output_scores", "output_logits")
_WITH_TOKEN_IDS = ("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")


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
    def capacity(self) -> int:
        """Cache slots a row, in whole buckets; drafts need some beyond the text."""
        drafts = 0
        if self.strategy == ASSISTED:
            drafts = self.settings.prompt_lookup_num_tokens or self.settings.num_assistant_tokens
        return bucketed(self.plan.input_ids.shape[1] + self.plan.max_new_tokens + drafts)

    @property
    def rows_per_prompt(self) -> int:
        return self.settings.num_beams if self.strategy == BEAM else self.settings.num_return_sequences

    @property
    def max_positions(self) -> int:
        """Tokens that the longest row of this request can have in the cache."""
        return int(self.plan.real.sum(1).max()) + self.plan.max_new_tokens - 1


def plan_request(
    config: OPTConfig,
    input_ids: Known | None,
    attention_mask: Known | None,
    generation_config: GenerationConfig | None = None,
    *,
    assistant_config: OPTConfig | None = None,
    logits_processor: Sequence[Callable] | None = None,
    stopping_criteria: Sequence[Callable] | None = None,
    prefix_allowed_tokens_fn: Callable | None = None,
    tokenizer=None,
    streamer=None,
    seed: int | Sequence[int] | None = None,
    generator: np.random.Generator | None = None,
    **options,
) -> GenerationRequest:
    """Checks a call of `generate` and fills in what it left out.

    `options` are fields of `GenerationConfig`; `assistant_config` is the config of the draft model. `seed`: one integer
    or one for each prompt (`opt_core.sampling` says what they decide); without it and `generator`, a fresh one.

    Raises:
        KeywordError: an option that does not exist.
        InputError: everything else, all at once (lengths once the prompt is right), before anything is computed.
    """
    fields = [f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra"]
    unknown = [name for name in options if name not in fields and name not in NOT_DONE]
    check_keywords(unknown, (*fields, *arguments_of(plan_request)))
    base = generation_config or GenerationConfig()
    settings, problems = _merged(base, {n: v for n, v in options.items() if n in fields})
    problems += _not_done_problems({**base.extra, **{n: v for n, v in options.items() if n in NOT_DONE}})
    strategy = _strategy(settings, assisted=assistant_config is not None)
    problems += _conflicts(settings, strategy, assistant_config is not None)
    problems += _without_effect(options, settings, strategy, assistant_config is not None)
    problems += _call_problems(settings, strategy, tokenizer, streamer, seed, generator)
    problems += _token_problems(config, settings)
    max_length = settings.max_length if options.get("max_length") or settings.max_length != 20 else None
    begin = config.bos_token_id if settings.bos_token_id is None else settings.bos_token_id
    if input_ids is None and begin is not None:
        input_ids = Known((1, 1), "int64", np.array([[begin]]))
    plan = plan_prompt(
        config, input_ids, attention_mask, max_new_tokens=settings.max_new_tokens, max_length=max_length,
        eos_token_id=settings.eos_token_id, pad_token_id=settings.pad_token_id, problems=problems,
    )  # fmt: skip
    if strategy == CONTRASTIVE:
        plan = _leaving_a_position(plan, config, is_default=not (settings.max_new_tokens or max_length))
    raise_if(InputError, "generate", _planned_problems(plan, settings, config, assistant_config, seed))
    rules = logits_rules(settings, plan, processors=logits_processor or (), allowed_tokens=prefix_allowed_tokens_fn)
    stopping = Stopping(
        plan.eos_token_ids, plan.max_new_tokens, max_time=settings.max_time, stop_texts=settings.stop_texts,
        tokenizer=tokenizer, criteria=stopping_criteria or (),
    )  # fmt: skip
    is_plain = strategy == GREEDY and not (rules or streamer or stopping_criteria or settings.stop_texts)
    is_plain = is_plain and settings.max_time is None and not settings.return_dict_in_generate
    return GenerationRequest(plan, settings, strategy, rules, stopping, _seeds(seed, generator), streamer, is_plain)


def _merged(base: GenerationConfig, given: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """The options of a call on top of those of the config, and what is wrong with them."""
    for longer, shorter in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if given.get(shorter) is not None and given.get(longer) is None:
            base = dataclasses.replace(base)
            setattr(base, longer, None)
    try:
        return base.replace(**given), []
    except ProblemsError as error:
        wrong = {problem.partition(":")[0] for problem in error.problems}
        return base.replace(**{n: v for n, v in given.items() if n not in wrong}), list(error.problems)


def _strategy(settings: GenerationConfig, *, assisted: bool) -> str:
    if settings.num_beams > 1:
        return BEAM
    if (assisted or settings.prompt_lookup_num_tokens) and not (settings.penalty_alpha and not settings.do_sample):
        return ASSISTED
    if settings.do_sample:
        return SAMPLE
    return CONTRASTIVE if settings.penalty_alpha and settings.top_k > 1 else GREEDY


def _conflicts(settings: GenerationConfig, strategy: str, assisted: bool) -> list[str]:
    problems = []
    returned, beams = settings.num_return_sequences, settings.num_beams
    if strategy == BEAM and returned > beams:
        problems.append(f"num_return_sequences: expected at most num_beams = {beams}, got {returned}")
    if strategy != BEAM and not settings.do_sample and returned > 1:
        problems.append(f"num_return_sequences: without do_sample or beams there is one text a prompt, got {returned}")
    drafts = "assistant_model" if assisted else "prompt_lookup_num_tokens"
    if (assisted or settings.prompt_lookup_num_tokens) and strategy != ASSISTED:
        problems.append(f"{drafts}: only greedy search and sampling can be assisted, not {strategy} search")
    if assisted and settings.prompt_lookup_num_tokens:
        problems.append("prompt_lookup_num_tokens: expected either this or an assistant_model, got both")
    if not settings.use_cache:
        problems.append("use_cache: expected True, got False")
    return problems


def _without_effect(options: Mapping, settings: GenerationConfig, strategy: str, assisted: bool) -> list[str]:
    """Options of the call that the strategy does not look at."""
    needs = [
        (_OF_SAMPLING, "do_sample=True", settings.do_sample),
        (_OF_BEAMS, "num_beams above 1", strategy == BEAM),
        (_OF_DRAFT_MODELS, "an assistant_model", assisted),
        (("max_matching_ngram_size",), "prompt_lookup_num_tokens", settings.prompt_lookup_num_tokens is not None),
        (_OF_OUTPUTS, "return_dict_in_generate=True", settings.return_dict_in_generate),
        (("penalty_alpha",), "top_k above 1, and with do_sample or beams", strategy == CONTRASTIVE),
    ]
    defaults = GenerationConfig()
    return [
        f"{name}: has no effect without {need}, got {options[name]!r}"
        for names, need, is_met in needs
        for name in names
        if not is_met and not (name == "top_k" and settings.penalty_alpha) and options.get(name)
        and getattr(settings, name) != getattr(defaults, name)
    ]  # fmt: skip


def _call_problems(settings: GenerationConfig, strategy: str, tokenizer, streamer, seed, generator) -> list[str]:
    problems = []
    if settings.stop_texts and tokenizer is None:
        problems.append("stop_strings: expected a tokenizer beside them, got None")
    if streamer is not None and strategy == BEAM:
        problems.append("streamer: beam search does not know its text before the end")
    if seed is not None and generator is not None:
        problems.append("seed, generator: expected at most one of them, got both")
    if (seed is not None or generator is not None) and not settings.do_sample:
        problems.append("seed, generator: have no effect without do_sample=True")
    if generator is not None and not isinstance(generator, np.random.Generator):
        problems.append(f"generator: expected a numpy.random.Generator, got {type(generator).__name__}")
    wrong = [s for s in _as_seeds(seed) if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**64]
    if wrong or (seed is not None and not _as_seeds(seed)):
        problems.append(f"seed: expected integers from 0 to 2^64 - 1, got {seed!r}")
    return problems


def _token_problems(config: OPTConfig, settings: GenerationConfig) -> list[str]:
    listed = {name: np.atleast_1d(getattr(settings, name) or []).tolist() for name in _WITH_TOKEN_IDS}
    listed["bad_words_ids"] = [i for word in settings.bad_words_ids or () for i in word]
    listed["sequence_bias"] = [i for ids, _ in settings.sequence_bias or () for i in ids]
    return id_problems(config, **listed)


def _leaving_a_position(plan: GenerationPlan, config: OPTConfig, *, is_default: bool) -> GenerationPlan:
    """Contrastive search feeds a token before it chooses it, so its last token needs a position, too."""
    room = config.max_position_embeddings - int(plan.real.sum(1).max())
    if plan.max_new_tokens <= room:
        return plan
    if is_default and room > 0:
        return plan._replace(max_new_tokens=room)
    asked = f"the prompt leaves room for {room} new tokens in contrastive search, got {plan.max_new_tokens}"
    raise InputError("generate", [f"max_new_tokens: {asked}"])


def _planned_problems(
    plan: GenerationPlan, settings: GenerationConfig, config: OPTConfig, assistant: OPTConfig | None, seed
) -> list[str]:
    """What can be checked once prompt and lengths are known."""
    problems, (rows, columns) = [], plan.input_ids.shape
    least = settings.min_length - columns if settings.min_new_tokens is None else settings.min_new_tokens
    if least > plan.max_new_tokens:
        name = "min_length" if settings.min_new_tokens is None else "min_new_tokens"
        problems.append(f"{name}: asks for {least} new tokens, where at most {plan.max_new_tokens} are made")
    if len(_as_seeds(seed)) not in (0, 1, rows):
        problems.append(f"seed: expected one integer or one for each of the {rows} prompts, got {len(seed)}")
    if assistant is not None and assistant.vocab_size != config.vocab_size:
        problems.append(f"assistant_model: expected a vocabulary of {config.vocab_size}, got {assistant.vocab_size}")
    longest = int(plan.real.sum(1).max()) + plan.max_new_tokens - 1
    if assistant is not None and assistant.max_position_embeddings < longest:
        got = assistant.max_position_embeddings
        problems.append(f"assistant_model: expected max_position_embeddings of at least {longest}, got {got}")
    return problems


def _not_done_problems(options: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: not supported, expected {NOT_DONE[name][0]!r}, got {value!r}"
        for name, value in options.items()
        if name in NOT_DONE and not any(value is inert or value == inert for inert in NOT_DONE[name])
    ]


def _as_seeds(seed) -> tuple:
    seeds = plain(seed)
    return () if seeds is None else tuple(seeds) if isinstance(seeds, list) else (seeds,)


def _seeds(seed, generator: np.random.Generator | None) -> tuple[int, ...]:
    if generator is not None:
        return (int(generator.integers(2**63)),)
    return _as_seeds(seed) or (secrets.randbits(63),)
