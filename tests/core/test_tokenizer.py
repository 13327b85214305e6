"""The laws of the tokenizer: round trips, padding, cutting, arrays of each framework, and clear refusals."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opt_core import OPTTokenizer
from opt_core import batch_encoding as batching
from opt_core.batch_encoding import BatchEncoding
from opt_core.errors import InputError

TEXTS = ["The man", "The man turned on the faucet", "", "water"]
FRAMEWORKS_OF_BACKEND = {"torch": ["pt"], "tf": ["tf"], "flax": ["jax", "flax"]}
MODULES = {"np": "numpy", "pt": "torch", "tf": "tensorflow", "jax": "jax", "flax": "jax"}


def pytest_generate_tests(metafunc):
    if "framework" in metafunc.fixturenames:
        names = metafunc.config.getoption("--backends").split(",")
        metafunc.parametrize("framework", ["np", *(f for name in names for f in FRAMEWORKS_OF_BACKEND[name])])


@given(text=st.text())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_decoding_undoes_encoding(vocab_folder, text):
    tokenizer = _shared(vocab_folder)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


_loaded: dict = {}


def _shared(folder) -> OPTTokenizer:
    if folder not in _loaded:
        _loaded[folder] = OPTTokenizer.from_pretrained(folder)
    return _loaded[folder]


def test_special_ids_are_those_of_opt(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id) == (
        2,
        2,
        2,
        1,
    )
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("</s>", "<pad>")
    assert sorted(tokenizer.all_special_ids) == [1, 2]
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab()) == 503


def test_only_end_and_padding_are_special_in_text(tokenizer):
    assert tokenizer.encode("</s><pad>") == [2, 2, 1]
    assert 0 not in tokenizer.encode("<s>")
    assert tokenizer.decode([2, 0, 3, 1], skip_special_tokens=True) == "<s><unk>"


def test_a_pair_has_bos_before_each_part(tokenizer):
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:2])
    assert tokenizer.encode(*TEXTS[:2]) == [2, *first, 2, *second]
    assert tokenizer(TEXTS, TEXTS)["input_ids"][1] == [2, *second, 2, *second]
    assert tokenizer.num_special_tokens_to_add(pair=True) == 2


def test_add_bos_token_takes_effect_after_construction(tokenizer):
    with_bos = tokenizer.encode("water")
    tokenizer.add_bos_token = False
    assert tokenizer.encode("water") == with_bos[1:]
    tokenizer.add_bos_token = True
    assert tokenizer.encode("water") == with_bos


def test_a_changed_bos_takes_effect(tokenizer):
    tokenizer.bos_token = "Ġthe"
    assert tokenizer.encode("water")[0] == tokenizer.get_vocab()["Ġthe"] != 2
    tokenizer.bos_token_id = 0
    assert (tokenizer.bos_token, tokenizer.encode("water")[0]) == ("<s>", 0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_adds_nothing_but_masked_ids_on_one_side(tokenizer, side):
    alone = [tokenizer.encode(text) for text in TEXTS]
    padded = tokenizer(TEXTS, padding=True, padding_side=side)
    width = max(map(len, alone))
    for row, ids, mask in zip(alone, padded.input_ids, padded.attention_mask, strict=True):
        gap = width - len(row)
        assert ids == ([1] * gap + row if side == "left" else row + [1] * gap)
        assert mask == ([0] * gap + [1] * len(row) if side == "left" else [1] * len(row) + [0] * gap)


def test_the_side_of_padding_is_set_at_loading_and_later(vocab_folder):
    tokenizer = OPTTokenizer.from_pretrained(vocab_folder, padding_side="left")
    assert tokenizer(TEXTS, padding=True)["input_ids"][2][0] == 1
    tokenizer.padding_side = "right"
    assert tokenizer(TEXTS, padding=True)["input_ids"][2][0] == 2


@pytest.mark.parametrize(
    ("options", "width"),
    [
        (dict(padding="max_length", max_length=17), 17),
        (dict(padding="max_length", max_length=17, pad_to_multiple_of=5), 20),
        (dict(padding="longest", truncation=True, max_length=3), 3),
        (dict(padding=True, truncation="only_first", max_length=6, pad_to_multiple_of=3), 6),
    ],
)
def test_rows_have_the_width_asked_for(tokenizer, options, width):
    assert {len(row) for row in tokenizer(TEXTS, **options)["input_ids"]} == {width}


def test_cutting_keeps_bos_and_one_end_of_the_text(tokenizer):
    whole = tokenizer.encode(TEXTS[1])
    assert tokenizer.encode(TEXTS[1], truncation=True, max_length=4) == whole[:4]
    assert tokenizer.encode(TEXTS[1], max_length=4) == whole[:4]
    assert tokenizer.encode(TEXTS[1], truncation=False, max_length=4) == whole
    assert tokenizer.encode(TEXTS[1], truncation=True, max_length=1) == [2]
    tokenizer.truncation_side = "left"
    assert tokenizer.encode(TEXTS[1], truncation=True, max_length=4) == [2, *whole[-3:]]


def test_cutting_without_a_length_cuts_nothing_and_says_so(tokenizer, caplog):
    assert tokenizer.encode(TEXTS[1], truncation=True) == tokenizer.encode(TEXTS[1])
    assert "nothing is cut" in caplog.text
    tokenizer.model_max_length = 5
    assert len(tokenizer.encode(TEXTS[1], truncation=True)) == 5


def test_arrays_hold_what_the_lists_hold(tokenizer, framework):
    lists = tokenizer(TEXTS, padding=True)
    arrays = tokenizer(TEXTS, padding=True, return_tensors=framework)
    for name, values in arrays.items():
        assert type(values).__module__.partition(".")[0] in (MODULES[framework], "jaxlib")
        assert np.asarray(values).dtype == ("int64" if framework in ("np", "pt") else "int32")
        np.testing.assert_array_equal(np.asarray(values), lists[name])


def test_one_text_as_an_array_is_a_batch_of_one(tokenizer, framework):
    assert tokenizer("water", return_tensors=framework)["input_ids"].shape[0] == 1
    empty = tokenizer("", add_special_tokens=False, return_tensors=framework)["input_ids"]
    assert tuple(empty.shape) == (1, 0)
    assert tuple(tokenizer([], return_tensors=framework)["input_ids"].shape) == (0, 0)


def test_decoding_takes_arrays(tokenizer, framework):
    ids = tokenizer(TEXTS, padding=True, return_tensors=framework)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == TEXTS
    assert tokenizer.batch_decode(list(ids), skip_special_tokens=True) == TEXTS
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == TEXTS[0]
    assert tokenizer.decode(list(ids[0]), skip_special_tokens=True) == TEXTS[0]


def test_a_missing_framework_is_named_with_its_extra(tokenizer, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(batching.importlib, "import_module", missing)
    with pytest.raises(
        ImportError, match=r"return_tensors='tf': tensorflow is not installed; pip install opt-zoo\[tf\]"
    ):
        tokenizer("water", return_tensors="tf")


def test_an_encoding_is_a_mapping_with_attributes(tokenizer):
    encoding = tokenizer("water")
    assert dict(**encoding) == encoding
    assert list(encoding) == list(encoding.keys()) == ["input_ids", "attention_mask"]
    assert encoding.input_ids == encoding["input_ids"]
    with pytest.raises(AttributeError, match="no entry 'labels'; it has input_ids, attention_mask"):
        _ = encoding.labels
    assert copy.deepcopy(encoding) == pickle.loads(pickle.dumps(encoding)) == encoding


def test_to_moves_torch_tensors_and_leaves_the_rest(tokenizer, framework):
    encoding = BatchEncoding(tokenizer("water", return_tensors=framework), label="water")
    before = encoding["input_ids"]
    assert encoding.to("meta" if framework == "pt" else "cuda") is encoding
    assert encoding["label"] == "water"
    if framework == "pt":
        assert encoding["input_ids"].device.type == "meta"
    else:
        assert encoding["input_ids"] is before


def test_without_the_mask_there_is_none(tokenizer):
    assert list(tokenizer("water", return_attention_mask=False)) == ["input_ids"]


def test_rows_of_an_embedding_without_a_token_decode_to_nothing(tokenizer):
    assert tokenizer.decode([503, *tokenizer.encode("water", add_special_tokens=False), 511]) == "water"
    assert tokenizer.convert_ids_to_tokens([503, 1]) == [None, "<pad>"]


@pytest.mark.parametrize("ids", [[4, 512, 600], [-100], [2**40]])
def test_ids_beyond_the_vocabulary_are_listed(tokenizer, ids):
    with pytest.raises(InputError, match=str(ids[-1])):
        tokenizer.decode(ids)


@pytest.mark.parametrize("ids", [[1.0], ["a"], "water", None, [[1, 2]], [True]])
def test_decoding_refuses_what_is_no_row_of_ids(tokenizer, ids):
    with pytest.raises(InputError, match="expected an integer or one row of integers"):
        tokenizer.decode(ids)


def test_cleaning_up_is_off_unless_asked_for(tokenizer):
    ids = tokenizer.encode("Hello , i 'm .", add_special_tokens=False)
    assert tokenizer.decode(ids) == "Hello , i 'm ."
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=True) == "Hello, i'm."


def test_added_tokens_extend_the_vocabulary(tokenizer):
    assert tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[A]"]}) == 2
    assert tokenizer.add_tokens(["[B]", "[A]"]) == 1
    assert (tokenizer.pad_token_id, len(tokenizer), tokenizer.vocab_size) == (503, 506, 503)
    assert tokenizer.encode("[A][B]") == [2, 504, 505]
    assert tokenizer.decode([504, 505], skip_special_tokens=True) == "[B]"


def test_an_unknown_token_has_the_id_of_unk(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<s>", "no such token"]) == [0, 2]
    assert tokenizer.convert_ids_to_tokens(2) == "</s>"
    assert tokenizer.convert_ids_to_tokens([2, 0, 1], skip_special_tokens=True) == ["<s>"]


def test_a_tokenizer_can_be_copied_and_sent_to_a_process(tokenizer):
    tokenizer.bos_token = "<s>"
    for copied in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert copied(TEXTS) == tokenizer(TEXTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(padding="long"), "padding: expected one of"),
        (dict(padding=1), "padding: expected one of"),
        (dict(truncation=["only_first"]), "truncation: expected one of"),
        (dict(padding_side="middle"), "padding_side: expected one of 'left', 'right', got 'middle'"),
        (dict(max_length=0), "max_length: expected a positive integer or None, got 0"),
        (dict(pad_to_multiple_of=2.0), "pad_to_multiple_of: expected a positive integer"),
        (dict(padding="max_length"), "max_length: expected a length for padding='max_length'"),
        (dict(padding=True, truncation=True, max_length=5, pad_to_multiple_of=3), "expected a multiple of"),
        (dict(truncation="only_second", max_length=1), "max_length: expected room for the 1 added ids"),
        (dict(return_tensors="mx"), "return_tensors: expected one of"),
        (dict(return_tensors="np"), "padding: expected True or 'max_length'"),
        (dict(text_pair=["one"]), r"text_pair: expected a pair for each text \(4\), got 1"),
    ],
)
def test_wrong_arguments_are_named(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        tokenizer(TEXTS, **options)


def test_all_wrong_arguments_are_reported_at_once(tokenizer):
    with pytest.raises(InputError) as caught:
        tokenizer(TEXTS, padding="long", max_length=-1)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "text: expected a string or a list of strings, got NoneType"),
        (["a", 3], r"text\[1\]: expected a string, got int"),
        (["a", "b\ud800"], r"text\[1\]: expected valid Unicode, got the lone surrogate '\\ud800' at position 1"),
    ],
)
def test_wrong_texts_are_named(tokenizer, text, message):
    with pytest.raises(InputError, match=message):
        tokenizer(text)


def test_padding_without_a_pad_token_is_refused(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="pad_token: expected one for padding"):
        tokenizer(TEXTS, padding=True)


def test_a_role_needs_a_token_of_the_vocabulary(tokenizer):
    with pytest.raises(InputError, match=r"pad_token: expected an entry of the vocabulary, got '\[PAD\]'"):
        tokenizer.pad_token = "[PAD]"
    with pytest.raises(InputError, match="pad_token_id: expected the id of a token, got 503"):
        tokenizer.pad_token_id = 503
    assert tokenizer.pad_token == "<pad>"
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="bos_token: expected one for add_bos_token=True"):
        tokenizer("water")


def test_unknown_keywords_are_type_errors(tokenizer, vocab_folder):
    with pytest.raises(TypeError, match="paddding"):
        tokenizer("water", paddding=True)
    with pytest.raises(TypeError, match="add_bos; known settings"):
        OPTTokenizer.from_pretrained(vocab_folder, add_bos=True)


def test_importing_the_tokenizer_imports_no_array_library():
    heavy = {"numpy", "torch", "tensorflow", "jax", "transformers"}
    code = f"import sys, opt_core.tokenizer; print({heavy} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
