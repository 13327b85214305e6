"""Laws of the searches, on the float64 reference behind the protocol of a stepper.

Tokens and scores against transformers are compared in tests/oracle.
"""

from functools import lru_cache

import numpy as np
import pytest
from harness import config_of, token_ids
from reference_stepper import ReferenceStepper, request_of
from test_sampling import chi_square

from opt_core.drafts import PromptLookup
from opt_core.errors import InputError
from opt_core.prefix import prefix_of
from opt_core.reference import Reference
from opt_core.sampling import softmax
from opt_core.searching import search, stream
from opt_core.synthetic import random_tensors

ENDS = [70, 94, 53]
CONFIG = config_of(eos_token_id=ENDS)
LEFT = np.array([[int(c) for c in row] for row in ("000111", "111111", "000001")])
IDS = np.where(LEFT, token_ids(CONFIG, *LEFT.shape), 1)
TINY = config_of(hidden_size=6, num_attention_heads=2, num_hidden_layers=1, ffn_dim=7, vocab_size=5, eos_token_id=None)
SPREAD = 5.0  # of the tiny model's logits: its texts are not all alike, nor are two such models


@lru_cache
def tiny_reference(seed: int) -> Reference:
    return Reference(TINY, dict(random_tensors(TINY, seed=seed)))


def run(ids=IDS, mask=LEFT, config=CONFIG, draft=None, stepper=None, **options):
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, **options}
    assistant = {} if draft is None else dict(assistant_config=draft.config)
    request = request_of(config, ids, mask, **assistant, **options)
    return search(request, stepper or ReferenceStepper(config), draft)


def texts(output, columns: int) -> list[list[int]]:
    """The new tokens of each row as far as its end."""
    rows = []
    for row in np.asarray(output.sequences)[:, columns:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ENDS), len(row))
        assert set(row[end:]) <= {1}
        rows.append(row[:end])
    return rows


def exact_draft(config=CONFIG) -> ReferenceStepper:
    return ReferenceStepper(config)


def poor_draft(config=CONFIG) -> ReferenceStepper:
    """Another model: right now and then."""
    return ReferenceStepper(config, scale=0.3)


def foreign_draft(config=CONFIG) -> ReferenceStepper:
    """A model that has nothing to do with it."""
    other = config_of(num_hidden_layers=1, hidden_size=10, num_attention_heads=2, eos_token_id=ENDS)
    return ReferenceStepper(other, reference=Reference(other, dict(random_tensors(other, seed=5))))


STRATEGIES = {
    "greedy": {},
    "greedy with options": dict(repetition_penalty=1.4, no_repeat_ngram_size=2, min_new_tokens=3),
    "sampling": dict(do_sample=True, seed=[3, 4, 5]),
    "sampling, several": dict(do_sample=True, seed=[3, 4, 5], num_return_sequences=2, temperature=1.3, top_p=0.9),
    "beams": dict(num_beams=3),
    "beams, several": dict(num_beams=4, num_return_sequences=3, length_penalty=-0.5, early_stopping=True),
    "beam sampling": dict(num_beams=3, do_sample=True, seed=[3, 4, 5], top_k=20),
    "contrastive": dict(penalty_alpha=0.6, top_k=5),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "prompt lookup, sampling": dict(prompt_lookup_num_tokens=3, do_sample=True, seed=[3, 4, 5]),
    "assisted": dict(draft=poor_draft, assistant_confidence_threshold=0.0, num_assistant_tokens=3),
    "assisted sampling": dict(
        draft=poor_draft, assistant_confidence_threshold=0.0, num_assistant_tokens=3, do_sample=True, seed=[3, 4, 5],
        num_return_sequences=2,
    ),
}  # fmt: skip


