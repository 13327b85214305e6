"""The training scripts of `examples/`: windows that count each token once, training that learns, files that load."""

import copy
import dataclasses
import importlib
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from opt_core import OPTConfig, OPTTokenizer
from opt_torch import OPTForCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"
TEXT = "".join(f"{a}{b} {b} the {a} of {b}\n" for a in "bcdfghklmnprst" for b in ("all", "ell", "ill", "oll", "ull"))
LENGTH = 11
SIZES = dict(
    vocab_size=53,
    hidden_size=3 * 7,
    num_attention_heads=3,
    ffn_dim=31,
    num_hidden_layers=2,
    max_position_embeddings=LENGTH,
)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("train_tiny_opt")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**SIZES))


def cycle_of_ids(count: int) -> torch.Tensor:
    """A text that is easy to learn: each id is followed by the same other one."""
    return 4 + torch.arange(count) * 5 % 17


def test_each_target_is_predicted_from_the_token_before_it(script):
    targets_BT = torch.arange(4, 4 + 2 * LENGTH).view(2, LENGTH)
    inputs_BT = script.make_inputs(targets_BT, bos_token_id=2)
    assert inputs_BT[:, 0].tolist() == [2, 2]
    assert inputs_BT[:, 1:].tolist() == targets_BT[:, :-1].tolist()


@pytest.mark.parametrize("count", [1, LENGTH - 1, LENGTH, LENGTH + 1, 7 * LENGTH + 3])
def test_consecutive_windows_hold_each_token_once_and_in_order(script, count):
    ids = cycle_of_ids(count)
    windows = script.consecutive_windows(ids, LENGTH)
    assert windows[windows != -100].tolist() == ids.tolist()
    assert windows.shape == (math.ceil(count / LENGTH), LENGTH)


def test_a_pass_of_shuffled_windows_shows_no_token_twice(script):
    ids = torch.arange(13 * LENGTH)
    first_pass = torch.cat(list(islice(script.shuffled_windows(ids, LENGTH, 5, seed=3), 3))).flatten().tolist()
    assert len(first_pass) == len(set(first_pass)) >= 12 * LENGTH
    assert first_pass != sorted(first_pass)


def test_the_loss_of_a_text_is_that_of_its_windows_whatever_the_batch(script, model):
    ids = cycle_of_ids(3 * LENGTH + 4)
    model.eval()
    with torch.no_grad():
        total = sum(script.window_loss(model, row[None]).item() * len(row) for row in ids.split(LENGTH))
    for batch_size in (1, 3, 8):
        loss = script.text_loss(model, ids, text_bytes=100, batch_size=batch_size)
        assert loss.nats_per_token == pytest.approx(total / len(ids), rel=1e-5)
        assert loss.bits_per_byte == pytest.approx(total / math.log(2) / 100, rel=1e-5)


def test_every_position_is_trained(script, model):
    script.window_loss(model, cycle_of_ids(LENGTH)[None]).backward()
    trained = model.model.decoder.embed_positions.weight.grad.abs().sum(1) > 0
    assert trained.tolist() == [False] * 2 + [True] * LENGTH


def test_weight_decay_spares_norms_and_biases(script, model):
    decayed, spared = script.make_optimizer(model, script.Recipe()).param_groups
    assert decayed["weight_decay"] > 0 == spared["weight_decay"]
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("bias") or "layer_norm" in names[id(p)] for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_the_rate_rises_to_its_peak_and_falls_to_its_share(script):
    recipe = script.Recipe(steps=41, warm_up=7, peak_rate=3.0, final_share=0.1)
    rates = [script.learning_rate(step, recipe) for step in range(recipe.steps + 1)]
    assert rates[:8] == sorted(rates[:8])
    assert rates[7:] == sorted(rates[7:], reverse=True)
    assert max(rates) == 3.0
    assert rates[-1] == pytest.approx(0.3)


def test_training_lowers_the_loss_and_repeats_itself(script, model):
    recipe = script.Recipe(steps=60, batch_size=4, warm_up=5, peak_rate=1e-2, evaluate_every=20)
    ids, again = cycle_of_ids(20 * LENGTH), copy.deepcopy(model)
    before = script.text_loss(model, ids, 1).nats_per_token
    losses, _ = script.train(model, ids, recipe, lambda model: script.text_loss(model, ids, 1).nats_per_token)
    assert script.text_loss(model, ids, 1).nats_per_token < 1 < before - 2
    assert script.train(again, ids, recipe, lambda model: 0.0)[0] == losses


def test_training_keeps_the_weights_of_the_best_evaluation(script, model):
    seen, scores = [], iter([3.0, 1.0, 2.0])

    def evaluate(model):
        seen.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    recipe = script.Recipe(steps=6, batch_size=2, warm_up=1, evaluate_every=2)
    _, evaluations = script.train(model, cycle_of_ids(9 * LENGTH), recipe, evaluate)
    assert evaluations == [(2, 3.0), (4, 1.0), (6, 2.0)]
    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, seen[1][name]), name
    assert any(not torch.equal(seen[1][name], seen[2][name]) for name in seen[1])


def test_a_training_that_never_gives_a_finite_loss_is_an_error(script, model):
    with pytest.raises(FloatingPointError, match="peak rate"):
        script.train(model, cycle_of_ids(9 * LENGTH), script.Recipe(steps=2), lambda model: math.nan)


def test_the_unigram_loss_is_the_entropy_of_frequencies(script):
    ids = torch.arange(8).repeat(1000)
    assert script.unigram_loss(ids, ids, vocab_size=8) == pytest.approx(math.log(8), rel=1e-6)


def test_the_trained_tokenizer_has_the_published_special_ids_and_loses_nothing(script):
    tokenizer = script.train_tokenizer(TEXT, 4 + 256 + 29)
    vocab = tokenizer.get_vocab()
    assert [vocab[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert len(vocab) == 4 + 256 + 29
    assert tokenizer.decode(tokenizer(TEXT, add_special_tokens=False).input_ids) == TEXT
    assert len(tokenizer(TEXT).input_ids) < len(TEXT) / 1.5


@pytest.mark.parametrize("name", ["opt-tiny", "opt-tiny-350m-style"])
def test_the_script_writes_a_folder_that_loads_and_says_how_it_was_made(script, tmp_path, name):
    recipe = script.Recipe(steps=2, batch_size=1, warm_up=1, evaluate_every=1)
    script.make_checkpoint(TEXT, name, tmp_path / name, recipe, "python the-command")
    model = OPTForCausalLM.from_pretrained(tmp_path / name)
    expected = OPTConfig(**script.SHARED, **script.MODELS[name], torch_dtype="float16")
    assert dataclasses.asdict(model.config) == dataclasses.asdict(expected)
    card = (tmp_path / name / "README.md").read_text()
    tokenizer = OPTTokenizer.from_pretrained(tmp_path / name)
    held_out = script.split_text(TEXT)[1]
    ids = torch.tensor(tokenizer(held_out, add_special_tokens=False).input_ids)
    stored = script.text_loss(model, ids, len(held_out))
    assert f"float16 | {stored.nats_per_token:.4f} | {stored.bits_per_byte:.4f} |" in card
    assert "python the-command" in card
