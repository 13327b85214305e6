"""The pickle inside a torch `.bin`: read without executing anything of the file, written without torch.

The reader knows the few names that a state dict of plain tensors needs and answers them with functions of this module;
no name of a file is ever imported. The writer emits the same names as text. Pickles that hold more than tensors are
`torch_records`' business. Sources: `torch/_utils.py`
(`_rebuild_tensor_v2`, `_rebuild_tensor_v3`, `_rebuild_parameter`) and `torch/serialization.py` (`persistent_id`) of
torch 2.13.
"""

import io
import math
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from conversion.stored import row_major_strides

# Class of a typed storage -> (dtype, bytes per element). Only the floats are read further on.
STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
}
_STORAGE_OF = {dtype: storage for storage, (dtype, _) in STORAGES.items()}
_ITEM_BYTES = dict(STORAGES.values())
_DTYPE_ALIASES = {"double": "float64", "float": "float32", "half": "float16"}
_MAX_DIMENSIONS = 8
_MAX_STEPS = 1_000_000  # opcodes; OPT's largest state dict, 1540 tensors, takes 60,000


class Refused(ValueError):
    """Something in the pickle that weights do not need."""


class Storage(NamedTuple):
    key: str  # the member `data/<key>` of the zip
    nbytes: int
    dtype: str | None  # None: bytes, whose dtype the tensor gives


class View(NamedTuple):
    """A tensor: a strided window, in elements of `dtype`, on a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dtype(str):
    pass


class _Dict(dict):
    """Stands for dict and OrderedDict. Attributes (`_metadata` of a state dict) are left unread.

    Keys are text alone: hashing a tuple nested a million times overflows the stack of the interpreter.
    """

    __slots__ = ()

    def __init__(self):
        super().__init__()

    def __setitem__(self, key, value):
        if not isinstance(key, str):
            raise Refused(f"expected names of tensors as keys, got {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state):
        pass


def _size(items) -> tuple:
    if not isinstance(items, (list, tuple)) or len(items) > _MAX_DIMENSIONS:  # a long one could be asked for often
        raise Refused(f"expected a shape of at most {_MAX_DIMENSIONS} numbers, got {outline(items)}")
    return tuple(items)


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None) -> View:
    return _checked_view(storage, getattr(storage, "dtype", None), offset, shape, strides)


def _rebuild_tensor_with_dtype(storage, offset, shape, strides, grad, hooks, dtype, metadata=None) -> View:
    return _checked_view(storage, dtype, offset, shape, strides)


def _rebuild_parameter(data, requires_grad=False, hooks=None) -> View:
    if not isinstance(data, View):
        raise Refused(f"expected a tensor in a parameter, got {type(data).__name__}")
    return data


_BYTES_STORAGE = (None, 1)
_STORAGE_CLASSES = (*STORAGES.values(), _BYTES_STORAGE)

GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_with_dtype,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.storage", "UntypedStorage"): _BYTES_STORAGE,
    **{("torch", name): storage for name, storage in STORAGES.items()},
    **{("torch", dtype): _Dtype(dtype) for dtype in _STORAGE_OF},
    **{("torch", alias): _Dtype(dtype) for alias, dtype in _DTYPE_ALIASES.items()},
}


# What torch.save writes for a state dict, in protocols 2 to 5.
_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""


class _Counted:
    """The functions of the opcodes, handed out so many times: each step may take a hundred bytes."""

    def __init__(self, dispatch: Mapping[int, Callable], steps: int):
        self._dispatch, self._left = dispatch, steps

    def __getitem__(self, opcode: int) -> Callable:
        self._left -= 1
        if self._left < 0:
            raise Refused(f"expected at most {_MAX_STEPS} opcodes")
        return self._dispatch[opcode]


def opcodes(names: str) -> dict[int, Callable]:
    """Opcode to the function of Python's own unpickler that obeys it."""
    codes = [getattr(pickle, name)[0] for name in names.split()]
    return {code: pickle._Unpickler.dispatch[code] for code in codes}  # type: ignore[attr-defined]


