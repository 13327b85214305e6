"""The benchmark of sharded loads: the checkpoint that it writes, and when it says that a target was missed."""

import sys

import pytest
from harness import config_of

from benchmarks.sharded_loading import OTHER_BYTES, Case, load_once, summarise, table, write_sparse
from conversion import open_checkpoint
from opt_core.sharding import Mesh, shard_bytes

EVEN = dict(vocab_size=94, hidden_size=28, ffn_dim=58, num_attention_heads=4)


def test_the_checkpoint_has_all_tensors_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.sharded_loading.SHARD_BYTES", 7001)
    config = config_of(**EVEN)
    write_sparse(tmp_path, config)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with open_checkpoint(tmp_path) as checkpoint:
        checkpoint.check(config)
        assert set(checkpoint.dtypes.values()) == {"bfloat16"}


def test_reading_or_taking_more_than_the_share_misses_the_target():
    config, case = config_of(**EVEN), Case("torch", "tensor=2", 2, "float32")
    share = shard_bytes(config, Mesh.parse(case.mesh), 2)
    good = dict(
        bytes_read=share, rchar=share, rss_file=0, rss_anon=share, peak=2 * share, seconds=1.0, load_average=0.5
    )
    row = summarise(case, config, [good, good])
    assert row["target_met"]
    assert f"| {share / 1e6:.1f} | 1.000 |" in table([row])
    for worse in (dict(bytes_read=share * 1.06), dict(peak=2 * share + OTHER_BYTES + 1)):
        assert not summarise(case, config, [good, {**good, **worse}])["target_met"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_says_what_it_has_read(tmp_path, monkeypatch, capsys):
    pytest.importorskip("jax")
    config = config_of(**EVEN)
    write_sparse(tmp_path, config)
    monkeypatch.setenv("WORLD_SIZE", "1")
    load_once(str(tmp_path), "flax", "tensor=1", "bfloat16")
    assert f'"bytes_read": {shard_bytes(config, Mesh.parse("tensor=1"), 2)},' in capsys.readouterr().out
