"""Checks of published results: each loads a checkpoint by its name and compares what it gives with what is expected.

Rows of padding are not compared: the published ones hold what the attention of a padding token to all tokens gives;
here they are zero. `hub` are arguments of `from_pretrained`.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from opt_core import OPTTokenizer

PUBLISHED = json.loads(Path(__file__).with_name("published_expected.json").read_text(encoding="utf-8"))


def load(backend, expected, task="causal-lm", **options):
    return backend.model_class(task).from_pretrained(expected["model"], **options)


def tokenizer_of(expected, **options) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(expected["model"], **options)


def texts_of(backend, tokenizer, model, prompts, **options) -> list[str]:
    encoded = tokenizer(prompts, return_tensors="np", padding=True, padding_side="left")
    generated = backend.numpy(model.generate(encoded.input_ids, encoded.attention_mask, **options))
    return tokenizer.batch_decode(generated, skip_special_tokens=True)


def check_hidden_states(backend, expected, **hub):
    out = load(backend, expected, "base", **hub)(np.array(expected["input_ids"]))
    assert list(out.last_hidden_state.shape) == expected["last_hidden_state_shape"]
    values, atol = expected["torch"]["values"], expected["torch"]["atol"]
    np.testing.assert_allclose(backend.numpy(out.last_hidden_state)[0, :3, :3], values, rtol=0, atol=atol)


def check_mean_logits(backend, expected, **hub):
    """Right-padded, without the token that begins a text."""
    encoded = tokenizer_of(expected, **hub)(
        expected["prompts"], padding=True, add_special_tokens=False, return_tensors="np"
    )
    mask = encoded.attention_mask
    means = backend.numpy(load(backend, expected, **hub)(encoded.input_ids, mask).logits).mean(-1)
    assert list(mask.shape) == list(np.shape(expected["values"]))
    real = mask == 1
    np.testing.assert_allclose(means[real], np.array(expected["values"])[real], rtol=0, atol=expected["atol"])
    assert not means[~real].any()


def check_greedy_texts(backend, expected, **hub):
    """One prompt at a time."""
    model, tokenizer = load(backend, expected, **hub), tokenizer_of(expected, **hub)
    texts = [texts_of(backend, tokenizer, model, [prompt], max_length=10)[0] for prompt in expected["prompts"]]
    assert texts == expected["outputs"]


def check_left_padded_batch(backend, expected, **hub):
    model, tokenizer = load(backend, expected, **hub), tokenizer_of(expected, **hub)
    assert texts_of(backend, tokenizer, model, expected["prompts"], max_length=20) == expected["outputs"]


def check_docstring(backend, expected, **hub):
    model, tokenizer = load(backend, expected, **hub), tokenizer_of(expected, **hub)
    assert texts_of(backend, tokenizer, model, [expected["prompt"]], max_length=30) == [expected["output"]]


def check_float16(backend, expected, **hub):
    encoded = tokenizer_of(expected, **hub)(expected["prompts"], padding=True, padding_side="left", return_tensors="np")
    assert not encoded.attention_mask.all()
    logits = load(backend, expected, dtype="float16", **hub)(encoded.input_ids, encoded.attention_mask).logits
    assert backend.dtype_of(logits) == "float16"
    assert np.isfinite(backend.numpy(logits)).all()


def check_loss(backend, expected, **hub):
    ids = tokenizer_of(expected, **hub)([expected["prompt"]], return_tensors="np").input_ids
    assert ids.shape == (1, expected["n_tokens_with_bos"])
    out = load(backend, expected, **hub)(ids, labels=ids)
    logits = backend.numpy(out.logits)[0]
    log_probabilities = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_probabilities -= logits.max(-1, keepdims=True)
    assert logits.argmax(-1).tolist() == expected["argmax_ids"]
    np.testing.assert_allclose(log_probabilities.max(-1), expected["argmax_logprob"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(backend.numpy(out.loss), expected["cross_entropy_loss"], rtol=0, atol=1e-4)


def check_ids(backend, expected, **hub):
    assert tokenizer_of(expected, **hub)(expected["text"])["input_ids"] == expected["ids"]


def check_generated_ids(backend, expected, **hub):
    model, tokenizer = load(backend, expected, **hub), tokenizer_of(expected, padding_side="left", **hub)
    for case in (expected["single"], expected["batch"]):
        encoded = tokenizer(case["text"], padding=True, return_tensors="np")
        generated = backend.numpy(model.generate(encoded.input_ids, encoded.attention_mask, max_length=10))
        assert generated.tolist() == case["ids"]


CHECKS: dict[str, Callable] = {
    "hidden_350m": check_hidden_states,
    "logits_mean_350m": check_mean_logits,
    "greedy_125m": check_greedy_texts,
    "greedy_350m": check_greedy_texts,
    "left_padded_batch_350m": check_left_padded_batch,
    "docstring_350m": check_docstring,
    "fp16_left_padded_1.3b": check_float16,
    "loss_125m": check_loss,
    "tokenizer_350m": check_ids,
    "tokenizer_1.3b": check_ids,
    "tiny_random": check_generated_ids,
}
