"""Loading and saving a tokenizer: every form of its files, round trips, and damage that is named."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from opt_core import OPTTokenizer
from opt_core.tokenizer import TokenizerError

TEXTS = ["The man", " water</s>in <pad> the\n\nyear", "naïve 你好 😀", ""]


@pytest.fixture
def folder(vocab_folder, tmp_path):
    """A copy of the small tokenizer's folder that a test may damage."""
    return shutil.copytree(vocab_folder, tmp_path / "copy")


def same(first: OPTTokenizer, second: OPTTokenizer) -> bool:
    state = [
        (t.special_tokens_map, t.get_vocab(), t.padding_side, t.add_bos_token, t(TEXTS, TEXTS)) for t in (first, second)
    ]
    return state[0] == state[1]


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_saving_and_loading_is_the_identity(tokenizer, tmp_path):
    tokenizer.padding_side, tokenizer.model_max_length = "left", 61
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "additional_special_tokens": ["[A]"]})
    tokenizer.add_tokens("[B]")
    tokenizer.save_pretrained(tmp_path)
    loaded = OPTTokenizer.from_pretrained(tmp_path)
    assert same(loaded, tokenizer)
    assert (loaded.model_max_length, loaded.all_special_tokens) == (61, tokenizer.all_special_tokens)
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kept", [("vocab.json", "merges.txt"), ("tokenizer.json",)])
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_each_form_of_the_saved_files_is_enough(tokenizer, tmp_path, kept, add_bos_token):
    tokenizer.add_bos_token = add_bos_token
    for path in tokenizer.save_pretrained(tmp_path):
        if not path.endswith((*kept, "tokenizer_config.json", "special_tokens_map.json")):
            (tmp_path / path).unlink()
    assert same(OPTTokenizer.from_pretrained(tmp_path), tokenizer)


@pytest.mark.parametrize("add_prefix_space", [True, False])
def test_a_tokenizer_json_alone_is_enough(vocab_folder, tmp_path, add_prefix_space):
    tokenizer = OPTTokenizer.from_pretrained(vocab_folder, add_prefix_space=add_prefix_space)
    tokenizer.save_pretrained(tmp_path / "all")
    (tmp_path / "one").mkdir()
    shutil.copy(tmp_path / "all" / "tokenizer.json", tmp_path / "one")
    assert same(OPTTokenizer.from_pretrained(tmp_path / "one"), tokenizer)
    write(tmp_path / "one", "tokenizer_config.json", {"add_prefix_space": False})
    assert not OPTTokenizer.from_pretrained(tmp_path / "one").add_prefix_space


