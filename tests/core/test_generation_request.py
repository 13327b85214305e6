"""What a call of `generate` stands for, and what is refused before anything is computed."""

import numpy as np
import pytest
from harness import config_of
from reference_stepper import request_of

from opt_core.errors import InputError, KeywordError
from opt_core.generation_config import GenerationConfig
from opt_core.generation_options import NOT_DONE

CONFIG = config_of()  # 97 tokens, 41 positions, pad 1, bos and eos 2
IDS = [[5, 6, 7], [8, 9, 10]]


def asked(ids=IDS, mask=None, config=CONFIG, **options):
    return request_of(config, ids, mask, **options)


def problems_of(*args, **options) -> list[str]:
    with pytest.raises(InputError) as caught:
        asked(*args, **options)
    return list(caught.value.problems)


# -- strategies -------------------------------------------------------------------------------------------------------

STRATEGIES = [
    ({}, "greedy"),
    (dict(do_sample=True), "sample"),
    (dict(num_beams=2), "beam"),
    (dict(num_beams=2, do_sample=True), "beam"),
    (dict(penalty_alpha=0.6), "contrastive"),
    (dict(penalty_alpha=0.6, top_k=4), "contrastive"),
    (dict(prompt_lookup_num_tokens=3), "assisted"),
    (dict(prompt_lookup_num_tokens=3, do_sample=True), "assisted"),
    (dict(assistant_config=CONFIG), "assisted"),
]


@pytest.mark.parametrize(("options", "strategy"), STRATEGIES)
def test_options_make_a_strategy(options, strategy):
    assert asked(**options).strategy == strategy


@pytest.mark.parametrize(("options", "strategy"), STRATEGIES)
def test_the_strategy_is_the_published_one(options, strategy):
    transformers = pytest.importorskip("transformers")
    names = {
        "greedy": "greedy_search", "sample": "sample", "contrastive": "contrastive_search",
        "assisted": "assisted_generation", "beam": "beam_sample" if options.get("do_sample") else "beam_search",
    }  # fmt: skip
    options = dict(options)
    assistant = options.pop("assistant_config", None)
    assert transformers.GenerationConfig(**options).get_generation_mode(assistant) == names[strategy]


def test_only_greedy_search_to_a_length_or_an_id_is_what_backends_have_compiled():
    assert asked(max_new_tokens=3, eos_token_id=[3, 4], pad_token_id=5).is_plain
    changes = [
        dict(do_sample=True), dict(num_beams=2), dict(repetition_penalty=1.1), dict(min_new_tokens=2),
        dict(max_time=5.0), dict(stop_strings="x", tokenizer=object()), dict(streamer=object()),
        dict(logits_processor=[max]), dict(stopping_criteria=[max]), dict(return_dict_in_generate=True),
        dict(prompt_lookup_num_tokens=2), dict(prefix_allowed_tokens_fn=max), dict(renormalize_logits=True),
    ]  # fmt: skip
    for options in changes:
        assert not asked(**options).is_plain, options


# -- configs and calls ------------------------------------------------------------------------------------------------


def test_a_call_wins_over_the_config_and_the_config_over_the_model():
    config = GenerationConfig(num_beams=3, length_penalty=2.0, eos_token_id=9, max_new_tokens=4)
    request = asked(generation_config=config, num_beams=2)
    assert (request.settings.num_beams, request.settings.length_penalty) == (2, 2.0)
    assert (request.plan.eos_token_ids, request.plan.max_new_tokens) == ((9,), 4)
    assert asked(generation_config=config, eos_token_id=[5, 6]).plan.eos_token_ids == (5, 6)
    assert asked(generation_config=GenerationConfig()).plan.eos_token_ids == (2,)
    assert config == GenerationConfig(num_beams=3, length_penalty=2.0, eos_token_id=9, max_new_tokens=4)


def test_a_length_given_in_a_call_wins_over_any_length_of_the_config():
    config = GenerationConfig(max_new_tokens=4, min_new_tokens=3)
    assert asked(generation_config=config, max_length=10, min_length=0).plan.max_new_tokens == 7
    assert asked(generation_config=config, max_length=10, min_length=4).settings.min_new_tokens is None
    assert asked(generation_config=GenerationConfig(max_length=10)).plan.max_new_tokens == 7
    assert asked(generation_config=GenerationConfig(max_length=10), max_new_tokens=2).plan.max_new_tokens == 2


def test_the_default_length_is_twenty_new_tokens_but_twenty_asked_for_is_the_whole_length():
    assert asked().plan.max_new_tokens == 20
    assert (
        asked(generation_config=GenerationConfig(max_length=20)).plan.max_new_tokens == 20
    )  # the default, as published
    assert asked(max_length=20).plan.max_new_tokens == 17
    assert asked([[5] * 30]).plan.max_new_tokens == 12