def run_strategy(name: str, ids=IDS, mask=LEFT, **changes):
    options = {**STRATEGIES[name], **changes}
    if "draft" in options:
        options["draft"] = options["draft"]()
    return run(ids, mask, **options)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_left_padded_batch_continues_as_each_prompt_alone(name):
    returned = STRATEGIES[name].get("num_return_sequences", 1)
    together = texts(run_strategy(name), 6)
    assert len({tuple(text) for text in together}) > 1
    for row, mask in enumerate(LEFT == 1):
        seed = {"seed": STRATEGIES[name]["seed"][row]} if "seed" in STRATEGIES[name] else {}
        alone = run_strategy(name, IDS[row][mask][None], None, **seed)
        assert texts(alone, int(mask.sum())) == together[row * returned : (row + 1) * returned]


@pytest.mark.parametrize("name", STRATEGIES)
def test_padding_may_stand_anywhere(name):
    holes = np.array([[1, 0, 1, 0, 1, 0], [1] * 6, [0, 0, 1, 0, 0, 0]])
    ids = np.full(IDS.shape, 1)
    for row in range(3):
        ids[row, holes[row] == 1] = IDS[row, LEFT[row] == 1]
    assert texts(run_strategy(name, ids, holes), 6) == texts(run_strategy(name), 6)


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_same_call_gives_the_same_text(name):
    first, second = run_strategy(name), run_strategy(name)
    assert first.sequences.tolist() == second.sequences.tolist()
    assert first.sequences.dtype == np.int64
    np.testing.assert_array_equal(first.sequences[:: len(first.sequences) // 3, :6], IDS)  # the prompt as it was given


def test_another_seed_gives_another_text():
    one, other = (run(do_sample=True, seed=seed, eos_token_id=[]).sequences[:, 6:] for seed in (1, 2))
    assert (one != other).any(1).all()


def test_a_text_that_fills_all_positions_is_written_by_every_strategy():
    ids = token_ids(CONFIG, 2, 30)
    for name in STRATEGIES:
        seed = {"seed": 3} if "seed" in STRATEGIES[name] else {}
        new = 11 if name == "contrastive" else 12  # 41 positions; the last token is fed by contrastive search only
        output = run_strategy(name, ids, None, max_new_tokens=new, eos_token_id=[], **seed)
        assert output.sequences.shape[1] == 30 + new


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_top_k_of_one_is_greedy_search():
    assert texts(run(do_sample=True, top_k=1, seed=3), 6) == texts(run(), 6)


def codes(texts_RN: np.ndarray) -> np.ndarray:
    """The place of each text in the order of `enumerated`."""
    return texts_RN @ TINY.vocab_size ** np.arange(texts_RN.shape[1])[::-1]


def enumerated(ids, steps: int, cut=lambda p_RV: p_RV) -> np.ndarray:
    """The probability of each text of `steps` tokens by the tiny model, by the chain rule."""
    reference, vocabulary = tiny_reference(0), TINY.vocab_size
    law = np.ones((1,))
    prefixes = np.array(ids)
    for _ in range(steps):
        hidden = reference(prefixes).last_hidden_state[:, -1]
        weights_RV = cut(softmax(reference.logits(hidden) * SPREAD))
        law = (law[:, None] * weights_RV / weights_RV.sum(1, keepdims=True)).reshape(-1)
        tokens = np.tile(np.arange(vocabulary), len(prefixes))[:, None]
        prefixes = np.concatenate([np.repeat(prefixes, vocabulary, axis=0), tokens], axis=1)
    return law


def test_enough_beams_find_the_likeliest_of_all_texts():
    law = enumerated([[3, 4, 0]], 3)
    stepper = ReferenceStepper(TINY, SPREAD, tiny_reference(0))
    output = run(
        [[3, 4, 0]], None, TINY, None, stepper, num_beams=25, num_return_sequences=25, length_penalty=0.0,
        max_new_tokens=3, eos_token_id=[], output_scores=True,
    )  # fmt: skip
    best = np.argsort(-law)[:25]
    assert codes(output.sequences[:, 3:]).tolist() == best.tolist()
    np.testing.assert_allclose(output.sequences_scores, np.log(law[best]), rtol=1e-5)


@pytest.mark.parametrize("drafted", [None, "another model", "lookup"])
@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_sampled_texts_follow_the_law_of_the_model(drafted, threshold):
    """The probabilities of all texts of four tokens, with and without drafts."""
    texts_sampled = 3000
    ids = [[3, 4, 3]]
    target = ReferenceStepper(TINY, SPREAD, tiny_reference(0))
    options = dict(do_sample=True, num_return_sequences=texts_sampled, seed=1, max_new_tokens=4, eos_token_id=[])
    draft = None
    if drafted == "another model":
        draft = ReferenceStepper(TINY, SPREAD, tiny_reference(1))
        options |= dict(num_assistant_tokens=2, assistant_confidence_threshold=threshold)
    elif drafted == "lookup":
        options |= dict(prompt_lookup_num_tokens=2)
    output = run(ids, None, TINY, draft, target, top_k=0, **options)
    law = enumerated(ids, 4)
    counts = np.bincount(codes(output.sequences[:, 3:]), minlength=len(law))
    likely = law * texts_sampled > 5
    counts = np.append(counts[likely], counts[~likely].sum())
    assert chi_square(counts, np.append(law[likely], law[~likely].sum())) < 6
    if drafted is not None and threshold == 0:
        assert max(target.widths) == 3  # drafts were verified


def hottest(p_RV: np.ndarray, temperature: float) -> np.ndarray:
    return p_RV ** (1 / temperature)


def likeliest(p_RV: np.ndarray, k: int) -> np.ndarray:
    return np.where(p_RV >= np.sort(p_RV, axis=1)[:, -k, None], p_RV, 0)


def nucleus(p_RV: np.ndarray, mass: float) -> np.ndarray:
    """Those before which less than `mass` stands, when the likeliest come first."""
    before_RVV = np.where(p_RV[:, None] > p_RV[:, :, None], p_RV[:, None], 0)
    return np.where(before_RVV.sum(2) < mass, p_RV, 0)


CUTS = {
    "temperature": (dict(temperature=0.5, top_k=0), lambda p: hottest(p, 0.5)),
    "top-k": (dict(top_k=3), lambda p: likeliest(p, 3)),
    "top-p": (dict(top_k=0, top_p=0.8), lambda p: nucleus(p, 0.8)),
    "all three": (
        dict(temperature=1.6, top_k=4, top_p=0.9),
        lambda p: nucleus(softmax(np.log(likeliest(hottest(p, 1.6), 4) + 1e-300)), 0.9),
    ),
}


@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "assisted"])
@pytest.mark.parametrize("name", CUTS)
def test_sampled_texts_follow_the_law_that_a_cut_leaves(name, drafted):
    texts_sampled, ids = 1500, [[3, 4, 3]]
    options, cut = CUTS[name]
    draft = ReferenceStepper(TINY, SPREAD, tiny_reference(1)) if drafted else None
    if drafted:
        options = {**options, "num_assistant_tokens": 2, "assistant_confidence_threshold": 0.0}
    output = run(
        ids, None, TINY, draft, ReferenceStepper(TINY, SPREAD, tiny_reference(0)), do_sample=True, seed=2,
        num_return_sequences=texts_sampled, max_new_tokens=3, eos_token_id=[], **options,
    )  # fmt: skip
    law = enumerated(ids, 3, cut)
    counts = np.bincount(codes(output.sequences[:, 3:]), minlength=len(law))
    assert counts[law < 1e-12].sum() == 0
    likely = law * texts_sampled > 6
    assert likely.sum() > 4
    counts = np.append(counts[likely], counts[~likely].sum())
    law = np.append(law[likely], law[~likely].sum())
    possible = law * texts_sampled > 5.1
    assert counts[~possible].sum() < 25
    assert chi_square(counts[possible], law[possible] / law[possible].sum()) < 6


