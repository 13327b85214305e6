"""`opt-zoo generate`."""

import dataclasses
import io
import json

import pytest
from harness import config_of, save_random

from opt_core import OPTTokenizer
from opt_core.generation_config import GenerationConfig
from opt_zoo.generation_arguments import _OF_PROGRAMS, OPTIONS

SHORT = ["--max-new-tokens", 7]
SAMPLING = ["--do-sample", "--temperature", 1.3, "--top-k", 20, "--top-p", 0.95]


@pytest.fixture
def generate(opt_zoo, checkpoint_with_tokenizer):
    """Runs the command on a random checkpoint that writes what its tokenizer knows, many spaces among it."""
    config = GenerationConfig(suppress_tokens=list(range(31, 97)), sequence_bias=[[[30], 2.0]], no_repeat_ngram_size=2)
    config.save_pretrained(checkpoint_with_tokenizer)
    return lambda *arguments: opt_zoo("generate", "--model", checkpoint_with_tokenizer, *arguments)


@pytest.fixture
def report_of(generate):
    """The JSON that the command prints."""

    def run(*arguments) -> dict:
        code, out, err = generate(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


@pytest.fixture
def all_backends(backends, monkeypatch):
    names = [backend.name for backend in backends]
    monkeypatch.setattr("opt_zoo.generating.installed_backends", lambda: names)
    return names


def test_a_backend_continues_the_prompt(backend, opt_zoo, checkpoint_with_tokenizer):
    code, out, _ = opt_zoo("generate", checkpoint_with_tokenizer, "to be", "--backend", backend.name, *SHORT, "--json")
    report = json.loads(out)
    (text,) = report["texts"]
    prompt = OPTTokenizer.from_pretrained(checkpoint_with_tokenizer).encode("to be")
    assert (code, text["backend"], text["new_tokens"]) == (0, backend.name, 7)
    assert text["tokens"][: len(prompt)] == prompt
    assert text["text"].startswith("to be")
    assert report["prompts"] == ["to be"]


STRATEGIES = {
    "greedy": [],
    "sampling": [*SAMPLING, "--seed", 5, "--num-return-sequences", 2],
    "a seed drawn by the command": SAMPLING,
    "beams": ["--num-beams", 3, "--num-return-sequences", 2, "--length-penalty", -0.5, "--early-stopping", "never"],
    "contrastive": ["--penalty-alpha", 0.6, "--top-k", 4],
    "prompt lookup": ["--prompt-lookup", 3, "--repetition-penalty", 1.3, "--no-repeat-ngram-size", 2],
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_all_backends_write_the_same_with_every_strategy(all_backends, report_of, name):
    report = report_of("or not", "to be or not", "--backend", "all", *SHORT, *STRATEGIES[name])
    assert report["equal"]
    texts = report["texts"]
    copies = report["options"].get("num_return_sequences", 1)
    assert [text["backend"] for text in texts] == [name for name in all_backends for _ in range(2 * copies)]
    assert [text["prompt"] for text in texts[: 2 * copies]] == [0] * copies + [1] * copies


def test_different_texts_are_said_to_differ(generate, all_backends, monkeypatch):
    from opt_zoo import generating

    written = generating._written

    def spoilt(backend, *arguments):
        texts = written(backend, *arguments)
        texts[0]["tokens"].append(ord(backend.name[0]))
        return texts

    monkeypatch.setattr(generating, "_written", spoilt)
    code, out, _ = generate("to be", "--backend", "all", *SHORT)
    assert code == 0
    assert ("The backends wrote different texts." in out) == (len(all_backends) > 1)


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_of_several_is_continued_as_alone(report_of):
    prompts = ["to be or not to be", "that", "is the question"]
    together = report_of(*prompts, *SHORT, *SAMPLING, "--seed", 3, "--seed", 4, "--seed", 5)
    for prompt, seed, text in zip(prompts, (3, 4, 5), together["texts"], strict=True):
        (alone,) = report_of(prompt, *SHORT, *SAMPLING, "--seed", seed)["texts"]
        assert (text["text"], text["tokens"]) == (alone["text"], alone["tokens"])


def test_prompts_are_read_from_a_file_and_from_stdin(report_of, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("to be\nor not\n")
    assert report_of("--prompt-file", tmp_path / "prompts.txt", *SHORT)["prompts"] == ["to be", "or not"]
    monkeypatch.setattr("sys.stdin", io.StringIO("that\nis\n"))
    assert report_of("the", "--prompt-file", "-", *SHORT)["prompts"] == ["the", "that", "is"]


def test_a_word_beside_a_prompt_file_is_the_source(opt_zoo, checkpoint_with_tokenizer, tmp_path):
    (tmp_path / "prompts.txt").write_text("to be\n")
    code, out, _ = opt_zoo(
        "generate", checkpoint_with_tokenizer, "--prompt-file", tmp_path / "prompts.txt", *SHORT, "--json"
    )
    report = json.loads(out)
    assert (code, report["source"], report["prompts"]) == (0, str(checkpoint_with_tokenizer), ["to be"])


def test_an_empty_prompt_file_is_wrong_usage(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("")
    code, out, err = generate("--prompt-file", tmp_path / "prompts.txt")
    assert (code, out) == (2, "")
    assert "expected a PROMPT, or a --prompt-file with at least one line" in err


# -- options ----------------------------------------------------------------------------------------------------------


def test_every_option_of_one_word_is_an_argument():
    several_words = {"stop_strings", "bad_words_ids", "forced_eos_token_id", "exponential_decay_length_penalty",
                     "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "eos_token_id", "extra"}  # fmt: skip
    assert OPTIONS.keys() | several_words | set(_OF_PROGRAMS) == {f.name for f in dataclasses.fields(GenerationConfig)}


def test_options_reach_generate_as_they_were_given(report_of):
    given = [
        "--num-beams",
        2,
        "--early-stopping",
        "true",
        "--length-penalty",
        -1,
        "--min-new-tokens",
        3,
        "--no-do-sample",
    ]
    assert report_of("to be", *SHORT, *given)["options"] == {
        "max_new_tokens": 7, "min_new_tokens": 3, "early_stopping": True, "do_sample": False, "num_beams": 2,
        "length_penalty": -1.0,
    }  # fmt: skip


def test_what_is_not_given_is_as_the_checkpoint_says(report_of, checkpoint_with_tokenizer):
    GenerationConfig(do_sample=True, top_k=20, max_new_tokens=5).save_pretrained(checkpoint_with_tokenizer)
    report = report_of("to be")
    assert report["texts"][0]["new_tokens"] == 5
    again = report_of("to be", "--seed", report["options"]["seed"])
    assert again["texts"] == report["texts"]
    assert "seed" not in report_of("to be", "--no-do-sample")["options"]


def test_a_seed_that_was_drawn_is_printed(generate):
    _, out, _ = generate("to be", *SHORT, "--do-sample")
    seed = out.rpartition("--seed ")[2].strip().rstrip(".")
    _, again, _ = generate("to be", *SHORT, "--do-sample", "--seed", seed)
    assert again.strip() == out.rpartition("Sampled with")[0].strip()


def test_a_text_ends_at_a_stop_text(report_of):
    free = report_of("to be", *SHORT)["texts"][0]["text"]
    stop = free[len("to be") + 2 :][:2]
    text = report_of("to be", *SHORT, "--stop", "never", "--stop", stop)["texts"][0]["text"]
    assert text == free[: free.index(stop, len("to be")) + 2]
    assert len(text) < len(free)


@pytest.mark.parametrize("options", [[], pytest.param([*SAMPLING, "--seed", 3], marks=pytest.mark.slow)])
def test_an_assistant_changes_no_text(backend, report_of, tmp_path, options):
    draft = save_random(tmp_path / "draft", config_of(num_hidden_layers=1))
    options = ["to be", "--backend", backend.name, *SHORT, *options]
    assert report_of(*options, "--assistant", draft)["texts"] == report_of(*options)["texts"]


def test_bad_combinations_are_refused_all_at_once(generate):
    code, out, err = generate(
        "to be", "--temperature", 0.5, "--num-beams", 2, "--num-return-sequences", 3, "--prompt-lookup", 2,
        "--top-p", 3, "--seed", 1, "--early-stopping", "sometimes",
    )  # fmt: skip
    assert (code, out) == (2, "")
    for name in ("temperature", "num_return_sequences", "prompt_lookup_num_tokens", "top_p", "seed", "early_stopping"):
        assert f"- {name}" in err


@pytest.mark.parametrize("arguments", [["--top-k", "many"], ["--top", 3], ["--temperature"]])
def test_what_is_no_option_or_no_number_is_wrong_usage(generate, arguments):
    code, out, err = generate("to be", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: opt-zoo")


# -- streaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], [*SAMPLING, "--seed", 5], ["--penalty-alpha", 0.6, "--top-k", 3]])
def test_a_streamed_text_is_the_whole_text(generate, report_of, options):
    code, out, _ = generate("to be", *SHORT, *options, "--stream")
    assert (code, out.rstrip("\n")) == (0, report_of("to be", *SHORT, *options)["texts"][0]["text"])


def test_a_stream_comes_in_pieces(generate, monkeypatch):
    from opt_core.streaming import TextStreamer

    pieces = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: pieces.append(text))
    assert generate("to be", "--max-new-tokens", 25, "--stream")[0] == 0
    assert len([piece for piece in pieces if piece]) > 2


def test_all_backends_stream_and_are_compared(generate, all_backends):
    _, out, _ = generate("to be", *SHORT, "--stream", "--backend", "all")
    assert out.count("to be") == len(all_backends)
    assert ("All backends wrote the same." in out) == (len(all_backends) > 1)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["to be", "or not"], "expected one text, got 2"),
        (["to be", "--num-beams", 2], "streamer: beam search does not know its text before the end"),
        (["to be", "--do-sample", "--num-return-sequences", 2], "expected one text, got 2"),
        (["to be", "--json"], "--stream, --json: expected at most one of them, got both"),
    ],
)
def test_what_cannot_be_streamed_is_refused(generate, arguments, problem):
    code, out, err = generate(*arguments, "--stream")
    assert (code, out) == (2, "")
    assert problem in err


# -- refusals and the terminal ----------------------------------------------------------------------------------------


def test_text_is_printed_without_json(generate):
    code, out, _ = generate("to be", "--backend", "torch", *SHORT)
    assert code == 0
    assert "to be" in out


def test_a_source_without_tokenizer_is_refused(opt_zoo, checkpoint):
    code, out, err = opt_zoo("generate", checkpoint, "to be", "--backend", "torch")
    assert (code, out) == (2, "")
    assert "expected tokenizer.json, or vocab.json and merges.txt" in err


def test_a_source_that_does_not_exist_is_not_taken_for_one_without_tokenizer(opt_zoo):
    code, out, err = opt_zoo("generate", "./no-such-folder", "to be", "--backend", "torch")
    assert (code, out) == (2, "")
    assert "expected a folder or a hub id" in err


def test_more_tokens_than_positions_are_refused(generate):
    code, _, err = generate("to", "--backend", "torch", "--max-new-tokens", 1000)
    assert code == 2
    assert "max_new_tokens: the prompt leaves room for" in err


def test_text_is_printed_as_it_is_without_markup_and_line_breaks(generate, monkeypatch):
    text = "[b]" + "a :heart: b " * 30 + "[/b]"
    monkeypatch.setattr(OPTTokenizer, "decode", lambda self, ids, **options: text)
    code, out, _ = generate("to be", "--backend", "torch", *SHORT)
    assert code == 0
    assert text in out
