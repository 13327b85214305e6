"""Damaged indexes and sets of shards: paths that leave the folder, and shards that are missing, extra or mixed up."""

import json
from collections.abc import Callable
from pathlib import Path

from hostile.bases import weight_files
from hostile.case import Case, cases

BASES = ("safetensors", "torch-bin", "flax-msgpack", "flax-safetensors", "tf-h5", "tf-safetensors")


def index_of(folder: Path) -> Path:
    return next(folder.glob("*.index.json"))


def edited(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    """Changes the map of the index."""

    def damage(folder: Path) -> None:
        index = json.loads(index_of(folder).read_text())
        change(index["weight_map"])
        index_of(folder).write_text(json.dumps(index))

    return damage


def written(text: str) -> Callable[[Path], None]:
    return lambda folder: index_of(folder).write_text(text)


def first_in(shard) -> Callable[[Path], None]:
    """Puts the first tensor of the index into another file."""
    return edited(lambda weight_map: weight_map.update({min(weight_map): shard}))


def lacking(number: int) -> Callable[[Path], None]:
    return lambda folder: weight_files(folder)[number].unlink()


def swapped(folder: Path) -> None:
    first, second, *_ = weight_files(folder)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)


def copied(folder: Path) -> None:
    """The first shard in the place of the last."""
    first, *_, last = weight_files(folder)
    last.write_bytes(first.read_bytes())


def outside(link: bool) -> Callable[[Path], None]:
    """A shard moved out of the folder, linked or named from the index."""

    def damage(folder: Path) -> None:
        shard = weight_files(folder)[1]
        other = folder.parent / "outside"
        other.mkdir()
        moved = shard.rename(other / shard.name)
        if link:
            shard.symlink_to(moved)
        else:
            edited(lambda wm: wm.update({n: f"../outside/{s}" for n, s in wm.items() if s == shard.name}))(folder)

    return damage


def single_beside_index(folder: Path) -> None:
    shard = weight_files(folder)[0]
    (folder / index_of(folder).name.removesuffix(".index.json")).write_bytes(shard.read_bytes())


def of_another_set(folder: Path) -> None:
    """The last shard under a number of a longer set, in index and folder."""
    shard = weight_files(folder)[-1]
    other = shard.rename(folder / shard.name.replace("-of-0000", "-of-0001")).name
    edited(lambda wm: wm.update({n: other for n, s in wm.items() if s == shard.name}))(folder)


def without_last(folder: Path) -> None:
    """The index and the folder lack a shard together."""
    shard = weight_files(folder)[-1]
    shard.unlink()
    edited(lambda wm: [wm.pop(name) for name in list(wm) if wm[name] == shard.name])(folder)


def cut(folder: Path) -> None:
    shard = weight_files(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1])


PLAIN = "expected the plain name of a file beside the index"
EVERYWHERE = [
    ("a shard in the parent folder", outside(link=False), "../outside/", PLAIN),
    ("a shard behind a link that leaves the folder", outside(link=True), "-00002-of-", "a link that leaves the folder"),
    ("a missing shard", lacking(1), "-00002-of-", "missing, expected beside the index"),
    ("a shard that is missing in the index too", without_last, ".index.json", r"expected \d+ shards, the index names"),
    ("two shards changed over", swapped, ".index.json", "the index says .*, where it is not, but in"),
    ("one shard in two places", copied, "-00001-of-", "stored in .* and "),
    ("a tensor that the index lacks", edited(lambda wm: wm.pop(max(wm))), "-of-0000", "not in the index"),
    ("a tensor that no shard has", edited(lambda wm: wm.update({"more": wm[max(wm)]})), "more", "the index says .*not"),
    ("a shard of a longer set", of_another_set, "-of-0001", "shards of different sets"),
    ("a shard that is cut", cut, "-00002-of-", "truncated|damaged"),
    ("a whole file beside the index", single_beside_index, ".index.json", "holds both"),
    ("shards without their index", lambda folder: index_of(folder).unlink(), ".index.json", "missing, though shards"),
    ("an index that is a list", written("[]"), ".index.json", "expected a JSON object"),
    ("an index over 10 MB", written(" " * (10 * 2**20 + 1)), ".index.json", "expected at most 10485760 bytes"),
]
NAMES = [
    ("a path from the root", "/etc/w.safetensors"),
    ("a folder", "a/w.safetensors"),
    ("a folder of Windows", "a\\w.safetensors"),
    ("a drive", "C:w.safetensors"),
    ("the parent folder", ".."),
    ("the folder itself", "."),
    ("nothing", ""),
    ("a name with a zero byte", "w\0.safetensors"),
    ("a name with a line break", "w\n.safetensors"),
    ("a number", 7),
    ("null", None),
    ("half a character", "w\ud800.safetensors"),
    ("a name that writes right to left", "w\u202e.safetensors"),
    ("a list", ["model-00001-of-00003.safetensors"]),
]
MANY = json.dumps({"weight_map": {f"{number:x}": f"{number:x}.safetensors" for number in range(200_000)}})
TEXTS = [
    ("an empty index", "", "not valid JSON"),
    ("an index that ends early", "{", "not valid JSON"),
    ("an index without a map", "{}", "weight_map: expected an object"),
    ("an empty map", '{"weight_map": {}}', "weight_map: expected an object"),
    ("a map that is a list", '{"weight_map": ["a"]}', "weight_map: expected an object"),
    ("200,000 shards", MANY, "expected at most 10000 files, got 200000"),
    ("a name twice", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "duplicate key 'a'"),
    ("a map twice", '{"weight_map": {}, "weight_map": {}}', "duplicate key 'weight_map'"),
    ("lists in one another", '{"weight_map": ' + "[" * 100_000, "not valid JSON"),
    ("a number that is none", '{"metadata": NaN, "weight_map": {"a": "x.safetensors"}}', "NaN is not JSON"),
]
CASES: list[Case] = [
    *(case for base in BASES for case in cases(f"{base} in shards", 4, EVERYWHERE)),
    *cases(
        "safetensors in shards",
        4,
        [(f"in the index, {id}", first_in(shard), ".index.json", PLAIN) for id, shard in NAMES],
    ),
    *cases("safetensors in shards", 4, [(id, written(text), ".index.json", says) for id, text, says in TEXTS]),
    *cases(
        "safetensors in shards",
        4,
        [
            (
                "a file of another kind",
                first_in("config.json"),
                "config.json",
                "expected a name that ends in .safetensors",
            ),
            ("a name of 4400 letters", first_in(f"model-{'9' * 4400}-of-00003.safetensors"), "model-999", PLAIN),
            (
                "a set of 10^200 shards",
                first_in(f"model-00001-of-{10**200}.safetensors"),
                "model-00001-of-1000",
                "missing",
            ),
        ],
    ),
]
