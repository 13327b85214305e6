"""Damaged or hostile HDF5: links, data outside the file, giant declarations, and lists of names that disagree."""

import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from hostile.case import Case, cases
from hostile.container_cases import changed

FILE = "tf_model.h5"
KERNEL = "model/tfopt_for_causal_lm/model/decoder/layers.1/fc1/kernel:0"
SHAPE = (22, 31)


def opened(change: Callable[[h5py.File], object], file: str = FILE) -> Callable[[Path], None]:
    """Changes the file through h5py."""

    def damage(folder: Path) -> None:
        with h5py.File(folder / file, "r+") as h5:
            change(h5)

    return damage


def linked(link: object, place: str = KERNEL, file: str = FILE) -> Callable[[Path], None]:
    """Puts a link in the place of an object."""

    def change(h5: h5py.File) -> None:
        if place in h5:
            del h5[place]
        h5[place] = h5[link] if isinstance(link, str) else link

    return opened(change, file)


def dataset(place: str = KERNEL, file: str = FILE, **options) -> Callable[[Path], None]:
    """Another dataset in the place of one."""

    def change(h5: h5py.File) -> None:
        del h5[place]
        h5.create_dataset(place, **options)

    return opened(change, file)


def virtual(h5: h5py.File) -> None:
    del h5[KERNEL]
    layout = h5py.VirtualLayout(SHAPE, "<f4")
    layout[:] = h5py.VirtualSource("other.h5", "w", SHAPE)
    h5.create_virtual_dataset(KERNEL, layout)


def half_written(h5: h5py.File) -> None:
    del h5[KERNEL]
    h5.create_dataset(KERNEL, SHAPE, "f4", chunks=(11, 31))[:11] = 1


def with_list(names, group: str = "/", attribute: str = "layer_names") -> Callable[[Path], None]:
    """Replaces a list of names by a value, or by what a function makes of it."""

    def change(h5: h5py.File) -> None:
        old = h5[group].attrs[attribute]
        del h5[group].attrs[attribute]
        value = names(old) if callable(names) else names
        if value is not None:
            h5[group].attrs[attribute] = value

    return opened(change)


def with_more(name: str, value, is_listed: bool = False, file: str = FILE) -> Callable[[Path], None]:
    """Adds an object, as a layer of its own if it is listed."""

    def change(h5: h5py.File) -> None:
        h5[name] = value
        if is_listed:
            h5.attrs["layer_names"] = ["model", name]

    return opened(change, file)


def group_with_settings(h5: h5py.File) -> None:
    h5.create_group("/".join("abcdefghijklmnopqrstuvwxyz"))


def many_groups(h5: h5py.File) -> None:
    for number in range(2000):
        h5.create_group(f"model/{number}")


def recompressed(h5: h5py.File) -> None:
    del h5[KERNEL]
    h5.create_dataset(KERNEL, data=np.zeros((2200, 3100), "f4"), compression="gzip", chunks=(2200, 3100))


