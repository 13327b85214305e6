"""Which rules the options of a call stand for, in the order in which they are applied.

The order is that of `_get_logits_processor` in Hugging Face transformers 4.57.6: rules for any search, then those of
the caller, then the cuts of sampling, then renormalisation.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from opt_core import logits_cuts as cuts
from opt_core import logits_rules as rules
from opt_core.generation import GenerationPlan
from opt_core.generation_config import GenerationConfig
from opt_core.prefix import Prefix


def logits_rules(
    settings: GenerationConfig,
    plan: GenerationPlan,
    *,
    processors: Sequence[Callable] = (),
    allowed_tokens: Callable | None = None,
) -> tuple[rules.LogitsRule, ...]:
    """The rules of a call. `processors` and `allowed_tokens` are those of the caller."""
    chain = [*_biases_and_penalties(settings, plan)]
    if allowed_tokens is not None:
        chain.append(rules.AllowedTokens(allowed_tokens))
    chain += [*_forced_and_suppressed(settings, plan), *map(rules.UserProcessor, processors)]
    if settings.do_sample:
        chain += _cuts(settings, keep=len(plan.eos_token_ids) + 1 if settings.num_beams > 1 else 1)
    if settings.renormalize_logits:
        chain.append(rules.renormalize)
    return tuple(chain)


def apply_rules(chain: Sequence[rules.LogitsRule], prefix: Prefix, scores_RV: np.ndarray) -> np.ndarray:
    """The scores after all rules; `scores_RV` may be written into."""
    for rule in chain:
        scores_RV = rule(prefix, scores_RV)
    return scores_RV


def _biases_and_penalties(settings: GenerationConfig, plan: GenerationPlan) -> Iterator[rules.LogitsRule]:
    columns = plan.input_ids.shape[1]
    if settings.sequence_bias:
        yield rules.SequenceBias(list({tuple(ids): bias for ids, bias in settings.sequence_bias}.items()))
    if settings.repetition_penalty != 1:
        yield rules.RepetitionPenalty(settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        yield rules.NoRepeatNGram(settings.no_repeat_ngram_size)
    if settings.bad_words_ids:
        yield rules.bad_words(settings.bad_words_ids, plan.eos_token_ids)
    least = settings.min_length if settings.min_new_tokens is None else columns + settings.min_new_tokens
    if least and plan.eos_token_ids:
        yield rules.NoTokensUntil(plan.eos_token_ids, least)


def _forced_and_suppressed(settings: GenerationConfig, plan: GenerationPlan) -> Iterator[rules.LogitsRule]:
    columns = plan.input_ids.shape[1]
    begins_with_forced = columns == 1 and settings.forced_bos_token_id is not None
    if settings.forced_bos_token_id is not None:
        yield rules.OnlyTokensAt([settings.forced_bos_token_id], 1)
    if settings.forced_eos_token_id is not None:
        ends = np.atleast_1d(settings.forced_eos_token_id).tolist()
        yield rules.OnlyTokensAt(ends, columns + plan.max_new_tokens - 1)
    if settings.remove_invalid_values:
        yield rules.remove_invalid_values
    if settings.exponential_decay_length_penalty is not None and plan.eos_token_ids:
        start, factor = settings.exponential_decay_length_penalty
        yield rules.GrowingEndBias(plan.eos_token_ids, start + columns, factor)
    if settings.suppress_tokens:
        yield rules.NoTokensAt(settings.suppress_tokens)
    if settings.begin_suppress_tokens:
        yield rules.NoTokensAt(settings.begin_suppress_tokens, columns + begins_with_forced)


def _cuts(settings: GenerationConfig, keep: int) -> Iterator[rules.LogitsRule]:
    if settings.temperature != 1:
        yield cuts.Temperature(settings.temperature)
    if settings.top_k:
        yield cuts.TopK(settings.top_k, keep)
    if settings.top_p < 1:
        yield cuts.TopP(settings.top_p, keep)
    if settings.min_p is not None:
        yield cuts.MinP(settings.min_p, keep)
    if settings.typical_p < 1:
        yield cuts.Typical(settings.typical_p, keep)
    if settings.epsilon_cutoff:
        yield cuts.Epsilon(settings.epsilon_cutoff, keep)
    if settings.eta_cutoff:
        yield cuts.Eta(settings.eta_cutoff, keep)
