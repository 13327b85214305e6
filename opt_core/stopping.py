"""When a text ends: at an id, at its length, after a time, at a string, or where the caller says so."""

import time
from collections.abc import Callable, Sequence

import numpy as np

from opt_core.errors import InputError
from opt_core.prefix import Prefix

UNFINISHED_BYTES = "\ufffd"  # what a tokenizer decodes the beginning of a character to


class Stopping:
    """Tells which texts have ended with their newest token.

    `criteria` of the caller: (ids [R, S] int64, scores so far or None) -> bool or bools [R], NumPy. Rows of ids are
    right-aligned, with the padding id before a text begins. The clock of `max_time` starts here; it is looked at
    between tokens.
    """

    def __init__(
        self,
        eos_token_ids: Sequence[int],
        max_new_tokens: int,
        *,
        max_time: float | None = None,
        stop_texts: Sequence[str] = (),
        tokenizer=None,
        criteria: Sequence[Callable] = (),
    ):
        self.eos_token_ids, self.max_new_tokens = np.array(eos_token_ids, np.int64), max_new_tokens
        self.deadline = None if max_time is None else time.monotonic() + max_time
        self.stop_texts, self.tokenizer, self.criteria = tuple(stop_texts), tokenizer, tuple(criteria)

    def __call__(self, prefix: Prefix, scores: tuple | None = None) -> np.ndarray:
        """True [R] for each text that has ended."""
        ended_R = np.isin(prefix.ids_RS[:, -1], self.eos_token_ids)
        if prefix.new_tokens >= self.max_new_tokens or (self.deadline is not None and time.monotonic() > self.deadline):
            ended_R = np.ones_like(ended_R)
        if self.stop_texts:
            ended_R = ended_R | [self._ends_at_string(prefix.text(row)) for row in range(len(ended_R))]
        for criterion in self.criteria:
            ended_R = ended_R | _verdict(criterion(prefix.ids_RS, scores), len(ended_R))
        return ended_R

    def _ends_at_string(self, text: np.ndarray) -> bool:
        """A stop string ends within the newest token. A token has at least one byte, so few tokens need decoding."""
        most = max(len(stop.encode("utf-8")) for stop in self.stop_texts)
        tail = text[-most - 3 :].tolist()  # the first may begin within a character of up to four bytes
        before = self.tokenizer.decode(tail[:-1]).rstrip(UNFINISHED_BYTES)
        now = self.tokenizer.decode(tail)
        return any(now.rfind(stop) + len(stop) > len(before) for stop in self.stop_texts if stop in now)


def _verdict(verdict, rows: int) -> np.ndarray:
    verdict_R = np.asarray(verdict)
    if verdict_R.shape not in ((), (rows,)) or verdict_R.dtype != bool:
        got = f"{verdict_R.dtype} {verdict_R.shape}"
        raise InputError("generate", [f"stopping_criteria: expected a bool or bools of shape ({rows},), got {got}"])
    return np.broadcast_to(verdict_R, (rows,))
