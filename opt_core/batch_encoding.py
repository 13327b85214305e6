"""What a tokenizer call returns: rows of ids cut, padded and handed over as lists or as one framework's arrays.

It knows nothing of text. The rules of cutting and padding are those of `PreTrainedTokenizer` in Hugging Face
transformers 4.57.6, except where the docstrings below say otherwise. A framework is imported only when its arrays are
asked for.
"""

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from opt_core.errors import InputError, raise_if

logger = logging.getLogger(__name__)

SIDES = ("left", "right")
PADDINGS = {False: "none", True: "longest", "do_not_pad": "none", "longest": "longest", "max_length": "max_length"}
TRUNCATIONS = {
    False: "none",
    True: "longest_first",
    "do_not_truncate": "none",
    "longest_first": "longest_first",
    "only_first": "only_first",
    "only_second": "only_second",
}

# return_tensors -> module to import, extra that installs it, dtype of the ids
FRAMEWORKS = {
    "np": ("numpy", None, "int64"),
    "pt": ("torch", "torch", "int64"),
    "tf": ("tensorflow", "tf", "int32"),
    "jax": ("jax", "flax", "int32"),
    "flax": ("jax", "flax", "int32"),
}


class BatchEncoding(dict):
    """`input_ids` and `attention_mask` (1: a real token, 0: padding) as a dict whose keys are also attributes.

    `model(**inputs)`, `inputs["input_ids"]` and `inputs.input_ids` all work.
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding has no entry {name!r}; it has {', '.join(self)}") from None

    def __missing__(self, row):
        """`encoding[0]`: the ids of row 0, as many as the `Encoding` has tokens that published code gets there."""
        if not isinstance(row, int):
            raise KeyError(row)
        ids = self["input_ids"]
        one_text = isinstance(ids, list) and all(isinstance(i, int) for i in ids)
        return [ids][row] if one_text else ids[row]

    def to(self, device) -> "BatchEncoding":
        """Moves the torch tensors to `device`, in place, and returns itself.

        Everything else stays where it is: TensorFlow and JAX place an array when they use it, lists have no place.
        """
        for name, value in self.items():
            if type(value).__module__.partition(".")[0] == "torch":
                self[name] = value.to(device)
        return self


@dataclass(frozen=True)
class BatchLayout:
    """How rows are cut and padded: the arguments of a tokenizer call, checked and brought to one form."""

    padding: str  # "none", "longest" or "max_length"
    truncation: str  # "none", "longest_first", "only_first" or "only_second"
    max_length: int | None
    pad_to_multiple_of: int | None
    padding_side: str
    truncation_side: str

    @classmethod
    def from_arguments(
        cls, *, padding, truncation, max_length, pad_to_multiple_of, padding_side, truncation_side, model_max_length
    ) -> "BatchLayout":
        """Checks the arguments; `max_length` alone cuts, as in the published class, unless `truncation=False`.

        Raises:
            InputError: lists every argument out of range.
        """
        problems = [
            *_choice_problems("padding", padding, PADDINGS),
            *_choice_problems("truncation", truncation, {None: "", **TRUNCATIONS}),
            *_choice_problems("padding_side", padding_side, SIDES),
            *_choice_problems("truncation_side", truncation_side, SIDES),
            *_positive_problems("max_length", max_length),
            *_positive_problems("pad_to_multiple_of", pad_to_multiple_of),
        ]
        raise_if(InputError, "OPTTokenizer", problems)
        if truncation is None:
            truncation = max_length is not None and PADDINGS[padding] == "none"
        layout = cls(
            PADDINGS[padding],
            TRUNCATIONS[truncation],
            model_max_length if max_length is None else max_length,
            pad_to_multiple_of,
            padding_side,
            truncation_side,
        )
        return layout._with_a_known_length()

    def _with_a_known_length(self) -> "BatchLayout":
        cuts, pads = self.truncation != "none", self.padding != "none"
        if self.max_length is None and self.padding == "max_length":
            raise InputError("OPTTokenizer", ["max_length: expected a length for padding='max_length', got None"])
        if self.max_length is None:
            if cuts:
                logger.warning("truncation without max_length or the tokenizer's model_max_length: nothing is cut")
            return replace(self, truncation="none")
        if cuts and pads and self.max_length % (self.pad_to_multiple_of or 1):
            problem = f"expected a multiple of pad_to_multiple_of={self.pad_to_multiple_of}, got {self.max_length}"
            raise InputError("OPTTokenizer", [f"max_length: {problem}"])
        return self

    def cut(self, first: list[int], second: list[int] | None, special: int) -> tuple[list[int], list[int] | None]:
        """Drops ids of the texts until they fit `max_length` together with `special` added ids.

        "longest_first" makes a pair even, then shortens both in turn.

        Raises:
            InputError: `max_length` leaves no room even for the added ids, or the text named by "only_first" or
                "only_second" is too short to give up what must go.
        """
        excess = len(first) + len(second or ()) + special - (self.max_length or 0)
        if self.truncation == "none" or excess <= 0:
            return first, second
        from_first, from_second = self._shares(len(first), None if second is None else len(second), excess)
        if from_first > len(first) or from_second > len(second or ()):
            problem = f"expected room for the {special} added ids and what {self.truncation!r} keeps"
            raise InputError("OPTTokenizer", [f"max_length: {problem}, got {self.max_length}"])
        return self._drop(first, from_first), None if second is None else self._drop(second, from_second)

    def _shares(self, first: int, second: int | None, excess: int) -> tuple[int, int]:
        if self.truncation == "only_second":
            return 0, excess
        if second is None or self.truncation == "only_first":
            return excess, 0
        level = min(abs(first - second), excess)
        from_first = (excess - level) // 2 + (level if first > second else 0)
        return from_first, excess - from_first

    def _drop(self, ids: list[int], count: int) -> list[int]:
        return ids[count:] if self.truncation_side == "left" else ids[: len(ids) - count]

    def padded_width(self, lengths: Sequence[int]) -> int | None:
        """Length that rows are filled up to, or None where nothing is padded."""
        if self.padding == "none":
            return None
        width = max(lengths, default=0) if self.max_length is None or self.padding == "longest" else self.max_length
        multiple = self.pad_to_multiple_of or 1
        return -(-width // multiple) * multiple

    def fill(self, row: list[int], filler: int | None, width: int | None) -> list[int]:
        gap = [] if width is None or filler is None else [filler] * (width - len(row))
        return gap + row if self.padding_side == "left" else row + gap


def encode_rows(
    rows: list[list[int]], layout: BatchLayout, pad_token_id: int | None, *, return_attention_mask: bool
) -> dict[str, list[list[int]]]:
    """Pads `rows` by `layout`: `input_ids` and, on request, `attention_mask`, both lists of lists."""
    if layout.padding != "none" and pad_token_id is None:
        raise InputError(
            "OPTTokenizer",
            ["pad_token: expected one for padding, got None; set it, for example tokenizer.pad_token = '<pad>'"],
        )
    width = layout.padded_width([len(row) for row in rows])
    encoded = {"input_ids": [layout.fill(row, pad_token_id, width) for row in rows]}
    if return_attention_mask:
        encoded["attention_mask"] = [layout.fill([1] * len(row), 0, width) for row in rows]
    return encoded


def rows_to_array(rows: list[list[int]], framework: str):
    """One array (B, T) of a framework in `FRAMEWORKS`: int64 for NumPy and torch, int32 for TensorFlow and JAX.

    Raises:
        InputError: an unknown name, or rows of different lengths.
        ImportError: the framework is not installed; names the extra to install.
    """
    raise_if(InputError, "OPTTokenizer", _choice_problems("return_tensors", framework, FRAMEWORKS))
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(
            "OPTTokenizer",
            [f"padding: expected True or 'max_length' to make one array of rows of {lengths[0]} to {lengths[-1]} ids"],
        )
    module = _import_framework(framework)
    import numpy as np

    array_BT = np.array(rows, dtype=FRAMEWORKS[framework][2]).reshape(len(rows), lengths[0] if lengths else 0)
    if framework == "pt":
        return module.from_numpy(array_BT)
    if framework == "tf":
        return module.constant(array_BT)
    return array_BT if framework == "np" else module.numpy.asarray(array_BT)


def _import_framework(framework: str):
    name, extra, _ = FRAMEWORKS[framework]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(
            f"return_tensors={framework!r}: {name} is not installed; pip install opt-zoo[{extra}]"
        ) from None


def _choice_problems(name: str, value, choices) -> list[str]:
    # 1 == True, so a plain lookup would take padding=1; a list cannot be looked up at all
    if not isinstance(value, (bool, str, type(None))) or value not in choices:
        return [f"{name}: expected one of {', '.join(repr(choice) for choice in choices)}, got {value!r}"]
    return []


def _positive_problems(name: str, value) -> list[str]:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        return [f"{name}: expected a positive integer or None, got {value!r}"]
    return []