def test_beam_sampling_draws_its_beams_by_their_probabilities():
    """With two beams and one step the first drawn of a prompt is a sample of the softmax."""
    prompts = 1500
    ids = np.tile([[3, 4, 0]], (prompts, 1))
    stepper = ReferenceStepper(TINY, SPREAD, tiny_reference(0))
    output = run(
        ids, None, TINY, None, stepper, num_beams=2, do_sample=True, top_k=0, max_new_tokens=1, seed=2,
        num_return_sequences=2, eos_token_id=[],
    )  # fmt: skip
    pairs = np.sort(output.sequences[:, 3].reshape(-1, 2), axis=1)
    p = enumerated([[3, 4, 0]], 1)
    one_way = p[:, None] * p / (1 - p[:, None])
    law = np.triu(one_way + one_way.T, 1)
    counts = np.bincount(codes(pairs), minlength=25).reshape(5, 5)
    likely = law * prompts > 5
    assert counts[~likely].sum() <= 0.2 * prompts
    assert chi_square(counts[likely], law[likely] / law[likely].sum()) < 6


# -- assisted decoding ------------------------------------------------------------------------------------------------

DRAFTS = {"exact": exact_draft, "poor": poor_draft, "foreign": foreign_draft}
LOOKED_UP = dict(prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
GREEDY_OPTIONS = [{}, STRATEGIES["greedy with options"], dict(forced_eos_token_id=70, bad_words_ids=[[53, 53]])]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("options", GREEDY_OPTIONS, ids=["plain", "rules", "forced"])
@pytest.mark.parametrize("number", [1, 4])
def test_assisted_greedy_search_writes_the_text_of_greedy_search(draft, options, number):
    options = {**options, "max_new_tokens": 13}
    for threshold in (0.0, 0.4):
        assistant = dict(num_assistant_tokens=number, assistant_confidence_threshold=threshold)
        got = run(draft=DRAFTS[draft](), **assistant, **options)
        assert got.sequences.tolist() == run(**options).sequences.tolist()


@pytest.mark.parametrize("options", GREEDY_OPTIONS, ids=["plain", "rules", "forced"])
def test_greedy_search_with_prompt_lookup_writes_the_text_of_greedy_search(options):
    options = {**options, "max_new_tokens": 30, "eos_token_id": []}
    stepper, repeating = ReferenceStepper(CONFIG), np.tile(IDS[1:2, :3], 2)
    got = run(repeating, None, stepper=stepper, **LOOKED_UP, **options)
    assert got.sequences.tolist() == run(repeating, None, **options).sequences.tolist()
    assert max(stepper.widths) > 1  # drafts were verified


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_text_that_would_be_too_long_is_refused_before_anything_is_computed(name, monkeypatch):
    def prefill(*args, **options):
        raise AssertionError("computed")

    monkeypatch.setattr(ReferenceStepper, "prefill", prefill)
    with pytest.raises(InputError, match=r"the prompt leaves room for \d+ new tokens"):
        run_strategy(name, max_new_tokens=37)
    with pytest.raises(AssertionError, match="computed"):
        run_strategy(name)


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_an_exact_draft_saves_steps(schedule):
    stepper = ReferenceStepper(CONFIG)
    options = dict(num_assistant_tokens=3, assistant_confidence_threshold=0.0, num_assistant_tokens_schedule=schedule)
    run(stepper=stepper, draft=exact_draft(), eos_token_id=[], max_new_tokens=25, **options)
    widths = {"constant": [4, 4, 4, 4, 4, 4], "heuristic": [4, 6, 8, 6]}[schedule]
    assert stepper.widths == widths


SAMPLING_DRAFTS = {**DRAFTS, "lookup": None}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draft", SAMPLING_DRAFTS)
def test_the_same_seed_samples_the_same_text_with_any_draft(draft, seed):
    options = dict(do_sample=True, seed=seed, temperature=0.4, max_new_tokens=14, num_return_sequences=2, top_p=0.95)
    stepper, drafts = ReferenceStepper(CONFIG), dict(prompt_lookup_num_tokens=4)
    if draft != "lookup":
        drafts = dict(draft=DRAFTS[draft](), num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    got = run(stepper=stepper, **drafts, **options)
    assert got.sequences.tolist() == run(**options).sequences.tolist()
    assert max(stepper.widths) > 1


def test_a_draft_model_samples_what_an_equal_model_would():
    """The same numbers, so that a perfect draft is always right, at any temperature."""
    stepper = ReferenceStepper(CONFIG)
    run(
        stepper=stepper, draft=exact_draft(), do_sample=True, temperature=2.0, seed=1, eos_token_id=[],
        num_assistant_tokens=3, assistant_confidence_threshold=0.0, max_new_tokens=25,
    )  # fmt: skip
    assert stepper.widths == [4] * 6


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([5, 6, 7, 8, 9, 5, 6], [7, 8, 9]),  # what followed 5 6
        ([4, 6, 9, 5, 6, 7, 8, 5, 6], [7, 8, 5]),  # the longer match wins over the earlier one
        ([6, 8, 7, 6, 9, 9, 5, 6], [8, 7, 6]),  # the earliest of equals
        ([5, 6, 5, 6], [5, 6]),  # no more than there is
        ([5, 6, 7], []),
        ([5], []),
    ],
)
def test_what_followed_the_last_tokens_before_is_looked_up(text, draft):
    drafter = PromptLookup(request_of(CONFIG, [text], prompt_lookup_num_tokens=3))
    prefix = prefix_of(np.array([[1, *text]]), np.array([[False] + [True] * len(text)]), 1)
    ended, going = drafter.propose([prefix, prefix], np.array([True, False]), 5)
    assert going == draft
    assert ended == []
    assert drafter.propose([prefix], np.array([False]), 1)[0] == draft[:1]


