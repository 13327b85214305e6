"""`opt-zoo generate`."""

import json

from opt_core import OPTTokenizer

SHORT = ["--max-new-tokens", 7]


def test_a_backend_continues_the_prompt(backend, opt_zoo, checkpoint_with_tokenizer):
    code, out, _ = opt_zoo("generate", checkpoint_with_tokenizer, "to be", "--backend", backend.name, *SHORT, "--json")
    report = json.loads(out)
    (text,) = report["texts"]
    prompt = OPTTokenizer.from_pretrained(checkpoint_with_tokenizer).encode("to be")
    assert (code, text["backend"], text["new_tokens"]) == (0, backend.name, 7)
    assert text["tokens"][: len(prompt)] == prompt
    assert text["text"].startswith("to be")


def test_all_backends_write_the_same(backends, opt_zoo, checkpoint_with_tokenizer, monkeypatch):
    names = [backend.name for backend in backends]
    monkeypatch.setattr("opt_zoo.generating.installed_backends", lambda: names)
    code, out, _ = opt_zoo("generate", checkpoint_with_tokenizer, "or not", "--backend", "all", *SHORT, "--json")
    report = json.loads(out)
    assert code == 0
    assert [text["backend"] for text in report["texts"]] == names
    assert report["equal"]


def test_text_is_printed_without_json(opt_zoo, checkpoint_with_tokenizer):
    code, out, _ = opt_zoo("generate", "to be", "--model", checkpoint_with_tokenizer, "--backend", "torch", *SHORT)
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


def test_more_tokens_than_positions_are_refused(opt_zoo, checkpoint_with_tokenizer):
    code, _, err = opt_zoo("generate", checkpoint_with_tokenizer, "to", "--backend", "torch", "--max-new-tokens", 1000)
    assert code == 2
    assert "max_new_tokens: the prompt leaves room for" in err


def test_text_is_printed_as_it_is_without_markup_and_line_breaks(opt_zoo, checkpoint_with_tokenizer, monkeypatch):
    text = "[b]" + "a :heart: b " * 30 + "[/b]"
    monkeypatch.setattr(OPTTokenizer, "decode", lambda self, ids, **options: text)
    code, out, _ = opt_zoo("generate", checkpoint_with_tokenizer, "to be", "--backend", "torch", *SHORT)
    assert code == 0
    assert text in out
