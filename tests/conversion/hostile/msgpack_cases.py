"""Damaged Flax msgpack: trees of something else, sizes that do not add up, and heads that promise gigabytes."""

import msgpack
import numpy as np

from hostile.case import Case, cases
from hostile.container_cases import changed, holding

FILE = "flax_model.msgpack"
ONE = np.float32([1])


def packed_array(array, code: int = 1, dtype: str | None = None, data: bytes | None = None) -> msgpack.ExtType:
    """An array as Flax packs it, with parts to break."""
    array = np.asarray(array)
    payload = msgpack.packb([array.shape, dtype or array.dtype.name, array.tobytes() if data is None else data])
    return msgpack.ExtType(code, payload)


def packed(tree) -> bytes:
    return msgpack.packb(tree, default=packed_array)


def leaf(value) -> bytes:
    return packed({"a": value})


def chunked(shape, *chunks, **more) -> dict:
    numbered = {str(i): packed_array(np.float32(chunk)) for i, chunk in enumerate(chunks)}
    return {"__msgpack_chunked_array__": True, "shape": shape, "chunks": numbered, **more}


def deep(depth: int):
    return {"a": deep(depth - 1)} if depth else packed_array(ONE)


def without_last_key(data: bytes) -> bytes:
    """A valid tree with one map that says it holds one more entry."""
    assert data[0] & 0xF0 == 0x80
    return bytes([data[0] + 1]) + data[1:]