def test_scores_of_assisted_search_are_those_of_plain_search():
    plain = run(output_scores=True, output_logits=True, eos_token_id=[], repetition_penalty=1.2)
    drafted = run(
        output_scores=True, output_logits=True, eos_token_id=[], repetition_penalty=1.2, draft=poor_draft(),
        assistant_confidence_threshold=0.0, num_assistant_tokens=3,
    )  # fmt: skip
    for got, want in ((drafted.scores, plain.scores), (drafted.logits, plain.logits)):
        np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-6, atol=1e-6)


# -- contrastive search -----------------------------------------------------------------------------------------------


def contrastive_by_definition(text: list[int], alpha: float, k: int, steps: int) -> list[int]:
    """Equation 5 of arXiv:2202.06417, one text, everything computed anew."""
    reference = ReferenceStepper(CONFIG).reference
    for _ in range(steps):
        hidden = reference(np.array([text])).last_hidden_state[0]
        p = softmax(reference.logits(hidden[-1]))
        best = (-np.inf, 0)
        for token in np.argsort(-p)[:k].tolist():
            after = reference(np.array([[*text, token]])).last_hidden_state[0]
            cosines = after[:-1] @ after[-1] / np.linalg.norm(after[:-1], axis=1) / np.linalg.norm(after[-1])
            best = max(best, ((1 - alpha) * p[token] - alpha * cosines.max(), token))
        text = [*text, best[1]]
    return text


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.1, 7), (1.0, 3)])
def test_contrastive_search_follows_its_definition(alpha, k):
    output = run(penalty_alpha=alpha, top_k=k, eos_token_id=[])
    for row in range(3):
        text = IDS[row, LEFT[row] == 1].tolist()
        want = contrastive_by_definition(text, alpha, k, 8)
        assert output.sequences[row, 6:].tolist() == want[len(text) :]