def test_options_of_the_config_wait_for_their_strategy():
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=3, length_penalty=2.0)
    assert asked(generation_config=config, do_sample=False).is_plain


def test_no_prompt_means_the_token_that_begins_a_text():
    assert asked(None).plan.input_ids.tolist() == [[2]]
    assert asked(None, bos_token_id=7).plan.input_ids.tolist() == [[7]]


def test_an_empty_list_of_ends_means_that_nothing_ends_a_text():
    assert asked(eos_token_id=[]).plan.eos_token_ids == ()


# -- refusals ---------------------------------------------------------------------------------------------------------

SMALL = config_of(vocab_size=89)
SHORT = config_of(max_position_embeddings=11)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(temperature=0.5), "temperature: has no effect without do_sample=True, got 0.5"),
        (dict(top_k=5), "top_k: has no effect without do_sample=True, got 5"),
        (dict(length_penalty=2.0), "length_penalty: has no effect without num_beams above 1, got 2.0"),
        (dict(early_stopping=True), "early_stopping: has no effect without num_beams above 1, got True"),
        (dict(num_assistant_tokens=3), "num_assistant_tokens: has no effect without an assistant_model, got 3"),
        (
            dict(max_matching_ngram_size=3),
            "max_matching_ngram_size: has no effect without prompt_lookup_num_tokens, got 3",
        ),
        (dict(output_scores=True), "output_scores: has no effect without return_dict_in_generate=True, got True"),
        (
            dict(penalty_alpha=0.6, do_sample=True),
            "penalty_alpha: has no effect without top_k above 1, and with do_sample or beams, got 0.6",
        ),
        (
            dict(num_return_sequences=2),
            "num_return_sequences: without do_sample or beams there is one text a prompt, got 2",
        ),
        (
            dict(num_return_sequences=3, num_beams=2),
            "num_return_sequences: expected at most num_beams = 2, got 3",
        ),
        (
            dict(assistant_config=CONFIG, num_beams=2),
            "assistant_model: only greedy search and sampling can be assisted, not beam search",
        ),
        (
            dict(prompt_lookup_num_tokens=2, penalty_alpha=0.6),
            "prompt_lookup_num_tokens: only greedy search and sampling can be assisted, not contrastive search",
        ),
        (
            dict(prompt_lookup_num_tokens=2, assistant_config=CONFIG),
            "prompt_lookup_num_tokens: expected either this or an assistant_model, got both",
        ),
        (dict(assistant_config=SMALL), "assistant_model: expected a vocabulary of 97, got 89"),
        (
            dict(assistant_config=SHORT),
            "assistant_model: expected max_position_embeddings of at least 22, got 11",
        ),
        (dict(use_cache=False), "use_cache: expected True, got False"),
        (dict(stop_strings="x"), "stop_strings: expected a tokenizer beside them, got None"),
        (
            dict(streamer=object(), num_beams=2),
            "streamer: beam search does not know its text before the end",
        ),
        (dict(seed=3), "seed, generator: have no effect without do_sample=True"),
        (dict(seed=-3, do_sample=True), "seed: expected integers from 0 to 2^64 - 1, got -3"),
        (dict(seed=1.5, do_sample=True), "seed: expected integers from 0 to 2^64 - 1, got 1.5"),
        (dict(seed=[], do_sample=True), "seed: expected integers from 0 to 2^64 - 1, got []"),
        (dict(seed=[1, 2, 3], do_sample=True), "seed: expected one integer or one for each of the 2 prompts, got 3"),
        (dict(logits_processor=[3]), "logits_processor: expected callables, got 3"),
        (dict(stopping_criteria="x"), "stopping_criteria: expected callables, got 'x'"),
        (dict(generator=3, do_sample=True), "generator: expected a numpy.random.Generator, got int"),
        (dict(min_new_tokens=21), "min_new_tokens: asks for 21 new tokens, where at most 20 are made"),
        (dict(min_length=9, max_length=8), "min_length: asks for 6 new tokens, where at most 5 are made"),
        (dict(guidance_scale=1.5), "guidance_scale: not supported, expected None, got 1.5"),
        (dict(suppress_tokens=[97]), "suppress_tokens: expected an id from 0 to 96, got 97"),
        (dict(bad_words_ids=[[5, 98]]), "bad_words_ids: expected an id from 0 to 96, got 98"),
        (dict(sequence_bias=[[[99], 1.0]]), "sequence_bias: expected an id from 0 to 96, got 99"),
        (dict(forced_eos_token_id=97), "forced_eos_token_id: expected an id from 0 to 96, got 97"),
        (dict(eos_token_id=97), "eos_token_id: expected an id from 0 to 96, got 97"),
        (dict(top_p=1.5, do_sample=True), "top_p: expected a number from 0 to 1, got 1.5"),
        (dict(max_new_tokens=0), "max_new_tokens: expected a positive integer, got 0"),
        (
            dict(max_new_tokens=40),
            "max_new_tokens: the prompt leaves room for 39 new tokens (max_position_embeddings = 41), got 40",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_named(options, line):
    assert problems_of(**options) == [line]


def test_published_options_that_are_not_done_are_refused_unless_they_ask_for_nothing():
    for name, inert in NOT_DONE.items():
        asked(**{name: inert[0]})
        assert problems_of(**{name: "x"})[0].startswith(f"{name}: not supported")
        assert problems_of(generation_config=GenerationConfig.from_dict({name: "x"}))[0].startswith(name)
        asked(generation_config=GenerationConfig.from_dict({name: inert[0]}))


def test_an_option_given_its_default_is_never_refused():
    asked(temperature=1.0, top_k=50, top_p=1.0, length_penalty=1.0, early_stopping=False, output_scores=False)
    asked(temperature=None, top_k=None, min_p=None, num_beams=None, do_sample=None, seed=None)


def test_all_that_is_wrong_with_a_request_is_listed_at_once():
    lines = problems_of([[5, 97]], top_p=3, guidance_scale=2, seed=3, stop_strings="x")
    assert [line.partition(":")[0] for line in lines] == [
        "input_ids", "top_p", "guidance_scale", "stop_strings", "seed, generator",
    ]  # fmt: skip


def test_one_processor_needs_no_list():
    assert asked(logits_processor=max).rules == asked(logits_processor=[max]).rules


@pytest.mark.parametrize("options", [{"do_sample": True}, "greedy"])
def test_options_of_another_kind_are_refused(options):
    got = type(options).__name__
    with pytest.raises(InputError, match=f"generation_config: expected an opt_core.GenerationConfig, got {got}; "):
        asked(generation_config=options)


def test_a_misspelt_option_is_told_what_it_may_have_meant():
    with pytest.raises(KeywordError, match="num_beam: unknown keyword; did you mean num_beams"):
        asked(num_beam=3)
    with pytest.raises(KeywordError, match="stop_string: unknown keyword; did you mean stop_strings"):
        asked(stop_string="x")


def test_contrastive_search_needs_a_position_for_its_last_token_too():
    assert asked([[5] * 30], penalty_alpha=0.6).plan.max_new_tokens == 11
    assert asked([[5] * 30], penalty_alpha=0.6, max_new_tokens=11).plan.max_new_tokens == 11
    assert problems_of([[5] * 30], penalty_alpha=0.6, max_new_tokens=12) == [
        "max_new_tokens: the prompt leaves room for 11 new tokens in contrastive search, got 12"
    ]


# -- seeds ------------------------------------------------------------------------------------------------------------


def test_without_a_seed_every_call_has_its_own():
    assert asked(do_sample=True).seeds != asked(do_sample=True).seeds


def test_a_generator_gives_a_new_seed_to_each_call_and_the_same_ones_again():
    first, second = np.random.default_rng(3), np.random.default_rng(3)
    one = [asked(do_sample=True, generator=first).seeds for _ in range(2)]
    assert one == [asked(do_sample=True, generator=second).seeds for _ in range(2)]
    assert one[0] != one[1]


def test_a_seed_is_one_integer_or_one_for_each_prompt():
    assert asked(do_sample=True, seed=np.int64(3)).seeds == (3,)
    assert asked(do_sample=True, seed=np.array([3, 4])).seeds == (3, 4)
    assert asked(do_sample=True, seed=[2**64 - 1]).seeds == (2**64 - 1,)


def test_requests_have_one_digest_where_they_ask_for_the_same():
    def digest(*args, is_seeded=True, **options):
        return asked(*args, **options).digest(is_seeded=is_seeded)

    one = digest(max_new_tokens=3, do_sample=True, seed=5)
    assert one == digest(max_new_tokens=3, do_sample=True, seed=5)
    others = dict(max_new_tokens=4), dict(seed=6), dict(top_k=7), dict(ids=[[5, 6, 7], [8, 9, 11]]), dict(ids=IDS[:1])
    for change in others:
        assert digest(**dict(max_new_tokens=3, do_sample=True, seed=5) | change) != one


def test_seeds_that_nobody_gave_are_not_in_the_digest():
    assert asked(do_sample=True).digest(is_seeded=False) == asked(do_sample=True).digest(is_seeded=False)