BROKEN = [
    ("one byte of a text", b"x", "Flax"),
    ("a list", msgpack.packb([1]), "Flax"),
    ("bytes after the tree", leaf(ONE) + b"\x00", "1 bytes follow the map"),
    ("a tree that is cut", leaf(ONE)[:-1], "truncated"),
    ("a map of 4 billion entries", b"\xdf\xff\xff\xff\xff", "truncated"),
    ("an array of 4 GB", b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "truncated: an array of 4294967295 bytes"),
    ("a key of 4 GB", b"\x81\xdb\xff\xff\xff\xff", "at most 512 bytes"),
    ("a key of 513 bytes", packed({"a" * 513: ONE}), "at most 512 bytes"),
    ("a key with a slash", packed({"a/b": ONE}), "without '/'"),
    ("a key of nothing", packed({"": ONE}), "without '/'"),
    ("a key twice", b"\x82" + 2 * leaf(ONE)[1:], "key 'a': expected one .* that occurs once"),
    ("a number as a key", packed({1: ONE}), "expected a text"),
    ("a key that is no UTF-8", b"\x81\xa1\xff\x01", "UTF-8"),
    ("17 maps in one another", packed(deep(16)), "at most 16"),
    ("100,000 maps in one another", b"\x81\xa1a" * 100_000, "at most 16"),
    ("262,144 maps", b"\xdf\x00\x04\x00\x00" + b"".join(b"\xa5%05x\x80" % i for i in range(1 << 18)), "131072 objects"),
    ("nothing as a leaf", leaf(None), "got an object of type 0xc0"),
    ("a float as a leaf", leaf(1.5), "got an object of type 0xcb"),
    ("a text as a leaf", leaf("b"), "got an object of type 0xa1"),
    ("a number as a leaf", leaf(7), "a: expected an array, got 7"),
    ("true as a leaf", leaf(True), "a: expected an array, got True"),
    ("a complex number", leaf(msgpack.ExtType(2, msgpack.packb([1.0, 2.0]))), "extension type 1 or 3, got 2"),
    ("an extension of nobody", leaf(msgpack.ExtType(77, b"1234")), "extension type 1 or 3, got 77"),
    ("a timestamp", b"\x81\xa1a\xd6\xff1234", "extension type 1 or 3, got -1"),
    ("integers", leaf(np.int32([1])), "expected a dtype of .*, got 'int32'"),
    ("complex numbers", leaf(np.complex64([1])), "expected a dtype of .*, got 'complex64'"),
    ("a dtype of objects", leaf(packed_array(ONE, dtype="O")), "expected a dtype of .*, got 'O'"),
    ("a dtype of records", leaf(packed_array(ONE, dtype="f4,f4")), "expected a dtype"),
    ("too few bytes", leaf(packed_array(ONE, data=b"abc")), r"expected 4 bytes for float32 \(1,\), got 3"),
    ("too many bytes", leaf(packed_array(ONE, data=b"abcde")), "expected 4 bytes"),
    ("12,000 bytes in four", leaf(packed_array(np.broadcast_to(ONE, (1000, 3)), data=b"abcd")), "expected 12000 bytes"),
    (
        "2^130 bytes in four",
        leaf(msgpack.ExtType(1, msgpack.packb([[2**64 - 1] * 2, "float32", b"abcd"]))),
        "expected 1361",
    ),
    ("no rows", leaf(np.zeros((0, 2**40), np.float32)), "positive integers"),
    ("nine axes", leaf(np.zeros((1,) * 9, np.float32)), "at most 8"),
    ("a negative size", leaf(msgpack.ExtType(1, msgpack.packb([[-1], "float32", b""]))), "0xff"),
    ("an extension without an array", leaf(msgpack.ExtType(1, b"abcd")), "shape, dtype and bytes"),
    ("bytes after an array", leaf(msgpack.ExtType(1, packed_array(ONE).data + b"rest")), "with its shape, got"),
    ("an array longer than its extension", b"\x81\xa1a\xd4\x01" + packed_array(ONE).data, "with its shape, got"),
]
CHUNKS = [
    ("chunks of fewer elements", chunked({"0": 5}, [1, 2, 3], [4]), "expected chunks of 5 elements .*, got 4"),
    ("chunks of more elements", chunked({"0": 3}, [1, 2, 3], [4]), "expected chunks of 3 elements .*, got 4"),
    ("a chunk for 2^80 elements", chunked({"0": 2**40, "1": 2**40}, [1]), "expected chunks of 12089"),
    ("chunks without a shape", chunked({}, [1]), "the shape and the chunks"),
    ("a shape that starts at 1", chunked({"1": 1}, [1]), "the shape and the chunks"),
    ("a shape of zero", chunked({"0": 0}, [1]), "the shape and the chunks"),
    ("a shape of true", chunked({"0": True}, [1]), "the shape and the chunks"),
    ("a shape that is a number", chunked(3, [1, 2, 3]), "the shape and the chunks"),
    ("a shape without chunks", chunked({"0": 1}), "the shape and the chunks"),
    ("a chunk of two axes", chunked({"0": 1}, [[1]]), "flat chunks of one dtype"),
    (
        "chunks of two dtypes",
        {**chunked({"0": 2}), "chunks": {"0": packed_array(ONE), "1": packed_array(np.float16([1]))}},
        "flat chunks of one dtype",
    ),
    ("chunks and more", chunked({"0": 1}, [1], more=7), "expected an array, got a map"),
    (
        "chunks that say 1 for true",
        {**chunked({"0": 1}, [1]), "__msgpack_chunked_array__": 1},
        "the shape and the chunks",
    ),
    (
        "chunks in chunks",
        {**chunked({"0": 1}, [1]), "chunks": {"0": {"0": packed_array(ONE)}}},
        "the shape and the chunks",
    ),
]
CASES: list[Case] = [
    *cases("flax-msgpack", 9, [(id, holding(data), FILE, says) for id, data, says in BROKEN]),
    *cases(
        "flax-msgpack",
        9,
        [
            ("a map with one entry more", changed(without_last_key), FILE, "truncated|expected"),
            *(
                (id, holding(packed({"lm_head": {"kernel": tree}})), "lm_head/kernel", says)
                for id, tree, says in CHUNKS
            ),
        ],
    ),
    *cases(
        "flax-msgpack",
        3,
        [
            (
                "a foreign name",
                holding(packed({"decoder": {"w": ONE}})),
                "decoder/w",
                "not a weight of OPT in flax-msgpack",
            ),
            (
                "published names",
                holding(packed({"decoder.final_layer_norm.weight": ONE})),
                "decoder.final_layer_norm.weight",
                "not a weight of OPT in flax-msgpack",
            ),
            (
                "parameters under params",
                changed(lambda data: b"\x81\xa6params" + data),
                "params/model",
                "not a weight of OPT",
            ),
        ],
    ),
]
