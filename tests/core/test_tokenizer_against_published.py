"""The tokenizer against the published one: Hugging Face transformers 4.57.6, and ids that its tests and issues state.

The slow `GPT2Tokenizer` with OPT's settings is the oracle, on the small vocabulary and on OPT's real one. Code points
that Unicode assigned lately are compared too: the two word splitters disagree there, the ids do not.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import OPTTokenizer

OPT_SETTINGS = dict(unk_token="</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>", add_bos_token=True)
BATCH = ["The man turned on the faucet", "water", "", "</s> it's  <pad>x\n"]

# What the word splitter and the special tokens meet in practice, mixed at random.
PIECES = st.sampled_from(
    ["</s>", "<pad>", "<s>", "<unk>", "<mask>", " ", "  ", "\n", "\t", "\r\n", "\xa0", "'s", "'LL", "n't", "the"]
    + [" water", "Hello", "é", "日本", "😀", "👨‍👩‍👧", "12", "½", "...", "!?", "_", "\x00", "\u200b", "ﬁ", "İ"]
    + ["<", "/s>", "Ġ", "Ċ"]
)
MIXED = st.lists(st.one_of(PIECES, st.text(max_size=3))).map("".join)
TEXTS = st.one_of(st.text(), st.lists(PIECES).map("".join), MIXED)
FUZZ = settings(max_examples=300, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def slow_tokenizer(transformers, folder, **options):
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    return transformers.GPT2Tokenizer(*files, errors="replace", **{**OPT_SETTINGS, **options})


@pytest.fixture(scope="module", params=["small", "real"])
def both(request, transformers):
    """The slow published tokenizer and ours, on one vocabulary."""
    folder = request.getfixturevalue("vocab_folder" if request.param == "small" else "real_folder")
    return slow_tokenizer(transformers, folder), OPTTokenizer.from_pretrained(folder)


@given(text=TEXTS)
@FUZZ
def test_ids_and_tokens_equal_the_published(both, text):
    slow, ours = both
    assert ours.encode(text) == slow.encode(text)
    assert ours.tokenize(text) == slow.tokenize(text)


@given(text=TEXTS, skip=st.booleans(), clean=st.booleans())
@FUZZ
def test_decoded_text_equals_the_published(both, text, skip, clean):
    slow, ours = both
    ids = slow.encode(text)
    options = dict(skip_special_tokens=skip, clean_up_tokenization_spaces=clean)
    assert ours.decode(ids, **options) == slow.decode(ids, **options)


@given(data=st.data(), skip=st.booleans())
@FUZZ
def test_decoding_any_ids_equals_the_published(both, data, skip):
    slow, ours = both
    ids = data.draw(st.lists(st.integers(0, len(ours) - 1)))
    assert ours.decode(ids, skip_special_tokens=skip) == slow.decode(ids, skip_special_tokens=skip)
    assert ours.convert_ids_to_tokens(ids) == slow.convert_ids_to_tokens(ids)


@given(first=TEXTS, second=TEXTS, rule=st.sampled_from([True, "only_first", "only_second"]), data=st.data())
@FUZZ
def test_cut_pairs_equal_the_published(both, first, second, rule, data):
    slow, ours = both
    lengths = [len(slow.encode(text)) - 1 for text in (first, second)]
    kept = {True: 0, "only_first": lengths[1] + 1, "only_second": lengths[0] + 1}[rule]
    options = dict(truncation=rule, max_length=2 + kept + data.draw(st.integers(0, 20)))
    assert ours.encode(first, second, **options) == slow.encode(first, second, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(padding=True),
        dict(padding=True, padding_side="left"),
        dict(padding="longest", pad_to_multiple_of=7, padding_side="left"),
        dict(padding="max_length", max_length=23),
        dict(padding="max_length", truncation=True, max_length=5),
        dict(truncation=True, max_length=4),
        dict(max_length=4),
        dict(padding=True, max_length=4),
        dict(add_special_tokens=False, padding=True, return_attention_mask=False),
        dict(),
    ],
    ids=str,
)
def test_batches_equal_the_published(both, options):
    slow, ours = both
    assert ours(BATCH, **options) == dict(slow(BATCH, **options))
    assert ours(BATCH, BATCH[::-1], **options) == dict(slow(BATCH, BATCH[::-1], **options))
    assert ours(BATCH[0], **options) == dict(slow(BATCH[0], **options))


def test_left_truncation_equals_the_published(both):
    slow, ours = both
    slow.truncation_side = ours.truncation_side = "left"
    try:
        for pair in (None, BATCH[3]):
            options = dict(truncation=True, max_length=7)
            assert ours.encode(BATCH[0], pair, **options) == slow.encode(BATCH[0], pair, **options)
    finally:
        slow.truncation_side = ours.truncation_side = "right"


@given(text=TEXTS)
@FUZZ
def test_a_prefix_space_equals_the_published(vocab_folder, transformers, text):
    slow = slow_tokenizer(transformers, vocab_folder, add_prefix_space=True)
    ours = OPTTokenizer.from_pretrained(vocab_folder, add_prefix_space=True)
    assert ours.encode(text) == slow.encode(text)


def test_bytes_outside_the_vocabulary_get_the_published_ids(transformers, tmp_path):
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b", "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    slow, ours = slow_tokenizer(transformers, tmp_path), OPTTokenizer.from_pretrained(tmp_path)
    assert ours.encode("abc é<s>ba") == slow.encode("abc é<s>ba")
    assert ours.encode("cab") == [2, 2, 6]


def test_special_tokens_equal_the_published(both):
    slow, ours = both
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "unk_token_id", "pad_token_id", "special_tokens_map"):
        assert getattr(ours, name) == getattr(slow, name), name
    assert len(ours) == len(slow)
    assert ours.get_vocab() == slow.get_vocab()
    assert ours.convert_tokens_to_ids(["<s>", "no such token"]) == slow.convert_tokens_to_ids(["<s>", "no such token"])


@pytest.mark.parametrize("change", ["none", "no bos", "added", "prefix", "bos"])
@pytest.mark.parametrize("loader", ["AutoTokenizer", "GPT2Tokenizer", "GPT2TokenizerFast"])
def test_saved_files_load_into_transformers(transformers, vocab_folder, tmp_path, change, loader):
    ours = OPTTokenizer.from_pretrained(vocab_folder, padding_side="left", add_prefix_space=change == "prefix")
    if change == "no bos":
        ours.add_bos_token = False
    if change == "added":
        ours.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[A]"]})
    if change == "bos":
        ours.bos_token = "Ġthe"
    ours.save_pretrained(tmp_path)
    theirs = getattr(transformers, loader).from_pretrained(tmp_path)
    # the fast class puts the prefix after each special token too, and not before an empty text
    batch = BATCH[:2] if change == "prefix" else [*BATCH, "[A]b[PAD]"]
    assert dict(theirs(batch, padding=True)) == ours(batch, padding=True)
    assert dict(theirs(batch, batch, padding=True)) == ours(batch, batch, padding=True)
    assert theirs.decode([2, 5, 0], skip_special_tokens=True) == ours.decode([2, 5, 0], skip_special_tokens=True)
    assert theirs.special_tokens_map == {
        **ours.special_tokens_map,
        **({"additional_special_tokens": ["[A]"]} if change == "added" else {}),
    }


@pytest.mark.parametrize(
    ("saver", "legacy"), [("GPT2Tokenizer", None), ("GPT2TokenizerFast", False), ("GPT2TokenizerFast", True)]
)
def test_files_saved_by_transformers_load_here(transformers, vocab_folder, tmp_path, saver, legacy):
    files = str(vocab_folder / "vocab.json"), str(vocab_folder / "merges.txt")
    theirs = getattr(transformers, saver)(*files, **OPT_SETTINGS, padding_side="left", model_max_length=2048)
    theirs.add_special_tokens({"additional_special_tokens": ["[A]"]})
    theirs.save_pretrained(tmp_path, legacy_format=legacy)
    ours = OPTTokenizer.from_pretrained(tmp_path)
    batch = [*BATCH, "[A]b"]
    assert ours(batch, padding=True) == dict(theirs(batch, padding=True))
    assert ours(batch, batch)["input_ids"] == slow_pairs(ours, batch)
    assert (ours.model_max_length, len(ours)) == (2048, len(theirs))


def slow_pairs(tokenizer, texts):
    """[2, A, 2, B], where the published fast class writes [2, A, B]."""
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [[2, *row, 2, *row] for row in rows]


# Ids stated by the published tests, documentation and issues (transformers 4.57.6, metaseq) or computed from the files.
PUBLISHED_IDS = {
    "A photo of a cat": [250, 1345, 9, 10, 4758],
    "Hello world! cécé herlolip": [31414, 232, 328, 740, 1140, 12695, 69, 46078, 1588],
    "I like you.": [100, 101, 47, 4],
    "Hello, I'm am conscious and": [31414, 6, 38, 437, 524, 13316, 8],
    "The man turned on the faucet so the toilet filled with water.": [
        133, 313, 1224, 15, 5, 856, 17527, 594, 98, 5, 11471, 3820, 19, 514, 4,
    ],
    "Hello, my dog is cute": [31414, 6, 127, 2335, 16, 11962],
    "": [],
    "\n": [50118],
    "</s>": [2],
    "<s>": [41552, 29, 15698],
    "Today is a beautiful day and I want": [5625, 16, 10, 2721, 183, 8, 38, 236],
    "Paris is the capital of France and": [32826, 16, 5, 812, 9, 1470, 8],
}  # fmt: skip


@pytest.mark.parametrize("text", PUBLISHED_IDS)
def test_the_real_vocabulary_gives_the_published_ids(real_tokenizer, text):
    assert real_tokenizer.encode(text) == [2, *PUBLISHED_IDS[text]]
    assert real_tokenizer.decode([2, *PUBLISHED_IDS[text]]) == "</s>" + text


def test_the_real_vocabulary_has_the_published_size(real_tokenizer):
    assert len(real_tokenizer) == real_tokenizer.vocab_size == 50265
    assert [real_tokenizer.convert_ids_to_tokens(i) for i in (0, 1, 2, 3, 50260, 50264)] == [
        "<s>", "<pad>", "</s>", "<unk>", "<|endoftext|>", "<mask>",
    ]  # fmt: skip
    assert real_tokenizer.decode(range_of(50265, 50272)) == ""


def range_of(first: int, last: int) -> list[int]:
    return list(range(first, last))


def test_a_bos_changed_after_loading_gives_the_published_ids(real_folder, tmp_path):
    tokenizer = OPTTokenizer.from_pretrained(real_folder)
    tokenizer.bos_token = "bos"
    tokenizer.bos_token_id = tokenizer.get_vocab()["bos"]
    assert tokenizer.encode("A photo of a cat") == [31957, 250, 1345, 9, 10, 4758]
    tokenizer.save_pretrained(tmp_path)
    assert OPTTokenizer.from_pretrained(tmp_path).encode("A photo of a cat") == [31957, 250, 1345, 9, 10, 4758]
