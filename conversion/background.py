"""Work on arrays in threads, beside the reading and writing of others, with a bound on the memory that waits for it.

NumPy and hashlib let other threads run while they work on large pieces.
"""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

_HELD_BYTES = 1 << 27  # of memory that arrays own, before the next array is read
_MAX_WAITING = 16
_MAX_THREADS = 8


class Background:
    """Threads; a context manager that waits for them."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS))
        self._waiting: deque[tuple[Future, int]] = deque()

    def submit(self, arrays: list[np.ndarray], function: Callable, *arguments: Any) -> Future:
        """Calls a function that keeps `arrays` alive until it is done."""
        future = self._threads.submit(function, *arguments)
        self._waiting.append((future, sum(map(owned_bytes, arrays))))
        return future

    def make_room(self) -> None:
        """Waits, before another array is read, until few and small enough ones are still worked on."""
        while self._waiting and (self._is_done() or self._is_full()):
            self._waiting.popleft()[0].exception()

    def _is_done(self) -> bool:
        return self._waiting[0][0].done()

    def _is_full(self) -> bool:
        return len(self._waiting) >= _MAX_WAITING or sum(nbytes for _, nbytes in self._waiting) > _HELD_BYTES

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *exception) -> None:
        self._threads.shutdown(cancel_futures=True)


def owned_bytes(array: np.ndarray) -> int:
    """The bytes that NumPy took for the array, or for what it is a view of; 0 for those of a map or a framework."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.nbytes if array.flags.owndata else 0