def broken_chunk(folder: Path) -> None:
    """A gzip stream that is none."""
    opened(
        lambda h5: (h5.__delitem__(KERNEL), h5.create_dataset(KERNEL, data=np.ones(SHAPE, "f4"), compression="gzip"))
    )(folder)
    with h5py.File(folder / FILE) as h5:
        chunk = h5[KERNEL].id.get_chunk_info(0)
    data = bytearray((folder / FILE).read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    (folder / FILE).write_bytes(data)


def inflating(folder: Path) -> None:
    """A chunk of 2 MB whose gzip stream goes on for two gigabytes."""
    stream = zlib.compressobj(9)
    block = stream.compress(bytes(2**24)) + stream.flush(zlib.Z_FULL_FLUSH)
    head, again = block, stream.compress(bytes(2**24)) + stream.flush(zlib.Z_FULL_FLUSH)

    def change(h5: h5py.File) -> None:
        del h5[KERNEL]
        dataset = h5.create_dataset(KERNEL, SHAPE, "f4", chunks=SHAPE, compression="gzip")
        dataset.id.write_direct_chunk((0, 0), head + again * 127 + stream.flush())

    opened(change)(folder)


WEIGHTS = dict(group="model", attribute="weight_names")
LINKS = [
    ("a soft link", linked(h5py.SoftLink("/model")), "kernel:0", "got a soft or external link"),
    ("a soft link to nothing", linked(h5py.SoftLink("/nowhere")), "kernel:0", "got a soft or external link"),
    ("a soft link to itself", linked(h5py.SoftLink("/" + KERNEL)), "kernel:0", "got a soft or external link"),
    ("a link to another file", linked(h5py.ExternalLink("other.h5", "/w")), "kernel:0", "got a soft or external link"),
    (
        "a link to a file of the system",
        linked(h5py.ExternalLink("/etc/hostname", "/"), "model/more"),
        "more",
        "external link",
    ),
    ("a group in itself", linked("model", "model/loop"), "model/loop", "expected a tree"),
    ("the root in a group", linked("/", "model/root"), "model/root", "expected a tree"),
    ("a dataset twice", linked(KERNEL, "model/again"), "model/", "expected a tree"),
    ("26 groups in one another", opened(group_with_settings), "a/b/c/d", "expected a tree"),
    (
        "data in another file",
        dataset(shape=SHAPE, dtype="<f4", external=[("/etc/hostname", 0, 22 * 31 * 4)]),
        "kernel:0",
        "external or virtual data",
    ),
    (
        "data in two other files",
        dataset(shape=SHAPE, dtype="<f4", external=[("a", 0, 1364), ("../b", 0, 1364)]),
        "kernel:0",
        "external or virtual data",
    ),
    ("a virtual dataset", opened(virtual), "kernel:0", "external or virtual data"),
]
TYPES = [
    ("texts", dataset(data=np.array([b"x"], object), dtype=h5py.string_dtype()), "expected a dtype"),
    ("references", dataset(shape=SHAPE, dtype=h5py.ref_dtype), "expected a dtype"),
    ("lists of any length", dataset(shape=SHAPE, dtype=h5py.vlen_dtype("f4")), "expected a dtype"),
    ("records", dataset(shape=SHAPE, dtype=[("a", "f4")]), "expected a dtype"),
    ("integers", dataset(data=np.zeros(SHAPE, np.int32)), "expected a dtype of .*, got int32"),
    ("big-endian numbers", dataset(data=np.zeros(SHAPE, ">f4")), "expected a dtype of .*, got >f4"),
    ("complex numbers", dataset(data=np.zeros(SHAPE, np.complex64)), "expected a dtype of .*, got complex64"),
    ("no values", dataset(data=h5py.Empty("f4")), "positive length, got None"),
    ("a scalar", dataset(data=np.float32(1)), "positive length"),
    ("no rows", dataset(shape=(0, 31), dtype="f4"), "positive length"),
    ("nine axes", dataset(shape=(1,) * 9, dtype="f4"), "one to 8 axes"),
]
SIZES = [
    ("4 TB in nothing", dataset(shape=(10**6, 10**6), dtype="f4"), "expected 4000000000000 bytes"),
    ("4 TB in chunks", dataset(shape=(10**6, 10**6), dtype="f4", chunks=(10, 10)), "at least one byte for 1000"),
    ("27 MB in 27 KB", opened(recompressed), "at least one byte for 1000"),
    (
        "chunks larger than the dataset",
        dataset(data=np.zeros((1, 1), "f4"), maxshape=(None, None), chunks=(30, 30)),
        "expected chunks smaller than the dataset",
    ),
    ("a chunk that is missing", opened(half_written), "expected 2 chunks, got 1"),
    ("lzf", dataset(data=np.zeros(SHAPE, "f4"), compression="lzf"), "no filters but gzip and shuffle"),
    ("fletcher32", dataset(data=np.zeros(SHAPE, "f4"), fletcher32=True), "no filters but gzip and shuffle"),
    ("scale-offset", dataset(data=np.zeros(SHAPE, "f4"), scaleoffset=3), "no filters but gzip and shuffle"),
]
LISTS = [
    ("a weight that is not listed", with_more("model/more", np.zeros(3, "f4")), "model/more", "there, but not listed"),
    ("a listed weight that is not there", opened(lambda h5: h5.__delitem__(KERNEL)), "fc1/kernel:0", "but not there"),
    ("no list of layers", with_list(None), FILE, "expected HDF5 as Keras 2 writes it, by its name"),
    ("a list of numbers", with_list(np.zeros((2, 2))), "layer_names", "expected a list of names"),
    ("a list that is one text", with_list("model"), "layer_names", "expected a list of names"),
    ("a list of bytes that are no text", with_list(np.array([b"\xff\xfe"])), FILE, "expected HDF5"),
    ("a layer that is not there", with_list(["model", "other"]), "other", "listed in the attributes, but not there"),
    ("a layer that is a path", with_list(["model", "../../model"]), "../../model", "but not there"),
    ("a list of weights that is empty", with_list(np.zeros(0, "S1"), **WEIGHTS), KERNEL, "there, but not listed"),
    ("a list of weights that is a number", with_list(7, **WEIGHTS), "weight_names", "expected a list of names"),
    ("a weight of nobody", with_more("x", np.zeros(3, "f4"), is_listed=True), "x", "not a weight of OPT in tf-h5"),
    (
        "published names",
        with_more("decoder.layers.0.fc1.weight", np.zeros((31, 22), "f4"), is_listed=True),
        "decoder.layers.0.fc1.weight",
        "not a weight of OPT in tf-h5",
    ),
    ("a user block", changed(lambda data: bytes(512) + data), FILE, "user block"),
]
CASES: list[Case] = [
    *cases("tf-h5", 8, LINKS),
    *cases("tf-h5", 8, [(id, damage, KERNEL, says) for id, damage, says in [*TYPES, *SIZES]]),
    *cases(
        "tf-h5",
        8,
        [
            ("a chunk that is no gzip", broken_chunk, "layers.1/fc1/kernel:0", "damaged"),
        ],
    ),
    *cases(
        "tf-h5",
        8,
        [("2 GB in a chunk for 2.7 KB", inflating, "layers.1/fc1/kernel:0", "expected at most|damaged")],
    ),
    *cases(
        "tf-h5",
        8,
        [("a weight listed twice", with_list(lambda old: [*old, old[3]], **WEIGHTS), "bias:0", "listed 2 times")],
    ),
    *cases("tf-h5", 8, LISTS),
]
