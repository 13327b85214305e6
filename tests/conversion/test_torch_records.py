"""The pickle of a training checkpoint becomes plain data; no name is imported, and no input takes long or much."""

import argparse
import collections
import enum
import multiprocessing
import pickle
import resource
import struct
import time

import numpy as np
import pytest
import torch

from conversion.pytorch import torch_pickle, torch_records, torch_zip
from conversion.pytorch.torch_pickle import Refused


class Colour(enum.Enum):
    RED = 3


def read(content, protocol: int = 2, problems: list[str] | None = None):
    """`content` pickled, loaded and made plain; problems into a list, or none expected."""
    found: list[str] = []
    loaded = torch_records.loads(pickle.dumps(content, protocol))
    made = torch_records.plain(loaded.content, "x", found)
    if problems is None:
        assert not found
    else:
        problems += found
    return made


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"a": [1, 2.5, None, True, "text"], "b": (3, -(2**70))}, None),
        (collections.OrderedDict(a=1), {"a": 1}),
        (argparse.Namespace(a=1, b=argparse.Namespace(c=[2])), {"a": 1, "b": {"c": [2]}}),
        ({"a": {7}}, {"a": [7]}),
        ({"a": frozenset({7})}, {"a": [7]}),
        ({"a": []}, {"a": []}),
        ([{}, ()], [{}, []]),
    ],
)
def test_plain_data_stays_what_it_is(content, expected, protocol):
    expected = expected if expected is not None else {**content, "b": list(content["b"])}
    if "frozenset" in repr(content) and protocol < 4:
        assert read(content, protocol, [])["a"] is None  # by a name that is not on the list
    else:
        assert read(content, protocol) == expected


def test_settings_of_omegaconf_become_dicts_and_lists():
    from omegaconf import OmegaConf

    values = {"a": {"b": [1, 2.5, None, "text", {"c": True}]}, "d": "${a.b}", "e": "???", "f": None}
    assert read(OmegaConf.create(values)) == {**values}


def test_structured_settings_of_omegaconf_become_dicts_too():
    from dataclasses import dataclass

    from omegaconf import OmegaConf

    @dataclass
    class Settings:
        layers: int = 3
        rate: float = 0.5
        name: str = "a"
        flag: bool = False

    globals()["Settings"] = Settings
    Settings.__qualname__ = "Settings"
    try:
        assert read(OmegaConf.structured(Settings)) == dict(layers=3, rate=0.5, name="a", flag=False)
    finally:
        del globals()["Settings"]


def test_torch_sizes_are_lists_of_numbers_and_tensors_are_views(tmp_path):
    torch.save({"size": torch.Size([3, 5]), "t": torch.zeros(7, 2).t(), "odd": torch.zeros(0)}, tmp_path / "x.pt")
    records = torch_zip.read_records(tmp_path / "x.pt")
    problems: list[str] = []
    made = {key: torch_records.plain(value, key, problems) for key, value in records.content.items()}
    assert made["size"] == [3, 5]
    assert (made["t"].shape, made["t"].strides) == ((2, 7), (1, 2))
    assert problems == ["odd: an empty tensor of shape (0,)"]
    assert records.locate({"t": made["t"]})["t"].strides == (1, 2)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (Colour.RED, "test_torch_records.Colour"),
        (collections.Counter("ab"), "collections.Counter"),
        (np.float64(1.5), "numpy"),
        (np.arange(5), "numpy"),
        (print, "builtin"),
        (torch.nn.Linear, "torch.nn.modules.linear.Linear"),
        (collections.deque([3]), "collections.deque"),
        (range(3), "range"),
        (complex(1, 2), "complex"),
        (argparse.Namespace, "got type"),
    ],
)
def test_what_is_not_plain_is_named_where_it_is_used(content, name, protocol):
    problems: list[str] = []
    assert read({"kept": 1, "branch": {"leaf": [0, content]}}, protocol, problems) == {
        "kept": 1,
        "branch": {"leaf": [0, None]},
    }
    assert name in problems[0]
    assert problems[0].startswith("x.branch.leaf[1]: ")


def test_objects_take_whatever_is_done_to_them_and_stay_inert():
    bag = collections.defaultdict(list, {"a": [1]})
    deep = collections.deque([argparse.Namespace(a=Colour.RED)], maxlen=3)
    loaded = torch_records.loads(pickle.dumps({"bag": bag, "deep": deep, "after": 3}))
    assert loaded.content["after"] == 3
    assert set(loaded.unknown) == {"collections.deque", "test_torch_records.Colour"}


