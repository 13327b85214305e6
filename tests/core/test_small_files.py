"""Small files of a checkpoint: found by folder, file or hub id; written whole or left as they were."""

import os

import pytest

from opt_core import GenerationConfig, OPTConfig
from opt_core.errors import ConfigError
from opt_core.small_files import find_file, write_whole

CONFIG = OPTConfig(vocab_size=97, hidden_size=12, num_hidden_layers=2, ffn_dim=31, num_attention_heads=3)


@pytest.mark.parametrize("kind", [OPTConfig, GenerationConfig])
def test_what_save_pretrained_writes_from_pretrained_reads(tmp_path, kind):
    config = CONFIG if kind is OPTConfig else GenerationConfig(do_sample=True, top_p=0.5)
    config.save_pretrained(tmp_path / "made" / "here")
    assert kind.from_pretrained(tmp_path / "made" / "here") == config
    assert kind.from_pretrained(str(tmp_path / "made"), subfolder="here") == config
    (file,) = (tmp_path / "made" / "here").iterdir()
    assert kind.from_pretrained(file) == config


def test_fields_given_to_from_pretrained_win_over_the_file(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    assert OPTConfig.from_pretrained(tmp_path, num_labels=5).num_labels == 5
    with pytest.raises(TypeError, match="no_such_field"):
        OPTConfig.from_pretrained(tmp_path, no_such_field=5)
    with pytest.raises(ConfigError, match="dropout: expected a probability"):
        OPTConfig.from_pretrained(tmp_path, dropout=5)


def test_a_config_that_is_wrong_is_not_written(tmp_path):
    config = CONFIG.replace()
    config.dropout = 5
    with pytest.raises(ConfigError, match="dropout: expected a probability"):
        config.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [OPTConfig, GenerationConfig])
def test_a_hub_id_fetches_this_file_alone(tmp_path, monkeypatch, kind):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or tmp_path)
    config = CONFIG if kind is OPTConfig else GenerationConfig(do_sample=True)
    config.save_pretrained(tmp_path / "part")
    asked = dict(revision="main", cache_dir="cache", local_files_only=True, token="secret")
    assert kind.from_pretrained("facebook/opt-125m", subfolder="part", **asked) == config
    (((source,), keywords),) = calls
    (file,) = (tmp_path / "part").iterdir()
    assert source == "facebook/opt-125m"
    assert keywords.pop("allow_patterns") == [f"part/{file.name}"]
    assert keywords.items() >= asked.items()


@pytest.mark.parametrize("kind", [OPTConfig, GenerationConfig])
@pytest.mark.parametrize("source", [None, "", 3, "no such folder", "a/b/c"])
def test_a_source_that_is_none_is_refused(kind, source):
    with pytest.raises(ConfigError, match="source: expected a folder or a hub id"):
        kind.from_pretrained(source)


def test_a_folder_without_the_file_says_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"expected config\.json there, got none"):
        find_file(tmp_path, "config.json", error=ConfigError)


def test_a_text_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file.json"
    write_whole(path, "whole\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "half \ud800 of it")
    assert path.read_text() == "whole\n"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_link_points_to_is_replaced_and_not_the_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_whole(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_device_is_written_to(tmp_path):
    write_whole(os.devnull, "text")
    assert not os.path.isfile(os.devnull)