# The unpickler written in Python: the one written in C allocates its memo by the largest index that a file names.
class Unpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """Builds views and dicts of them."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[Any] = opcodes(_OPCODES)

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.dispatch = _Counted(type(self).dispatch, _MAX_STEPS)  # type: ignore[misc]

    def load_empty_dict(self):
        self.append(_Dict())

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Dict):  # of a function, attributes would outlive the reading
            raise Refused("attributes for something that is no dict")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dict
    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str):
        if (module, name) in GLOBALS:
            return GLOBALS[module, name]
        raise Refused(asks_for(module, name))

    def persistent_load(self, pid) -> Storage:
        kind, storage, key, _location, count = pid
        if kind != "storage" or not isinstance(key, str) or not _is_count(count):
            raise Refused("a persistent id that describes no storage")
        if storage not in _STORAGE_CLASSES:
            raise Refused("a persistent id of an unknown storage class")
        dtype, item_bytes = storage
        return Storage(key, count * item_bytes, dtype)


def loads(data: bytes) -> Any:
    """What `data.pkl` holds, tensors as `View`.

    Raises:
        Refused: a name outside the list above, a view that leaves its storage or overlaps itself, or damage.
    """
    return load(Unpickler(io.BytesIO(data)))


def load(unpickler: Unpickler) -> Any:
    """Runs it; whatever goes wrong is `Refused`."""
    try:
        return unpickler.load()
    except Refused:
        raise
    except Exception as error:  # damaged opcodes raise anything, IndexError to TypeError
        raise Refused(f"damaged pickle: {type(error).__name__}: {str(error)[:200]}") from None


def asks_for(module: str, name: str) -> str:
    """Why a name outside the list is refused."""
    wanted = "".join(letter if letter.isprintable() else "?" for letter in f"{module}.{name}"[:200])
    return f"the pickle asks for {wanted}, which weights do not need; nothing was executed"


def _checked_view(storage, dtype, offset, shape, strides) -> View:
    is_typed = isinstance(storage, Storage) and isinstance(dtype, str) and dtype in _ITEM_BYTES
    if not is_typed or storage.dtype not in (None, dtype):
        raise Refused("a tensor without a typed storage")
    dtype, shape, strides = str(dtype), _size(shape), _size(strides)
    if not all(map(_is_count, (offset, *shape, *strides))) or len(shape) != len(strides):
        outlines = f"shape {outline(shape)}, strides {outline(strides)}, offset {outline(offset)}"
        raise Refused(f"a tensor of {outlines}")
    if 0 in shape:
        raise Refused(f"an empty tensor of shape {shape}")
    last = 0  # element that the dimensions so far reach, narrowest stride first
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= last:
            raise Refused(f"zero or overlapping strides {strides} for shape {shape}")
        last += (size - 1) * stride
    if (offset + last + 1) * _ITEM_BYTES[dtype] > storage.nbytes:
        raise Refused(f"shape {shape} at offset {offset} reaches past its storage of {storage.nbytes} bytes")
    return View(storage, dtype, offset, shape, strides)


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def outline(value) -> str:
    """What fits into a message: nested lists, which may share their items, could be endless text."""
    if isinstance(value, (list, tuple)) and len(value) <= _MAX_DIMENSIONS:
        items = [str(item) if isinstance(item, (int, float)) else type(item).__name__ for item in value]
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"[:100]
    return str(value)[:100] if isinstance(value, (int, float)) else type(value).__name__


# -- writing ----------------------------------------------------------------------------------------------------------


def dumps(tensors: Iterable[tuple[str, str, tuple[int, ...]]], beside: Mapping[str, Any] | None = None) -> bytes:
    """`data.pkl` of a state dict: (name, dtype, shape) of each tensor, the n-th in the whole of storage `data/<n>`.

    With `beside`, of a dict of that plain data, which has the state dict as "model".
    """
    items = b"".join(_plain(name) + _tensor(str(key), dtype, shape) for key, (name, dtype, shape) in enumerate(tensors))
    pickled = _EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if beside is not None:
        pickled = _plain(dict(beside)) + _plain("model") + pickled + pickle.SETITEM
    return pickle.PROTO + b"\x02" + pickled + pickle.STOP


def _tensor(key: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    storage = _tuple(
        _plain("storage"), _global("torch", _STORAGE_OF[dtype]), *map(_plain, (key, "cpu", math.prod(shape)))
    )
    view = map(_plain, (0, shape, row_major_strides(shape), False))
    arguments = _tuple(storage + pickle.BINPERSID, *view, _EMPTY_DICT)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _plain(value) -> bytes:
    """The opcodes of numbers, text, and collections and namespaces of them."""
    return pickle.dumps(value, protocol=2)[2:-1]  # without PROTO and STOP


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


_EMPTY_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
