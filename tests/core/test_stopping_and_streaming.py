"""Ends of texts at strings, times and the caller's word; words as they are written."""

import io
from contextlib import redirect_stdout

import numpy as np
import pytest
from harness import config_of, token_ids
from reference_stepper import ReferenceStepper, request_of

from opt_core.errors import InputError
from opt_core.prefix import prefix_of
from opt_core.searching import search
from opt_core.stopping import Stopping
from opt_core.streaming import TextStreamer, words

CONFIG = config_of(eos_token_id=None)
TEXTS = ["The water is what we've said. 2023, naïve café;\nЯ 你好，世界。 😀 end", "no\n\nspaces  here ", "x"]


def prefix_of_text(ids):
    return prefix_of(np.array([ids]), np.ones((1, len(ids)), bool), 1)


def run(**options):
    ids = token_ids(CONFIG, 2, 5)
    return search(request_of(CONFIG, ids, **options), ReferenceStepper(CONFIG)).sequences[:, 5:]


# -- stop strings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS[:2])
@pytest.mark.parametrize("stop", ["wat", "ter is", "é;\n", "好", "世界。 😀", "\n\n", "😀", "s  h", "3, n"])
def test_a_text_ends_with_the_token_that_completes_a_stop_string(tokenizer, text, stop):
    stopping = Stopping([], 1000, stop_texts=[stop, "never there"], tokenizer=tokenizer)
    ids = tokenizer.encode(text)
    ends = [stopping(prefix_of_text(ids[:length]))[0] for length in range(1, len(ids) + 1)]
    complete = [stop in tokenizer.decode(ids[:length]) for length in range(1, len(ids) + 1)]
    first = complete.index(True) if True in complete else len(ids)
    assert np.flatnonzero(ends).tolist() == ([first] if first < len(ids) else [])


def test_a_stop_string_in_the_prompt_ends_nothing(tokenizer):
    stopping = Stopping([], 1000, stop_texts=["water"], tokenizer=tokenizer)
    ids = tokenizer.encode("the water")
    more = tokenizer.encode(" in the", add_special_tokens=False)
    assert stopping(prefix_of_text(ids))[0]
    assert not any(stopping(prefix_of_text(ids + more[:n]))[0] for n in range(1, len(more) + 1))


def test_generation_ends_each_row_at_its_own_stop_string(tokenizer):
    free = run(max_new_tokens=9)
    stop = tokenizer.decode(free[0, 3:5])
    got = run(max_new_tokens=9, stop_strings=[stop], tokenizer=tokenizer)
    end = next(n for n in range(1, 10) if stop in tokenizer.decode(free[0, :n]))
    assert got[0, :end].tolist() == free[0, :end].tolist()
    assert set(got[0, end:].tolist()) <= {1}


# -- times, criteria --------------------------------------------------------------------------------------------------


def test_time_that_has_run_out_ends_all_texts_after_a_token():
    assert run(max_time=1e-9, max_new_tokens=9).shape == (2, 1)
    assert run(max_time=1000.0, max_new_tokens=9).shape == (2, 9)
    assert run(max_time=1e-9, max_new_tokens=9, num_beams=2).shape == (2, 1)


@pytest.mark.parametrize("options", [{}, dict(num_beams=2), dict(prompt_lookup_num_tokens=2), dict(penalty_alpha=0.5)])
def test_a_criterion_ends_each_row_or_all(options):
    assert run(stopping_criteria=[lambda ids, scores: ids.shape[1] >= 8], **options).shape == (2, 3)
    free = run(max_new_tokens=9, **options)
    if "num_beams" not in options:
        got = run(max_new_tokens=9, stopping_criteria=[lambda ids, scores: ids[:, -1] == free[0, 4]], **options)
        for row, text in zip(got, free, strict=True):
            end = np.flatnonzero(text == free[0, 4])[:1]
            assert row.tolist() == [
                token if not len(end) or place <= end[0] else 1 for place, token in enumerate(text[: got.shape[1]])
            ]


@pytest.mark.parametrize("verdict", [1, np.array([1, 0]), np.array([True]), "yes"])
def test_a_verdict_that_is_none_is_named(verdict):
    with pytest.raises(InputError, match="stopping_criteria: expected a bool or bools of shape"):
        run(stopping_criteria=[lambda ids, scores: verdict])


def test_a_criterion_sees_the_scores_where_they_are_kept():
    seen = []
    kept = dict(return_dict_in_generate=True, output_scores=True)
    criteria = [lambda ids, scores: bool(seen.append(None if scores is None else len(scores)))]
    for options in ({}, kept):
        ids = token_ids(CONFIG, 2, 5)
        search(
            request_of(CONFIG, ids, max_new_tokens=3, stopping_criteria=criteria, **options), ReferenceStepper(CONFIG)
        )
    assert seen == [None, None, None, 1, 2, 3]


# -- words ------------------------------------------------------------------------------------------------------------


def steps_of(tokenizer, text):
    return [np.array([token]) for token in tokenizer.encode(text, add_special_tokens=False)]


@pytest.mark.parametrize("text", TEXTS)
def test_words_joined_are_the_text_and_none_is_cut(tokenizer, text):
    pieces = list(words(tokenizer, steps_of(tokenizer, text)))
    assert "".join(pieces) == text
    assert all(piece[-1] in " \n你好世界" or piece == pieces[-1] for piece in pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 3 or len(text) < 16


@pytest.mark.parametrize("text", TEXTS)
def test_the_streamer_prints_what_the_published_one_prints(tokenizer, text):
    published = pytest.importorskip("transformers").TextStreamer
    printed = []
    for kind in (TextStreamer, published):
        for skip in (False, True):
            streamer, out = kind(tokenizer, skip_prompt=skip), io.StringIO()
            with redirect_stdout(out):
                streamer.put(np.array([tokenizer.encode("They said ")]))
                for ids in steps_of(tokenizer, text):
                    streamer.put(ids)
                streamer.end()
            printed.append(out.getvalue())
    assert printed[:2] == printed[2:]
    assert printed[1] == text + "\n"


def test_the_streamer_takes_one_text_and_can_be_used_again(tokenizer):
    streamer, out = TextStreamer(tokenizer, skip_prompt=True), io.StringIO()
    with pytest.raises(InputError, match="expected one text, got 2"):
        streamer.put(np.zeros((2, 3), int))
    with redirect_stdout(out):
        for _ in range(2):
            streamer.put(np.array([[5, 6]]))
            streamer.put(np.array([tokenizer.encode("x", add_special_tokens=False)[0]]))
            streamer.end()
    assert out.getvalue() == "x\nx\n"
