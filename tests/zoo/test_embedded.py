"""The embedded checkpoints: small enough, trained, and the same model and tokenizer in Hugging Face transformers."""

import math

import numpy as np
import pytest
import torch

from opt_core import OPTConfig, OPTTokenizer
from opt_torch import OPTForCausalLM
from opt_zoo.embedded import NAMES, embedded_folder

# Sonnet 18: of the author whose plays the models were trained on, and in none of these plays.
SONNET = """\
Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date:
"""
SONNET_BOUND = 5.2  # nats per token; ln(2048) = 7.6
MORE_TEXTS = ("", "\n", "ROMEO:\nWhat?", "  two  spaces", "naïve 漢字 🙂", "a</s>b<pad>", "1234 <s> <unk>")
TOKENIZER_FILES = {"vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=NAMES)
def folder(request):
    return embedded_folder(request.param)


@pytest.fixture
def tokenizer(folder):
    return OPTTokenizer.from_pretrained(folder)


@pytest.fixture
def model(folder):
    return OPTForCausalLM.from_pretrained(folder)


def sonnet_ids(tokenizer: OPTTokenizer) -> torch.Tensor:
    return torch.tensor([tokenizer(SONNET).input_ids])


def test_each_folder_holds_a_whole_checkpoint_with_tokenizer_and_card(folder):
    assert {path.name for path in folder.iterdir()} == TOKENIZER_FILES | {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_together_they_take_at_most_10_mb():
    sizes = [path.stat().st_size for name in NAMES for path in embedded_folder(name).iterdir()]
    assert sum(sizes) <= 10_000_000


def test_the_weights_are_stored_in_float16_as_the_published_ones(folder):
    assert OPTForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.float16
    assert OPTConfig.from_json(folder).torch_dtype == "float16"


def test_one_is_pre_norm_and_one_in_the_style_of_350m():
    pre_norm, style_350m = (OPTConfig.from_json(embedded_folder(name)) for name in NAMES)
    assert pre_norm.has_final_layer_norm
    assert not pre_norm.has_projections
    assert not style_350m.do_layer_norm_before
    assert style_350m.has_projections
    assert embedded_folder() == embedded_folder(NAMES[0])


def test_a_name_that_is_none_of_them_is_refused():
    with pytest.raises(KeyError, match="opt-tiny-350m-style"):
        embedded_folder("opt-125m")


def test_the_loss_on_an_unseen_sonnet_is_far_below_chance(model, tokenizer):
    ids_BT = sonnet_ids(tokenizer)
    loss = model(ids_BT, labels=ids_BT).loss.item()
    assert loss < SONNET_BOUND < math.log(model.config.vocab_size) - 2


def test_a_shuffled_sonnet_is_less_likely(model, tokenizer):
    ids_BT = sonnet_ids(tokenizer)
    order = 1 + np.random.default_rng(0).permutation(ids_BT.shape[1] - 1)
    shuffled_BT = torch.cat([ids_BT[:, :1], ids_BT[:, order]], dim=1)
    assert model(shuffled_BT, labels=shuffled_BT).loss > model(ids_BT, labels=ids_BT).loss + 1


def test_late_positions_are_trained_as_well_as_early_ones(model, tokenizer):
    ids = tokenizer(SONNET, add_special_tokens=False).input_ids
    last = model.config.max_position_embeddings - len(ids) - 1
    ids_BT = torch.tensor([[2, *ids]])
    losses = [
        model(ids_BT, labels=ids_BT, position_ids=torch.arange(start, start + len(ids) + 1)[None]).loss.item()
        for start in (0, last)
    ]
    assert losses[1] < losses[0] + 0.5


def test_200_tokens_can_be_generated_and_are_the_same_with_left_padding(model, tokenizer):
    prompts = ["ROMEO:", "My lord, the king commands that you\n"]
    tokenizer.padding_side = "left"
    together = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=200)
    alone = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=200)
    assert together[0, -200:].tolist() == alone[0, -200:].tolist()
    assert len(set(together[0, -200:].tolist())) > 10  # it repeats itself, but is not stuck on one token


def test_transformers_computes_the_same_logits(folder, model, tokenizer):
    transformers = pytest.importorskip("transformers")
    published = transformers.OPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids_BT = sonnet_ids(tokenizer).repeat(1, 5)[:, : model.config.max_position_embeddings]
    assert ids_BT.shape[1] == model.config.max_position_embeddings
    with torch.no_grad():
        theirs, ours = published(ids_BT).logits[0].double(), model(ids_BT).logits[0].double()
    worst = ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max()
    assert worst < 64 * 2**-24


def test_transformers_finds_all_weights_and_no_others(folder):
    transformers = pytest.importorskip("transformers")
    _, info = transformers.OPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_the_special_tokens_have_the_published_ids(model, tokenizer):
    assert [tokenizer.get_vocab()[token] for token in ("<s>", "<pad>", "</s>", "<unk>")] == [0, 1, 2, 3]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("").input_ids == [model.config.bos_token_id] == [model.config.eos_token_id]
    assert tokenizer.pad_token_id == model.config.pad_token_id == 1


@pytest.mark.parametrize("text", [SONNET, *MORE_TEXTS])
def test_text_comes_back_from_its_ids(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", "AutoTokenizer"])
def test_the_tokenizers_of_transformers_agree(folder, tokenizer, kind):
    transformers = pytest.importorskip("transformers")
    published = getattr(transformers, kind).from_pretrained(folder)
    for text in (SONNET, *MORE_TEXTS):
        assert published(text).input_ids == tokenizer(text).input_ids, text


def test_the_tokenizer_compresses_the_language_it_learnt(tokenizer):
    assert len(SONNET) / len(tokenizer(SONNET).input_ids) > 2
