"""The pickle of a training checkpoint, which holds tensors amid settings and the state of a program, as plain data.

`torch_pickle` reads a state dict and refuses every name that tensors do not need. A checkpoint of metaseq needs more:
`argparse.Namespace` and the containers of omegaconf are read as the dicts and lists that they are. Any other name
stands for an `Inert`, which no operation changes, so that the state of an optimizer can be passed over; `plain` refuses
it by name where it is used. Nothing is imported and nothing of the file is executed.
Sources: `metaseq/trainer.py` of metaseq (f7ffa5f, 2023); `__getstate__` in omegaconf 2.1 and 2.4.
"""

import io
import pickle
from typing import Any, ClassVar, NamedTuple

from conversion.pytorch.torch_pickle import GLOBALS, Refused, Unpickler, View, asks_for, load, opcodes

_MAX_DEPTH = 32
_MAX_PROBLEMS = 20

_OPCODES = "NEWOBJ NEWOBJ_EX EMPTY_SET ADDITEMS FROZENSET BINBYTES SHORT_BINBYTES"
_SETTINGS = {
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode"),
}
# What describes omegaconf's containers and their types: passed over, and not worth a mention.
_DESCRIPTIVE = {
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "typing": ("Any", "Union", "Optional", "Dict", "List"),
    "collections": ("defaultdict",),
    "builtins": ("dict", "list", "tuple", "int", "float", "str", "bool"),
    "__builtin__": ("dict", "list", "tuple", "int", "long", "float", "unicode", "str", "bool"),  # in protocol 2
}


class Inert:
    """Stands for what a name outside the list would have made; takes everything, keeps and does nothing."""

    __slots__ = ("reason",)

    def __init__(self, reason: str):
        self.reason = reason

    def _pass_over(self, *arguments) -> None:
        pass

    append = extend = add = __setitem__ = __setstate__ = _pass_over


class _Record(dict):
    """Stands for dict, OrderedDict and, with attributes for keys, Namespace.

    Keys are text or numbers. Any other is replaced: hashing a tuple nested a million times overflows the stack of
    the interpreter.
    """

    __slots__ = ()

    def __setitem__(self, key, value):
        if not isinstance(key, str) and type(key) is not int:
            key = Inert(f"expected text for a key, got {type(key).__name__}")
        super().__setitem__(key, value)

    def __setstate__(self, state):
        pass


class _Namespace(_Record):
    __slots__ = ()

    def __setstate__(self, state):
        if not isinstance(state, _Record):
            raise Refused("a Namespace without attributes")
        self.update(state)


class _Setting:
    """Stands for omegaconf's containers and values."""

    __slots__ = ("content",)

    def __init__(self):
        self.content: Any = Inert("a setting without a value")

    def __setstate__(self, state):
        if isinstance(state, _Record):
            self.content = state.get("_content", state.get("_val"))


class _Bag(list):
    """Stands for set, unhashed."""

    __slots__ = ()

    def add(self, item):
        self.append(item)


_CLASSES: dict[tuple[str, str], type] = {
    ("collections", "OrderedDict"): _Record,
    ("argparse", "Namespace"): _Namespace,
    ("builtins", "set"): _Bag,
    ("__builtin__", "set"): _Bag,
    **{(module, name): _Setting for module, names in _SETTINGS.items() for name in names},
}


class _Unpickler(Unpickler):
    dispatch: ClassVar[Any] = Unpickler.dispatch | opcodes(_OPCODES)

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.unknown: dict[tuple[str, str], Inert] = {}

    def find_class(self, module: str, name: str):
        if name in _DESCRIPTIVE.get(module, ()):
            return Inert(asks_for(module, name))
        known = _CLASSES.get((module, name)) or GLOBALS.get((module, name))
        return known or self.unknown.setdefault((module, name), Inert(asks_for(module, name)))

    def load_reduce(self):
        arguments = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], arguments)

    def load_newobj_ex(self):
        self.stack.pop()  # keyword arguments
        self.load_reduce()

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (Inert, _Record, _Setting)):
            raise Refused("attributes for something that has none")
        self.stack[-1].__setstate__(state)

    def load_empty_dict(self):
        self.append(_Record())

    def load_empty_set(self):
        self.append(_Bag())

    def load_frozenset(self):
        items = self.pop_mark()  # first: it changes what `append` is
        self.append(items)

    dispatch.update({
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_reduce,
        pickle.NEWOBJ_EX[0]: load_newobj_ex,
        pickle.BUILD[0]: load_build,
        pickle.EMPTY_DICT[0]: load_empty_dict,
        pickle.EMPTY_SET[0]: load_empty_set,
        pickle.FROZENSET[0]: load_frozenset,
    })  # fmt: skip

    def _made(self, factory, arguments):
        if isinstance(factory, Inert):
            return factory
        if factory is _Bag:
            return arguments[0] if arguments and isinstance(arguments[0], list) else _Bag()
        if isinstance(factory, type):  # none of them is ever made of something by those who save it
            return Inert(f"{factory.__name__.lstrip('_')}: made of what is not read") if arguments else factory()
        try:
            return factory(*arguments)
        except Refused as error:  # a tensor that could not be read, which need not be
            return Inert(str(error))

    def persistent_load(self, pid):
        try:
            return super().persistent_load(pid)
        except Refused as error:
            return Inert(str(error))


class Pickled(NamedTuple):
    content: Any  # as it was built; `plain` makes it fit for use
    unknown: tuple[str, ...]  # names that were asked for and answered with an `Inert`


def loads(data: bytes) -> Pickled:
    """What `data.pkl` of a training checkpoint holds, tensors as `torch_pickle.View`.

    Raises:
        Refused: damage.
    """
    unpickler = _Unpickler(io.BytesIO(data))
    content = load(unpickler)
    return Pickled(content, tuple(f"{module}.{name}"[:200] for module, name in unpickler.unknown))


def plain(value: Any, where: str, problems: list[str]) -> Any:
    """The dicts, lists, text, numbers and views of a branch of what `loads` returned.

    Whatever else is in it is added to `problems` and replaced by None. Lists that share items still share them.
    """
    return _plain(value, where, problems, {}, 0)


def _plain(value, where: str, problems: list[str], done: dict[int, Any], depth: int) -> Any:
    hops = 0
    while isinstance(value, _Setting) and hops < _MAX_DEPTH:
        value, hops = value.content, hops + 1
    if value is None or isinstance(value, (str, int, float, View)):
        return value
    if not isinstance(value, (dict, list, tuple)):
        got = value if isinstance(value, Inert) else Inert(f"expected plain data, got {type(value).__name__}")
        return _report(got, where, problems)
    if depth > _MAX_DEPTH:
        return _report(Inert("nested too deeply"), where, problems)
    if id(value) not in done:
        done[id(value)] = None  # of one that holds itself
        if isinstance(value, dict):
            done[id(value)] = {
                _plain_key(key, where, problems): _plain(item, f"{where}.{key!s:.200}", problems, done, depth + 1)
                for key, item in value.items()
            }
        else:
            done[id(value)] = [_plain(item, f"{where}[{i}]", problems, done, depth + 1) for i, item in enumerate(value)]
    return done[id(value)]


def _plain_key(key, where: str, problems: list[str]) -> str:
    if isinstance(key, str):
        return key
    _report(key if isinstance(key, Inert) else Inert("expected text for a key, got int"), where, problems)
    return ""


def _report(inert: Inert, where: str, problems: list[str]) -> None:
    if len(problems) < _MAX_PROBLEMS:
        problems.append(f"{where}: {inert.reason}")