def test_vocabulary_and_merges_can_come_from_memory(vocab_folder, tokenizer):
    vocab = json.loads((vocab_folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (vocab_folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert same(OPTTokenizer(vocab, lines), tokenizer)
    assert same(OPTTokenizer(vocab, [line.split(" ") for line in lines]), tokenizer)
    assert same(OPTTokenizer(vocab_folder / "vocab.json", vocab_folder / "merges.txt"), tokenizer)


def test_a_changed_bos_survives_saving(tokenizer, tmp_path):
    tokenizer.bos_token = "Ġthe"
    tokenizer.save_pretrained(tmp_path)
    loaded = OPTTokenizer.from_pretrained(tmp_path)
    assert loaded.bos_token == "Ġthe"
    assert same(loaded, tokenizer)


def test_the_config_is_obeyed_and_arguments_win_over_it(folder):
    added = {"__type": "AddedToken", "content": "<s>", "lstrip": False, "normalized": True, "rstrip": True}
    config = {"bos_token": added, "add_bos_token": True, "padding_side": "left", "model_max_length": 1e30, "novel": 1}
    write(folder, "tokenizer_config.json", config)
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token_id, tokenizer.padding_side, tokenizer.model_max_length) == (0, "left", None)
    assert tokenizer.encode("<s>  water") == [0, 0, *tokenizer.encode("water")[1:]]  # rstrip eats the spaces
    assert OPTTokenizer.from_pretrained(folder, add_bos_token=False, bos_token="</s>").encode("<s>")[0] != 0
    tokenizer.save_pretrained(folder)
    assert json.loads((folder / "tokenizer_config.json").read_text())["novel"] == 1


def test_the_special_tokens_map_is_obeyed(folder):
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<unk>"}, "pad_token": "<s>"})
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (3, 0, 2)


def test_added_tokens_of_old_files_are_read(folder):
    write(folder, "added_tokens.json", {"[B]": 504, "[A]": 503})
    tokenizer = OPTTokenizer.from_pretrained(folder)
    assert tokenizer.encode("[A][B]") == [2, 503, 504]
    write(folder, "added_tokens.json", {"[A]": 700})
    with pytest.raises(TokenizerError, match=r"added token '\[A\]': expected the id 700, got 503"):
        OPTTokenizer.from_pretrained(folder)


@pytest.fixture
def foreign_folder(vocab_folder, tmp_path):
    """A `tokenizer.json` in Galactica's way: its own special tokens, no BOS, no file that names roles."""
    backend = Tokenizer(models.BPE.from_file(str(vocab_folder / "vocab.json"), str(vocab_folder / "merges.txt")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "[START_REF]"])
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return tmp_path


def test_a_foreign_tokenizer_gets_no_bos_and_no_roles(foreign_folder):
    tokenizer = OPTTokenizer.from_pretrained(foreign_folder)
    assert tokenizer.special_tokens_map == {}
    assert tokenizer.encode("<s>[START_REF]") == [0, 503]
    assert not tokenizer.add_bos_token
    assert len(tokenizer.encode("The man turned on the faucet")) > 3  # the file's own cutting is off
    assert tokenizer.decode([503, 4], skip_special_tokens=True) == tokenizer.decode([4])
    tokenizer.pad_token_id = 1
    assert tokenizer(["<s>", ""], padding=True)["input_ids"] == [[0], [1]]


def test_a_foreign_template_is_applied_and_saved(foreign_folder, tmp_path):
    content = json.loads((foreign_folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {
        "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
        "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]},
    }
    begin, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in special)
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": [begin, first, end],
        "pair": [begin, first, end, second, end], "special_tokens": special,
    }  # fmt: skip
    write(foreign_folder, "tokenizer.json", content)
    tokenizer = OPTTokenizer.from_pretrained(foreign_folder)
    water = tokenizer.encode("water", add_special_tokens=False)
    assert tokenizer.encode("water") == [0, *water, 2]
    assert tokenizer.encode("water", "water", truncation=True, max_length=5) == [0, water[0], 2, water[0], 2]
    assert (tokenizer.bos_token, tokenizer.add_bos_token) == ("<s>", True)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert same(OPTTokenizer.from_pretrained(tmp_path / "saved"), tokenizer)
    tokenizer.add_bos_token = False
    assert tokenizer.encode("water") == water


def test_an_unknown_post_processor_is_refused(foreign_folder):
    content = json.loads((foreign_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}
    write(foreign_folder, "tokenizer.json", content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: post_processor: expected .* got 'BertProcessing'"):
        OPTTokenizer.from_pretrained(foreign_folder)


DAMAGE = {
    "vocabulary that is no JSON": ("vocab.json", '{"a": 0', r"vocab\.json: not valid JSON"),
    "vocabulary that is a list": ("vocab.json", "[]", r"vocab\.json: expected a JSON object, got list"),
    "empty vocabulary": ("vocab.json", "{}", r"vocab\.json: ids: expected each of"),
    "id that is text": ("vocab.json", '{"a": "0"}', r"vocab\.json: id of 'a': expected an integer, got '0'"),
    "id twice": ("vocab.json", '{"a": 0, "b": 0}', r"expected each of 0 to 1 once, got none for \[1\]"),
    "vocabulary without OPT's tokens": ("vocab.json", '{"a": 0}', "bos_token: expected an entry of the vocabulary"),
    "token twice": ("vocab.json", '{"a": 0, "a": 1}', "duplicate key 'a'"),
    "merge of three": ("merges.txt", "#version: 0.2\nt h e\n", r"merges\.txt: merge 1: expected two tokens"),
    "merge of strangers": ("merges.txt", "t QQ\n", "merge 1: expected tokens of the vocabulary, got 'QQ', 'tQQ'"),
    "damaged tokenizer.json": ("tokenizer.json", "{}", r"tokenizer\.json: expected a file of the tokenizers library"),
    "config that is no JSON": ("tokenizer_config.json", "{", r"tokenizer_config\.json: not valid JSON"),
    "side that is none": ("tokenizer_config.json", '{"padding_side": "up"}', "padding_side: expected 'left' or"),
    "token that is a number": ("tokenizer_config.json", '{"pad_token": 1}', "pad_token: expected a token or None"),
    "added tokens without ids": ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}', "expected ids with"),
    "BOS asked for and absent": ("tokenizer_config.json", '{"bos_token": null}', "bos_token: expected one for"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(folder, damage):
    name, content, message = DAMAGE[damage]
    (folder / name).write_text(content, encoding="utf-8")
    if damage == "vocabulary without OPT's tokens":
        (folder / "merges.txt").write_text("", encoding="utf-8")
    with pytest.raises(TokenizerError, match=message):
        OPTTokenizer.from_pretrained(folder)


def test_a_merges_file_that_is_no_text_is_named(folder):
    (folder / "merges.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(TokenizerError, match=r"merges\.txt: expected UTF-8 text"):
        OPTTokenizer.from_pretrained(folder)


def test_a_folder_without_tokenizer_says_what_was_looked_for(folder):
    (folder / "merges.txt").unlink()
    with pytest.raises(
        TokenizerError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt, got vocab\.json"
    ):
        OPTTokenizer.from_pretrained(folder)
    with pytest.raises(TokenizerError, match=r"source: expected a folder or a hub id .* got neither"):
        OPTTokenizer.from_pretrained(folder / "missing")
    with pytest.raises(TokenizerError, match=r"source: expected a folder .* got a file"):
        OPTTokenizer.from_pretrained(folder / "vocab.json")


def test_a_hub_id_fetches_only_the_tokenizer_files(vocab_folder, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or vocab_folder.parent
    )
    options = dict(revision="main", cache_dir="cache", local_files_only=True, token="secret")
    loaded = OPTTokenizer.from_pretrained("facebook/opt-125m", subfolder=vocab_folder.name, **options)
    assert len(loaded) == 503
    ((source,), keywords) = calls[0]
    assert source == "facebook/opt-125m"
    assert f"{vocab_folder.name}/vocab.json" in keywords.pop("allow_patterns")
    assert keywords == options


def test_a_hub_id_that_is_not_found_is_named(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        TokenizerError, match="facebook/opt-125m: source: no folder of that name here, and the hub gave OSE"
    ):
        OPTTokenizer.from_pretrained("facebook/opt-125m")