def test_contrastive_search_never_chooses_what_is_forbidden():
    """Not even where fewer than k tokens are left; there the published classes may."""
    allowed = [10, 11]
    output = run(penalty_alpha=0.9, top_k=5, prefix_allowed_tokens_fn=lambda prompt, ids: allowed)
    assert set(output.sequences[:, 6:].ravel().tolist()) <= set(allowed)


def test_a_prompt_whose_beams_have_all_ended_needs_no_tokens():
    def only_ends_then_nothing(ids, scores):
        """For the first prompt; ids are right-aligned."""
        mine = (ids[:, :6] == np.where(LEFT, IDS, 1)[0]).all(1)
        left = ENDS if ids.shape[1] == 6 else []
        return np.where(mine[:, None] & ~np.isin(np.arange(97), left), -np.inf, scores)

    options = dict(num_beams=2, early_stopping=True)
    output = run(logits_processor=only_ends_then_nothing, **options)
    assert output.sequences[0, 6] in ENDS
    assert texts(output, 6)[1:] == texts(run(**options), 6)[1:]


# -- rules that know the prompt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_prompt_has_its_own_allowed_tokens_in_every_search(name):
    output = run_strategy(name, prefix_allowed_tokens_fn=lambda prompt, ids: range(10 + 20 * prompt, 30 + 20 * prompt))
    returned = STRATEGIES[name].get("num_return_sequences", 1)
    for row, text in enumerate(output.sequences[:, 6:]):
        assert {(token - 10) // 20 for token in text.tolist() if token != 1} == {row // returned}


# -- outputs, streaming -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
def test_scores_and_logits_are_returned_where_asked_for(name):
    nothing = run_strategy(name)
    assert nothing.scores is None
    assert nothing.logits is None
    output = run_strategy(name, output_scores=True, output_logits=True, eos_token_id=[])
    assert len(output.scores) == len(output.logits) == 8
    rows = 3 * max(STRATEGIES[name].get("num_beams", 1), STRATEGIES[name].get("num_return_sequences", 1))
    assert {s.shape for s in (*output.scores, *output.logits)} == {(rows, 97)}
    assert {s.dtype.name for s in (*output.scores, *output.logits)} == {"float32"}
    reference = ReferenceStepper(CONFIG)
    first = reference.prefill(IDS, LEFT == 1, 64).logits
    np.testing.assert_allclose(output.logits[0][:: rows // 3], first, rtol=1e-6)
    assert (output.sequences_scores is not None) == ("num_beams" in STRATEGIES[name])


@pytest.mark.parametrize("name", [name for name in STRATEGIES if "num_beams" not in STRATEGIES[name]])
def test_streamed_tokens_are_those_of_the_search(name):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], 0

        def put(self, ids):
            self.got.append(ids)

        def end(self):
            self.ended += 1

    streamer = Streamer()
    output = run_strategy(name, streamer=streamer)
    assert streamer.ended == 1
    prompt, *steps = streamer.got
    np.testing.assert_array_equal(np.concatenate([prompt, np.array(steps).T], axis=1), output.sequences)
    options = dict(STRATEGIES[name])
    draft = options.pop("draft", lambda: None)()
    assistant = {} if draft is None else dict(assistant_config=draft.config)
    request = request_of(CONFIG, IDS, LEFT, max_new_tokens=8, **assistant, **options)
    streamed = list(stream(request, ReferenceStepper(CONFIG), draft))
    np.testing.assert_array_equal(np.array(streamed).T, output.sequences[:, 6:])


def test_a_stream_gives_each_token_before_it_computes_the_next():
    stepper = ReferenceStepper(CONFIG)
    tokens = stream(request_of(CONFIG, IDS, LEFT, eos_token_id=[], max_new_tokens=30), stepper)
    for made in range(3):
        next(tokens)
        assert len(stepper.widths) == made


def test_beams_cannot_be_streamed():
    with pytest.raises(InputError, match="beam search does not know its text before the end"):
        stream(request_of(CONFIG, IDS, num_beams=2), ReferenceStepper(CONFIG))


def test_a_row_without_a_token_to_choose_is_an_error():
    for options in (
        {},
        dict(do_sample=True),
        dict(num_beams=2),
        dict(penalty_alpha=0.5),
        dict(prompt_lookup_num_tokens=2),
    ):
        with pytest.raises(InputError, match="row 0: the options and processors leave no token to choose from"):
            run(suppress_tokens=list(range(97)), **options)
