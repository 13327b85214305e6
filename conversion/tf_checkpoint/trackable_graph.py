"""The object graph in a TensorFlow checkpoint: which attribute of which object each stored variable was.

The keys of a checkpoint follow the shortest way to a variable, which for a compiled model leads through its optimizer.
The graph still tells the way through the model, and a name here is always that one. Objects are not made from it.
Source: `tensorflow/core/protobuf/trackable_object_graph.proto` and what TensorFlow 2.21 writes.
"""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from conversion.tf_checkpoint.protobuf_wire import Malformed, bytes_of, fields, message, number_of, values
from conversion.tf_checkpoint.sstable import MAX_KEY_BYTES

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
COUNTER_NAME = "save_counter"  # of tf.train.Checkpoint
_VALUE = "VARIABLE_VALUE"
_SUFFIX = f"/.ATTRIBUTES/{_VALUE}"
_MAX_NODES = 1 << 16  # a Keras model of 96 layers has some 10,000

# Attributes of Keras models and optimizers that lead to variables of the optimizer, or a second time to those of
# the model. What begins with an underscore is left out too.
_BOOKKEEPING = {
    "optimizer",
    "metrics",
    "keras_api",
    "variables",
    "trainable_variables",
    "non_trainable_variables",
    COUNTER_NAME,
}


def key_of(name: str) -> str:
    """The key in a checkpoint of the variable at the attribute path `name`."""
    return f"{name}{_SUFFIX}"


def name_of(key: str) -> str:
    """The inverse of `key_of`, for files without a graph."""
    return key.removesuffix(_SUFFIX)


class _Node(NamedTuple):
    children: list[tuple[str, int]]  # attribute and number of the node
    keys: list[str]


def variable_names(graph: bytes) -> dict[str, str]:
    """The key of each variable of a model to its attribute path, e.g. `model/decoder/layers/0/fc1/weight`.

    Raises:
        Malformed: the bytes are no such graph.
    """
    nodes = _read_nodes(graph)
    names: dict[str, str] = {}
    seen, waiting = {0}, deque([(0, "")])
    while waiting:
        number, path = waiting.popleft()
        names.update(dict.fromkeys(nodes[number].keys, path))
        for attribute, child in nodes[number].children:
            if child in seen or attribute.startswith("_") or attribute in _BOOKKEEPING:
                continue
            seen.add(child)
            waiting.append((_checked(child, nodes), _joined(path, attribute)))
    return names


def _read_nodes(graph: bytes) -> list[_Node]:
    nodes = []
    for number, value in fields(graph):
        if number == 1:
            nodes.append(_read_node(bytes_of(value)))
        if len(nodes) > _MAX_NODES:
            break
    if not 0 < len(nodes) <= _MAX_NODES:
        raise Malformed(f"expected 1 to {_MAX_NODES} objects, got {len(nodes) or 'none'}")
    return nodes


def _read_node(data: bytes) -> _Node:
    node = _Node([], [])
    for number, value in fields(data):
        if number not in (1, 2):
            continue
        content = values(bytes_of(value))
        if number == 1:
            node.children.append((_text(content.get(2, b"")), number_of(content, 1)))
        elif _text(content.get(1, b"")) == _VALUE:
            node.keys.append(_text(content.get(3, b"")))
    return node


def _checked(child: int, nodes: list[_Node]) -> int:
    if not 0 <= child < len(nodes):
        raise Malformed(f"expected one of {len(nodes)} objects, got number {child}")
    return child


def _joined(path: str, attribute: str) -> str:
    joined = f"{path}/{attribute}" if path else attribute
    if len(joined) > MAX_KEY_BYTES:
        raise Malformed(f"expected attribute paths of at most {MAX_KEY_BYTES} letters, got {joined[:100]}...")
    return joined


def _text(value: int | bytes) -> str:
    try:
        return bytes_of(value).decode()
    except UnicodeDecodeError:
        raise Malformed("expected UTF-8, got other bytes") from None


# -- writing ----------------------------------------------------------------------------------------------------------


def graph_bytes(names: Iterable[str]) -> bytes:
    """The graph of objects whose attributes are the steps of `names`, each of which ends at a variable."""
    nodes: list[list[tuple[int, bytes]]] = [[]]
    numbers = {"": 0}
    for name in names:
        parent = ""
        for step in name.split("/"):
            path = f"{parent}/{step}"
            if path not in numbers:
                numbers[path] = len(nodes)
                nodes.append([])
                nodes[numbers[parent]].append((1, message([(1, numbers[path]), (2, step.encode())])))
            parent = path
        attribute = [(1, _VALUE.encode()), (2, name.encode()), (3, key_of(name).encode())]
        nodes[numbers[parent]].append((2, message(attribute)))
    has_values = (5, message([(1, 1)]))
    return message((1, message([*node, has_values])) for node in nodes)
