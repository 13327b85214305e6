"""Searches against `generate` of the published PyTorch class, float64, on the same weights: tokens and scores.

The models have many ids that end texts, so that beams end at all lengths.
"""

from functools import lru_cache

import numpy as np
import pytest
from harness import config_of, token_ids
from published_models import published_model, torch
from reference_stepper import ReferenceStepper, request_of

from opt_core.searching import search

MASK = np.array([[int(c) for c in row] for row in ("1111111", "0001111", "0000001", "0111111")])
ENDS = {"one": [70], "several": [70, 36, 53, 9], "many": list(range(31, 97, 3))}


def many_ends(which: str, seed: int = 0):
    """A config and left-padded prompts."""
    config = config_of(eos_token_id=ENDS[which])
    return config, np.where(MASK, token_ids(config, *MASK.shape, seed=seed), config.pad_token_id)


@lru_cache
def published(which: str):
    return published_model(many_ends(which)[0])


def both(which: str, ids, mask, **options):
    """Our output and the published one, for the same call."""
    options = dict(return_dict_in_generate=True, output_scores=True, output_logits=True) | options
    config = many_ends(which)[0]
    ours = search(request_of(config, ids, mask, **options), ReferenceStepper(config))
    model = published(which)
    theirs = model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **{"do_sample": False, **options})
    return ours, theirs


def check_same(ours, theirs):
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert len(ours.scores) == len(theirs.scores)
    if ours.sequences_scores is not None:
        np.testing.assert_allclose(ours.sequences_scores, theirs.sequences_scores, rtol=1e-5)
        assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()


def check_beams(which: str, seed: int = 0, **options):
    _, ids = many_ends(which, seed)
    ours, theirs = both(which, ids, MASK, **options)
    check_same(ours, theirs)
    return ours


BEAMS, PENALTIES, STOPPING = (2, 3, 5), (-1.0, 0.0, 0.6, 1.0, 2.0), (False, True, "never")


@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("early_stopping", STOPPING)
@pytest.mark.parametrize(("num_beams", "length_penalty", "returned"), [(2, 1.0, 2), (3, 2.0, 1), (4, -1.0, 3)])
def test_beam_search_finds_the_published_texts(which, num_beams, length_penalty, early_stopping, returned):
    ours = check_beams(
        which, num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping,
        num_return_sequences=returned, max_new_tokens=9,
    )  # fmt: skip
    if which == "many" and length_penalty <= 1:  # some ended early, and which of them counts was decided
        assert (ours.beam_indices == -1).any() or ours.beam_indices.shape[1] < 9


@pytest.mark.slow
@pytest.mark.parametrize("which", ENDS)
@pytest.mark.parametrize("num_beams", BEAMS)
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("early_stopping", STOPPING)
@pytest.mark.parametrize("seed", range(4))
def test_beam_search_finds_the_published_texts_everywhere(which, num_beams, length_penalty, early_stopping, seed):
    check_beams(
        which, seed, num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping,
        num_return_sequences=num_beams, max_new_tokens=13,
    )  # fmt: skip


# -- other searches, and the options together -------------------------------------------------------------------------

OPTIONS = {
    "nothing": {},
    "penalties": dict(repetition_penalty=1.6, no_repeat_ngram_size=2),
    "bans": dict(bad_words_ids=[[53], [70, 94]], suppress_tokens=[13, 48], begin_suppress_tokens=[92]),
    "lengths": dict(min_new_tokens=3, forced_eos_token_id=70),
    "biases": dict(sequence_bias=[[[53], -2.0], [[70, 70], 3.0]], exponential_decay_length_penalty=(2, 1.3)),
    "all": dict(
        repetition_penalty=0.8, no_repeat_ngram_size=3, bad_words_ids=[[94]], min_new_tokens=2, suppress_tokens=[13],
        sequence_bias=[[[53], -1.0]], renormalize_logits=True, exponential_decay_length_penalty=(3, 1.1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("beams", [1, 3])
def test_options_change_texts_and_scores_as_published(options, beams):
    """Prompts of one length: the published rules count padding, ours do not."""
    config, _ = many_ends("several")
    ids, mask = token_ids(config, 3, 5), np.ones((3, 5), int)
    options = dict(options) | (dict(num_beams=beams) if beams > 1 else {})
    ours, theirs = both("several", ids, mask, max_new_tokens=9, **options)
    check_same(ours, theirs)
    for step, (our_RV, their_RV) in enumerate(zip(ours.scores, theirs.scores, strict=True)):
        live = np.ones(len(our_RV), bool)
        if beams == 1:  # an ended row has no scores to speak of
            live = ~np.isin(ours.sequences[:, 5 : 5 + step], ENDS["several"]).any(1)
        same = np.isclose(our_RV, their_RV, rtol=1e-4, atol=1e-5) | (our_RV < -1e8)  # dead beams: any order
        assert same[live].all(), step
    for our_RV, their_RV in zip(ours.logits, theirs.logits, strict=True):
        assert our_RV.shape == tuple(their_RV.shape)


def test_greedy_texts_of_a_ragged_batch_are_the_published_ones():
    _, ids = many_ends("several")
    ours, theirs = both("several", ids, MASK, max_new_tokens=15)
    check_same(ours, theirs)
    np.testing.assert_allclose(ours.logits[0], theirs.logits[0], rtol=1e-5, atol=1e-6)


def test_drafts_of_a_published_assistant_and_ours_lead_to_the_same_text():
    """Greedy: an assistant changes nothing, neither there nor here. The published class takes one prompt at a time."""
    config, _ = many_ends("one")
    ids = token_ids(config, 1, 9)
    ids[0, 5:] = ids[0, :4]
    options = dict(max_new_tokens=12, prompt_lookup_num_tokens=3)
    theirs = published("one").generate(torch.tensor(ids), do_sample=False, **options)
    ours = search(request_of(config, ids, **options), ReferenceStepper(config))
    assert ours.sequences.tolist() == theirs.tolist()
