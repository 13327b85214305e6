"""From token ids to the batches of a training, the same in every framework: packed or padded, shuffled by a seed.

Any batch can be had by the number of its step, without those before it: a run goes on where it was stopped. The order
of epoch e depends on the seed and on e alone, and comes from Philox, whose stream NumPy keeps across versions (it does
not keep that of `Generator.permutation`). NumPy arrays come out; models shift the labels themselves.

What the original did (metaseq, `metaseq/tasks/streaming_language_modeling.py`): a `</s>` after each document, all of
them one stream, cut into blocks of 2,048 tokens; tokens attended across documents, and positions ran on. Here documents
that share a row do not see each other unless `separate_documents=False` asks for the original's stream.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opt_core.errors import InputError, raise_if
from opt_core.reference import IGNORED_LABEL

END_TOKEN_ID = 2  # `</s>`, with which OPT's texts begin and end
PAD_TOKEN_ID = 1

Row = dict[str, np.ndarray]


class PackedDocuments(Sequence[Row]):
    """Documents of token ids one after another, cut into rows of `length`: the examples of a causal language model.

    A row is a dict of int32 [length]: `input_ids`, `labels` (the same ids, -100 at padding) and, with
    `separate_documents`, `segment_ids`, by which a model keeps the documents of a row apart. A document longer than
    what is left of a row goes on in the next one as a document of its own. Only the last row has padding, which is a
    segment of its own; `drop_last` leaves that row out.

    Args:
        documents: token ids as `OPTTokenizer` gives them, `</s>` first.
        length: at most the `max_position_embeddings` of the model.
        separate_documents: False: one stream without segments. There the `</s>` of the next document is what a text's
            end is learned from; with separate documents each gets `end_token_id` for that, None for none.

    Raises:
        InputError: lists documents that are empty or not integers; a length below 2; no token at all.
    """

    def __init__(
        self,
        documents: Iterable[Sequence[int]],
        length: int,
        *,
        separate_documents: bool = True,
        end_token_id: int | None = END_TOKEN_ID,
        pad_token_id: int = PAD_TOKEN_ID,
        drop_last: bool = False,
    ):
        end = [end_token_id] if separate_documents and end_token_id is not None else []
        pieces = _checked_documents(documents, length, end)
        sizes = [len(piece) for piece in pieces]
        self.length, self.separate_documents, self._pad = length, separate_documents, pad_token_id
        self.ids = np.concatenate(pieces)
        self._documents = np.repeat(np.arange(len(pieces), dtype=np.int32), sizes)
        whole, rest = divmod(len(self.ids), length)
        self._rows = whole + (1 if rest and not drop_last else 0)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row):
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row % len(self) * self.length
        ids, documents = (values[start : start + self.length] for values in (self.ids, self._documents))
        fill = self.length - len(ids)
        example = {
            "input_ids": np.pad(ids, (0, fill), constant_values=self._pad),
            "labels": np.pad(ids, (0, fill), constant_values=IGNORED_LABEL),
        }
        if self.separate_documents:  # numbered from 0 in each row
            example["segment_ids"] = np.pad(documents - documents[0], (0, fill), constant_values=self.length)
        return example


def _checked_documents(documents: Iterable[Sequence[int]], length: int, end: list[int]) -> list[np.ndarray]:
    problems = [] if length >= 2 else [f"length: expected at least 2, got {length}"]
    pieces = []
    for number, document in enumerate(documents):
        ids = np.asarray(document)
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            problems.append(f"document {number}: expected a list of token ids, got {np.shape(document)} {ids.dtype}")
        else:
            pieces.append(np.concatenate([ids, end]).astype(np.int32))
    if not pieces and not problems:
        problems.append("documents: expected at least one, got none")
    raise_if(InputError, "PackedDocuments", problems)
    return pieces


class Batches:
    """Batches of examples, in an order that is a function of the seed and the epoch.

    Without `widths` examples have arrays of equal shapes, which are stacked. With them, `input_ids` are of any length
    up to the widest: each batch is of examples that fit one width, padded to it on the right, with an `attention_mask`;
    other values must be numbers. Widths bound what padding wastes, and the shapes that a framework compiles for. What
    is left over of a width joins the next wider one, so that all batches are full; what is left in the end is the last
    batch of the epoch, a smaller one, or is left out by `drop_last` (of a shuffled order: others in each epoch).

    Raises:
        InputError: lists the examples that are too long or differ in their fields; fewer examples than a batch has.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        widths: Sequence[int] | None = None,
        drop_last: bool = True,
        pad_token_id: int = PAD_TOKEN_ID,
    ):
        self.examples, self.batch_size, self.seed, self.shuffle = examples, batch_size, seed, shuffle
        self.widths = None if widths is None else tuple(sorted(widths))
        self.drop_last, self.pad_token_id = drop_last, pad_token_id
        lengths = [0] * len(examples) if widths is None else [len(example["input_ids"]) for example in examples]
        raise_if(InputError, "Batches", self._problems(lengths))
        self._width_of = np.searchsorted(self.widths or (0,), lengths)
        self._order: tuple[int, list[np.ndarray]] = (-1, [])
        self.steps_per_epoch = len(self._batches_of(0))

    def _problems(self, lengths: list[int]) -> Iterator[str]:
        if self.batch_size < 1:
            yield f"batch_size: expected at least 1, got {self.batch_size}"
        if len(self.examples) < (max(self.batch_size, 1) if self.drop_last else 1):
            yield f"examples: expected at least a batch of {self.batch_size}, got {len(self.examples)}"
        if self.widths is None or not len(self.examples):
            return
        fields = set(self.examples[0])
        for number, (length, example) in enumerate(zip(lengths, self.examples, strict=True)):
            if not 0 < length <= self.widths[-1]:
                yield f"example {number}: expected 1 to {self.widths[-1]} tokens, got {length}"
            if set(example) != fields:
                yield f"example {number}: expected the fields {sorted(fields)}, got {sorted(example)}"

    def __len__(self) -> int:
        """The batches of an epoch."""
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[Row]:
        """One epoch, the first."""
        return (self.at(step) for step in range(self.steps_per_epoch))

    def from_step(self, step: int) -> Iterator[Row]:
        """The batches of `step` and of all after it, without end."""
        while True:
            yield self.at(step)
            step += 1

    def at(self, step: int) -> Row:
        """The batch of a step, from 0: each field [B] or [B, T]."""
        chosen = [self.examples[number] for number in self.examples_at(step)]
        if self.widths is None:
            return {name: np.stack([example[name] for example in chosen]) for name in chosen[0]}
        longest = max(len(example["input_ids"]) for example in chosen)
        return pad_rows(chosen, next(width for width in self.widths if width >= longest), self.pad_token_id)

    def examples_at(self, step: int) -> np.ndarray:
        """The numbers of the examples in the batch of a step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._batches_of(epoch)[index]

    def _batches_of(self, epoch: int) -> list[np.ndarray]:
        if self._order[0] != epoch:
            self._order = epoch, self._make_batches(epoch)
        return self._order[1]

    def _make_batches(self, epoch: int) -> list[np.ndarray]:
        count = len(self.examples)
        order = permutation(count, self.seed, epoch, 0) if self.shuffle else np.arange(count)
        left, full = np.zeros(0, int), []
        for width in range(len(self.widths or (0,))):
            members = np.concatenate([left, order[self._width_of[order] == width]])
            cut = len(members) // self.batch_size * self.batch_size
            full += np.split(members[:cut], cut // self.batch_size) if cut else []
            left = members[cut:]
        if self.shuffle and full:
            full = [full[i] for i in permutation(len(full), self.seed, epoch, 1)]
        return full if self.drop_last or not len(left) else [*full, left]

    def describe(self) -> dict[str, Any]:
        """What decides every batch, as JSON: two runs with the same description see the same batches."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            for name in sorted(example):
                values = np.ascontiguousarray(example[name])
                digest.update(f"{name} {values.dtype} {values.shape} ".encode() + values.tobytes())
        names = ("batch_size", "seed", "shuffle", "widths", "drop_last")
        settings = {name: getattr(self, name) for name in names}
        widths = None if self.widths is None else list(self.widths)
        return {"examples": len(self.examples), **settings, "widths": widths, "digest": digest.hexdigest()}


