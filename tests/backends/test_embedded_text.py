"""200 tokens of the embedded checkpoints in every backend, greedy and sampled: the same ones, padded on the left."""

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF

from opt_core import OPTTokenizer
from opt_core.reference import Reference
from opt_zoo.embedded import NAMES, embedded_folder

PROMPTS = [
    "ROMEO:",
    "First Citizen:\nWe are accounted poor citizens, the",
    "The king is dead, and all the lords of England come to",
    "O, what a",
    "MENENIUS:",
]
NEW_TOKENS = 200


@pytest.fixture(scope="module", params=NAMES)
def prompts(request):
    """A checkpoint's folder, and its tokens and mask of the prompts, padded on the left."""
    tokenizer = OPTTokenizer.from_pretrained(embedded_folder(request.param))
    inputs = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="np")
    assert not inputs["attention_mask"].all()
    return embedded_folder(request.param), inputs["input_ids"], inputs["attention_mask"]


def test_greedy_text_is_the_same_in_every_backend_but_for_ties(backends, prompts):
    folder, ids, mask = prompts
    models = [backend.model_class().from_pretrained(folder) for backend in backends]
    texts = [
        backend.numpy(model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS))
        for backend, model in zip(backends, models, strict=True)
    ]
    truth = reference_logits(backends[0], models[0], texts[0], mask)
    for text in texts:
        assert text.shape == (len(PROMPTS), ids.shape[1] + NEW_TOKENS)
        for row in range(len(PROMPTS)):
            differs = np.flatnonzero(text[row] != texts[0][row])
            step = differs[0] - ids.shape[1] if differs.size else NEW_TOKENS
            assert (tie_margins(truth[row, :step], text[row, ids.shape[1] :][:step]) == 0).all()
            if differs.size:  # both choices must tie; what follows them is another text
                assert tie_margins(truth[row, step : step + 1], text[row, differs[:1]]) == 0


SAMPLING = {
    "all tokens": {},
    "top-k and top-p": dict(temperature=0.9, top_k=50, top_p=0.95),
}


@pytest.mark.slow
@pytest.mark.parametrize("options", SAMPLING.values(), ids=SAMPLING)
def test_a_seed_gives_one_text_in_every_backend(backends, prompts, options):
    folder, ids, mask = prompts
    rows = np.arange(8) % len(PROMPTS)
    texts = [
        backend.numpy(
            backend.model_class()
            .from_pretrained(folder)
            .generate(ids[rows], mask[rows], max_new_tokens=NEW_TOKENS, do_sample=True, seed=20261123, **options)
        )
        for backend in backends
    ]
    assert texts[0].shape == (8, ids.shape[1] + NEW_TOKENS)
    assert len({row.tobytes() for row in texts[0]}) == 8
    assert all(np.array_equal(text, texts[0]) for text in texts)


def reference_logits(backend, model, text, mask):
    """The float64 logits [B, n, V] that decided each new token of `text`."""
    from opt_core.schema import shapes

    weights = {name: backend.numpy(model.weight(name)) for name in shapes(model.config)}
    reference = Reference(model.config, weights)
    whole = np.concatenate([mask, np.ones((len(text), NEW_TOKENS), int)], axis=1)
    hidden = reference(text[:, :-1], whole[:, :-1]).last_hidden_state
    return reference.logits(hidden[:, -NEW_TOKENS:])


def tie_margins(logits_nV, chosen_n):
    """How far each chosen token lies below the best one, 0 within the bound on logits."""
    best_n = logits_nV.max(-1)
    slack_n = 2 * BOUND["float32"] * ROUNDOFF["float32"] * np.linalg.norm(logits_nV, axis=-1)
    below_n = best_n - np.take_along_axis(logits_nV, chosen_n[:, None], axis=1)[:, 0]
    return np.where(below_n <= slack_n, 0, below_n)


def test_a_left_padded_prompt_continues_as_it_does_alone(backend, prompts):
    folder, ids, mask = prompts
    model = backend.model_class().from_pretrained(folder)
    together = backend.numpy(model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS))
    alone = backend.numpy(model.generate(ids[:1, mask[0] == 1], max_new_tokens=NEW_TOKENS))
    np.testing.assert_array_equal(together[0, -NEW_TOKENS:], alone[0, -NEW_TOKENS:])
