"""Local paths and hub ids, against a cache folder as the client lays it out and a small server; no network."""

import base64
import hashlib
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from checkpoints import assert_holds, config_of, tensors_of

from conversion import open_checkpoint, push_folder, resolve, write_checkpoint
from opt_core.errors import CheckpointError

CONFIG = config_of()
TENSORS = tensors_of(CONFIG)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as one download and one upload need, over `server.files` (path in the repository to bytes)."""

    def do_HEAD(self):
        match = re.fullmatch(r"/lab/tiny/resolve/([^/]+)/(.+)", self.path)
        if match is None:
            return self._answer(404, error="RepoNotFound")
        if match[1] not in ("main", COMMIT):
            return self._answer(404, error="RevisionNotFound")
        self.server.asked.append((match[1], match[2]))
        if match[2] not in self.server.files:
            return self._answer(404, error="EntryNotFound")
        return self._answer(200, self.server.files[match[2]])

    do_GET = do_HEAD

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append(self.path)
        if self.path.endswith("/repos/create"):
            return self._json(dict(url=f"{self.server.address}/lab/tiny"))
        if "/preupload/" in self.path:
            files = [
                dict(path=file["path"], uploadMode="regular", shouldIgnore=False) for file in json.loads(body)["files"]
            ]
            return self._json(dict(files=files))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"https://huggingface.co/lab/tiny/commit/{COMMIT}"  # the client parses no other host here
        return self._json(dict(success=True, commitOid=COMMIT, commitUrl=url, hookOutput=""))

    def _json(self, value):
        self._answer(200, json.dumps(value).encode())

    def _answer(self, status, body=b"", error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files, server.asked, server.posts = f"http://127.0.0.1:{server.server_port}", {}, [], []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def publish(hub, folder, **options):
    write_checkpoint(folder, CONFIG, TENSORS, overwrite=True, **options)
    hub.files.update({path.name: path.read_bytes() for path in folder.iterdir()})


def cached(cache: Path, folder: Path) -> None:
    """Lays `folder` out as huggingface_hub's cache does: blobs, and a snapshot of links to them."""
    repository = cache / "models--lab--tiny"
    snapshot = repository / "snapshots" / COMMIT
    for part in (repository / "refs", repository / "blobs", snapshot):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for path in folder.iterdir():
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, repository / "blobs" / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)


@pytest.mark.parametrize("options", [{}, dict(max_shard_size="11KB"), dict(format="torch-bin", max_shard_size="11KB")])
def test_a_cached_repository_is_found_without_the_network_and_its_links_are_followed(tmp_path, options):
    write_checkpoint(tmp_path / "made", CONFIG, TENSORS, **options)
    cached(tmp_path / "cache", tmp_path / "made")
    folder = resolve("lab/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    assert folder == tmp_path / "cache" / "models--lab--tiny" / "snapshots" / COMMIT
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, TENSORS)


def test_a_link_from_the_cache_to_another_repository_is_refused(tmp_path):
    write_checkpoint(tmp_path / "made", CONFIG, TENSORS, max_shard_size="11KB")
    cached(tmp_path / "cache", tmp_path / "made")
    folder = resolve("lab/tiny", cache_dir=tmp_path / "cache", local_files_only=True)
    shard = next(folder.glob("model-00002*"))
    (tmp_path / "cache" / "other").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to("../../../other")
    with pytest.raises(CheckpointError, match="a link that leaves the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("options", [{}, dict(max_shard_size="11KB"), dict(format="torch-bin"),
                                     dict(format="torch-bin", max_shard_size="11KB")])  # fmt: skip
def test_a_repository_is_fetched_whatever_its_format_and_number_of_shards(tmp_path, hub, options):
    publish(hub, tmp_path / "made", **options)
    folder = resolve("lab/tiny", cache_dir=tmp_path / "cache", endpoint=hub.address)
    with open_checkpoint(folder) as checkpoint:
        checkpoint.check()
        assert_holds(checkpoint, TENSORS)


def test_only_the_config_and_one_format_are_fetched(tmp_path, hub):
    publish(hub, tmp_path / "a", format="torch-bin")
    publish(hub, tmp_path / "b", format="safetensors")
    hub.files |= {"tf_model.h5": b"x", "tokenizer.json": b"{}"}
    folder = resolve("lab/tiny", cache_dir=tmp_path / "cache", endpoint=hub.address)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


def test_a_subfolder_is_fetched_and_returned(tmp_path, hub):
    publish(hub, tmp_path / "made")
    hub.files = {f"part/{name}": data for name, data in hub.files.items()}
    folder = resolve("lab/tiny", cache_dir=tmp_path / "cache", endpoint=hub.address, subfolder="part")
    assert folder.name == "part"
    with open_checkpoint(folder) as checkpoint:
        assert_holds(checkpoint, TENSORS)


def test_weights_come_from_the_commit_of_the_config(tmp_path, hub):
    publish(hub, tmp_path / "made")
    resolve("lab/tiny", cache_dir=tmp_path / "cache", endpoint=hub.address, revision="main")
    assert {name for revision, name in hub.asked if revision == "main"} == {"config.json"}
    assert {name for revision, name in hub.asked if revision == COMMIT} >= {"model.safetensors"}


def test_an_unsafe_index_from_the_hub_is_refused_before_its_shards_are_asked_for(tmp_path, hub):
    publish(hub, tmp_path / "made", max_shard_size="11KB")
    index = json.loads(hub.files["model.safetensors.index.json"])
    index["weight_map"]["model.decoder.embed_tokens.weight"] = "../../x.safetensors"
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    with pytest.raises(CheckpointError, match="plain name of a file"):
        resolve("lab/tiny", cache_dir=tmp_path / "cache", endpoint=hub.address)
    assert not [name for _, name in hub.asked if name.startswith("model-0")]


def test_a_local_path_wins_over_the_hub_and_is_returned_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "lab" / "tiny" / "part").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("lab/tiny") == Path("lab/tiny")
    assert resolve(tmp_path / "lab/tiny", subfolder="part") == tmp_path / "lab/tiny/part"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("lab/absent", "RepositoryNotFound"),
        ("lab/tiny", "none of model.safetensors, model.safetensors.index.json, pytorch"),
    ],
)
def test_an_error_says_both_things_that_were_tried(tmp_path, hub, source, problem):
    hub.files["config.json"] = json.dumps(CONFIG.to_dict()).encode()
    with pytest.raises(CheckpointError) as raised:
        resolve(source, cache_dir=tmp_path, endpoint=hub.address)
    assert "no such local file or folder" in str(raised.value)
    assert problem in str(raised.value)


def test_without_a_network_the_error_says_that_nothing_is_cached(tmp_path):
    with pytest.raises(CheckpointError, match="no such local file or folder"):
        resolve("lab/tiny", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "a/b/c", "lab/..", Path("lab/tiny")])
def test_what_cannot_be_a_hub_id_is_only_looked_for_on_disk(source):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(source)


def test_a_pushed_folder_comes_back(tmp_path, hub):
    write_checkpoint(tmp_path / "made", CONFIG, TENSORS)
    address = push_folder(tmp_path / "made", "lab/tiny", token="hf_test", endpoint=hub.address)
    assert address.endswith(f"/commit/{COMMIT}")
    assert hub.posts[0] == "/api/repos/create"
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "made").iterdir()}
    with open_checkpoint(resolve("lab/tiny", cache_dir=tmp_path / "cache", endpoint=hub.address)) as checkpoint:
        assert_holds(checkpoint, TENSORS)