def pad_rows(examples: Sequence[Mapping[str, Any]], width: int, pad_token_id: int = PAD_TOKEN_ID) -> Row:
    """`input_ids` padded on the right to [B, `width`] with their `attention_mask`, int32; others [B, ...]."""
    rows = [np.asarray(example["input_ids"], np.int32) for example in examples]
    batch = {
        "input_ids": np.stack([np.pad(row, (0, width - len(row)), constant_values=pad_token_id) for row in rows]),
        "attention_mask": np.stack([np.arange(width) < len(row) for row in rows]).astype(np.int32),
    }
    names = [name for name in examples[0] if name != "input_ids"]
    return batch | {name: np.stack([np.asarray(example[name]) for example in examples]) for name in names}


def count_targets(batch: Mapping[str, np.ndarray]) -> int:
    """How many tokens the loss of a causal language model counts: the weight of the mean loss of a batch.

    As in `opt_core.reference.causal_lm_loss`: no labels of -100, no predictions at padding or of another document.
    """
    counted_BT = batch["labels"][:, 1:] != IGNORED_LABEL
    if "attention_mask" in batch:
        counted_BT = counted_BT & (batch["attention_mask"][:, :-1] != 0)
    if "segment_ids" in batch:
        counted_BT = counted_BT & (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])
    return int(counted_BT.sum())


def permutation(count: int, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """The numbers from 0 to `count` - 1 in the order of as many 64-bit words of Philox."""
    words = np.random.Philox(key=seed, counter=[0, 0, stream, epoch]).random_raw(count)
    return np.argsort(words, kind="stable")
