"""Which strategy the options of a call make, and every reason to refuse them.

The strategy follows `get_generation_mode` of Hugging Face transformers 4.57.6. Where that warns that options "may be
ignored", this refuses: an option given in a call either has an effect or is an error. Options that stand in a
`GenerationConfig` wait until a call makes the strategy that they are for. The length given in a call wins over any
length in the config (there `max_new_tokens` of the config would win over `max_length` of the call).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import ProblemsError
from opt_core.generation import GenerationPlan, id_problems
from opt_core.generation_config import GenerationConfig, plain
from opt_core.keywords import GENERATING, check_keywords

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


@dataclass(frozen=True)
class Call:
    """The arguments of a call that are not options of a `GenerationConfig`."""

    assistant_config: OPTConfig | None = None  # of the draft model
    logits_processor: Any = None  # a callable or several: (ids, scores) -> scores
    stopping_criteria: Any = None  # a callable or several: (ids, scores) -> bool or bools
    prefix_allowed_tokens_fn: Callable | None = None  # (prompt index, ids) -> allowed ids
    tokenizer: Any = None  # for stop strings
    streamer: Any = None  # has put(ids) and end()
    seed: Any = None  # an integer from 0 to 2^64 - 1, or one for each prompt
    generator: np.random.Generator | None = None

    @property
    def processors(self) -> tuple:
        return _as_tuple(self.logits_processor)

    @property
    def criteria(self) -> tuple:
        return _as_tuple(self.stopping_criteria)

    @property
    def seeds(self) -> tuple:
        return _as_tuple(plain(self.seed))


CALL_ARGUMENTS = tuple(f.name for f in dataclasses.fields(Call))
_OPTIONS = tuple(f.name for f in dataclasses.fields(GenerationConfig) if f.name != "extra")


def checked_settings(base: GenerationConfig, options: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """The options of a call on top of those of the config, and what is wrong with them.

    Raises:
        KeywordError: an option that does not exist.
    """
    others = {name: value for name, value in options.items() if name not in NOT_DONE}
    known = (*_OPTIONS, *CALL_ARGUMENTS, "input_ids", "attention_mask", "generation_config")
    check_keywords(others, known, GENERATING)
    settings, problems = _merged(base, {name: options[name] for name in options if name in _OPTIONS})
    asked = {**base.extra, **{name: options[name] for name in options if name in NOT_DONE}}
    return settings, problems + _not_done_problems(asked)


def strategy_of(settings: GenerationConfig, *, assisted: bool) -> str:
    if settings.num_beams > 1:
        return BEAM
    if (assisted or settings.prompt_lookup_num_tokens) and not (settings.penalty_alpha and not settings.do_sample):
        return ASSISTED
    if settings.do_sample:
        return SAMPLE
    return CONTRASTIVE if settings.penalty_alpha and settings.top_k > 1 else GREEDY


def call_problems(
    config: OPTConfig, settings: GenerationConfig, strategy: str, options: Mapping[str, Any], call: Call
) -> list[str]:
    """What is wrong with a call before its prompt is looked at."""
    return [
        *_conflicts(settings, strategy, call.assistant_config is not None),
        *_without_effect(options, settings, strategy, call),
        *_argument_problems(settings, strategy, call),
        *_token_problems(config, settings),
    ]


def planned_problems(config: OPTConfig, settings: GenerationConfig, plan: GenerationPlan, call: Call) -> list[str]:
    """What can be checked once prompt and lengths are known."""
    problems, (rows, columns), assistant = [], plan.input_ids.shape, call.assistant_config
    least = settings.min_length - columns if settings.min_new_tokens is None else settings.min_new_tokens
    if least > plan.max_new_tokens:
        name = "min_length" if settings.min_new_tokens is None else "min_new_tokens"
        problems.append(f"{name}: asks for {least} new tokens, where at most {plan.max_new_tokens} are made")
    if len(call.seeds) not in (0, 1, rows):
        problems.append(f"seed: expected one integer or one for each of the {rows} prompts, got {len(call.seeds)}")
    if assistant is not None and assistant.vocab_size != config.vocab_size:
        problems.append(f"assistant_model: expected a vocabulary of {config.vocab_size}, got {assistant.vocab_size}")
    longest = int(plan.real.sum(1).max()) + plan.max_new_tokens - 1
    if assistant is not None and assistant.max_position_embeddings < longest:
        got = assistant.max_position_embeddings
        problems.append(f"assistant_model: expected max_position_embeddings of at least {longest}, got {got}")
    return problems


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


def _without_effect(options: Mapping, settings: GenerationConfig, strategy: str, call: Call) -> list[str]:
    """Options of the call that the strategy does not look at."""
    needs: list[tuple[tuple[str, ...], str, bool]] = [
        (_OF_SAMPLING, "do_sample=True", settings.do_sample),
        (_OF_BEAMS, "num_beams above 1", strategy == BEAM),
        (_OF_DRAFT_MODELS, "an assistant_model", call.assistant_config is not None),
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


def _argument_problems(settings: GenerationConfig, strategy: str, call: Call) -> list[str]:
    problems = []
    for name, given in (("logits_processor", call.processors), ("stopping_criteria", call.criteria)):
        problems += [f"{name}: expected callables, got {x!r}" for x in given if not callable(x)]
    if settings.stop_texts and call.tokenizer is None:
        problems.append("stop_strings: expected a tokenizer beside them, got None")
    if call.streamer is not None and strategy == BEAM:
        problems.append("streamer: beam search does not know its text before the end")
    return problems + _seed_problems(settings, call)


def _seed_problems(settings: GenerationConfig, call: Call) -> list[str]:
    problems, generator = [], call.generator
    if call.seed is not None and generator is not None:
        problems.append("seed, generator: expected at most one of them, got both")
    if (call.seed is not None or generator is not None) and not settings.do_sample:
        problems.append("seed, generator: have no effect without do_sample=True")
    if generator is not None and not isinstance(generator, np.random.Generator):
        problems.append(f"generator: expected a numpy.random.Generator, got {type(generator).__name__}")
    wrong = [s for s in call.seeds if isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**64]
    if wrong or (call.seed is not None and not call.seeds):
        problems.append(f"seed: expected integers from 0 to 2^64 - 1, got {call.seed!r}")
    return problems


def _token_problems(config: OPTConfig, settings: GenerationConfig) -> list[str]:
    listed = {name: np.atleast_1d(getattr(settings, name) or []).tolist() for name in _WITH_TOKEN_IDS}
    listed["bad_words_ids"] = [i for word in settings.bad_words_ids or () for i in word]
    listed["sequence_bias"] = [i for ids, _ in settings.sequence_bias or () for i in ids]
    return id_problems(config, **listed)


def _not_done_problems(options: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: not supported, expected {NOT_DONE[name][0]!r}, got {value!r}"
        for name, value in options.items()
        if name in NOT_DONE and not any(value is inert or value == inert for inert in NOT_DONE[name])
    ]


def _as_tuple(given) -> tuple:
    """One or several, as several."""
    return () if given is None else tuple(given) if isinstance(given, (list, tuple)) else (given,)