@pytest.mark.parametrize("key", [(1, 2), 2.5, None, frozenset(), 2**80, Colour.RED])
def test_keys_that_are_no_text_are_refused_where_they_are_used(key):
    problems: list[str] = []
    read({"a": {key: 1}}, problems=problems)
    assert problems[0].startswith("x.a: ")
    problems.clear()
    read({"a": {7: 1}}, problems=problems)
    assert problems == ["x.a: expected text for a key, got int"]


def test_what_is_made_of_arguments_is_not_half_read():
    made = b"ccollections\nOrderedDict\n]]X\x01\x00\x00\x00aaK\x01aa\x85R"  # as Python 2 pickled it
    problems: list[str] = []
    torch_records.plain(torch_records.loads(b"\x80\x02" + made + b".").content, "x", problems)
    assert problems == ["x: Record: made of what is not read"]


def test_one_list_in_two_places_is_one_and_a_list_within_itself_ends():
    shared = [1]
    made = read({"a": shared, "b": shared})
    assert made["a"] is made["b"]
    shared.append(shared)
    assert read({"a": shared})["a"] == [1, None]


GLOBAL, EMPTY_TUPLE, REDUCE, BUILD, STOP = b"c", b")", b"R", b"b", b"."
FUNCTION = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize("loads", [torch_pickle.loads, torch_records.loads])
@pytest.mark.parametrize("attributes", [b"}", b"}X\x01\x00\x00\x00ak\x05s", b"N}X\x0c\x00\x00\x00__defaults__)s\x86"])
def test_nothing_that_outlives_the_reading_gets_attributes(loads, attributes):
    before = torch_pickle._rebuild_tensor.__defaults__
    with pytest.raises(Refused):
        loads(b"\x80\x02" + FUNCTION + attributes + b"b.")
    assert torch_pickle._rebuild_tensor.__defaults__ == before
    assert not vars(torch_pickle._rebuild_tensor)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def nested(levels: int) -> bytes:
    """A list of ten times the list before, so many times: endless text, a few hundred bytes."""
    step = b"".join(b"](" + b"h%c" % level * 10 + b"eq%c" % (level + 1) for level in range(levels))
    return b"]q\x00" + step


HOSTILE = {
    "dicts": b"\x80\x02" + b"}" * 9_000_000,
    "dicts kept": b"\x80\x02(" + b"".join(b"}r" + struct.pack("<I", n) for n in range(1_500_000)),
    "a memo of the highest number": b"\x80\x02}r\xff\xff\xff\xff.",
    "shapes copied over and over": b"\x80\x02](" + b"N" * 500_000 + b"eq\x00ctorch\nSize\nq\x01"
    + b"h\x01h\x00\x85R" * 90_000,
    "nested tuples for a key": b"\x80\x02}(" + b")" + b"\x85" * 1_000_000 + b"Nu.",
    "nested lists": b"\x80\x02" + b"](" * 400_000 + b"e" * 400_000 + b".",
    "endless text for a shape": b"\x80\x02" + nested(60) + FUNCTION + b"(NK\x00h\x3ch\x3ct\x52.",
    "endless text in metadata": b"\x80\x02}X\x01\x00\x00\x00a" + nested(60) + b"s.",
    "a number of two thousand digits": b"\x80\x02}" + b"X\x01\x00\x00\x00a\x8a\xff" + b"\x7f" * 255 + b"s.",
    "text that is not there": b"\x80\x02X\xff\xff\xff\xff.",
    "bytes that are not there": b"\x80\x03B\xff\xff\xff\xff.",
    "half a million names": b"\x80\x02" + b"".join(b"ca\nb%d\n0" % n for n in range(300_000)),
    "settings that hold each other": b"\x80\x02comegaconf.nodes\nAnyNode\n)\x81q\x00}X\x04\x00\x00\x00_valh\x00sb.",
    "attributes for a set": b"\x80\x04\x8f}b.",
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("module", [torch_pickle, torch_records])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_take_little_time_and_memory(name, module):
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_measure, args=(module.loads, HOSTILE[name], theirs))
    process.start()
    theirs.close()
    seconds, megabytes, message = ours.recv()
    process.join()
    assert seconds < 5
    assert megabytes < 500
    assert len(message) < 1000


def _measure(loads, data: bytes, result) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    problems: list[str] = []
    try:
        loaded = loads(data)
        torch_records.plain(getattr(loaded, "content", loaded), "x", problems)
    except Refused as error:
        problems.append(str(error))
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result.send((time.process_time() - start, kilobytes / 1024, "".join(problems)))
