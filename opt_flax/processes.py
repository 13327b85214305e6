"""Several processes that have one model, JAX: what they agree on, what one writes for all, and when one is gone.

Arrays of a mesh are computed by the same program on every process; here is what is beside them. How processes are
joined and arrays cut is the business of `sharding.py`.
"""

import atexit
import contextlib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils

from opt_core.errors import InputError, ProblemsError, TrainingError, raise_if
from opt_core.generation_request import GenerationRequest
from opt_flax.sharding import Placement, on_host

# What begins the text of an error of collectives (gloo and NCCL that lose a connection, JAX's own service), by codes of
# absl::Status. What a program does wrong by itself has others, RESOURCE_EXHAUSTED for one. jax 0.10 raises them as
# RuntimeErrors, and on a CPU as plain ValueErrors.
_LOST = re.compile(r"(ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION|INTERNAL|UNAVAILABLE|UNKNOWN): ")
Whole = Callable[[], np.ndarray]  # gathers an array
_NONE = -1  # in place of the number of an array
_TEXT_BYTES, _DIGEST_BYTES = 4096, 32
_LOST_AT: list[int] = []  # the steps at which this process found that others are gone


def has_processes(placement: Placement | None) -> bool:
    """Whether a model is that of several processes."""
    return placement is not None and placement.has_processes


@contextlib.contextmanager
def other_processes(placement: Placement | None, step: int) -> Iterator[None]:
    """Within, a call that waits for processes which are gone is a TrainingError.

    gloo notices in 5 to 40 ms (jax 0.10). Of process 0 JAX's own service is gone as well, with which JAX then ends the
    process, mostly after the error is told.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not has_processes(placement) or isinstance(error, ProblemsError) or not _LOST.match(str(error)):
            raise
        _LOST_AT.append(step)
        text = "another process is gone; started again, with any number of processes, a run resumes from its last"
        raise TrainingError(f"step {step}", [f"{text} checkpoint ({str(error).splitlines()[0]})"]) from error


@atexit.register  # after JAX's own, so called just before it
def _leave_at_once() -> None:
    """Ends a process that others have left, with exit code 1.

    JAX would wait for those until it misses their heartbeats, 15 to 100 seconds, and then abort (jax 0.10).
    """
    if _LOST_AT:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def of_process_0(placement: Placement | None, number: int) -> int:
    """The number that process 0 gives, on every process; all of them have to call it."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(number))) if has_processes(placement) else number


def agreed_request(
    placement: Placement | None, plan: Callable[[], GenerationRequest], *, is_seeded: bool
) -> GenerationRequest:
    """The request that `plan` makes, if all processes make the same; a seed that nobody gave is that of process 0.

    Raises:
        Exception: what `plan` raised here.
        InputError: it raised something on another process, or the requests differ, or would end by the clock of each.
    """
    if placement is None or not placement.has_processes:
        return plan()
    request, error = None, None
    try:
        request = plan()
    except Exception as raised:
        error = raised
    seed = 0 if request is None or is_seeded else request.seeds[0]
    mine = b"" if request is None else request.digest(is_seeded=is_seeded) + np.int64(seed).tobytes()
    all_of_them = multihost_utils.process_allgather(np.frombuffer(mine.ljust(_DIGEST_BYTES + 8, b"\0"), np.uint8))
    if request is None:
        raise error
    digests, seeds = all_of_them[:, :_DIGEST_BYTES], all_of_them[:, _DIGEST_BYTES:].copy().view(np.int64)[:, 0]
    others = ", ".join(str(rank) for rank, digest in enumerate(digests) if (digest != digests[0]).any())
    text = "arguments: expected the same on all processes, got others, or wrong ones, than process 0 on"
    raise_if(InputError, "generate", [f"{text} {others}"] if others else [])
    if request.settings.max_time is not None:
        raise InputError("generate", ["max_time: expected None, the clocks of several processes differ"])
    return request if is_seeded else request._replace(seeds=(int(seeds[0]),))


def write_from_first(
    placement: Placement | None, arrays: Mapping[str, Array], write: Callable[[dict[str, Whole]], None]
) -> None:
    """Calls `write` on process 0, with functions that return the arrays whole: the other processes help to gather them.

    It may call them in any order, and more than once; at no time is more than one array whole. Every process has to
    call this, with the same names, and waits until it is done.

    Raises:
        TrainingError: on all others, with the text of whatever `write` raised on process 0.
    """
    if not has_processes(placement) or jax.process_index() == 0:
        _write_as_first(placement, arrays, write)
        return
    in_order = list(arrays.values())
    while (number := of_process_0(placement, _NONE)) != _NONE:
        on_host(in_order[number])
    if text := _told(""):
        raise TrainingError("process 0", [text])


def _write_as_first(placement: Placement | None, arrays: Mapping[str, Array], write: Callable) -> None:
    def gather(number: int, array: Array) -> np.ndarray:
        of_process_0(placement, number)
        return on_host(array)

    text = ""
    try:
        write({name: functools.partial(gather, i, array) for i, (name, array) in enumerate(arrays.items())})
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        raise
    finally:
        if has_processes(placement):
            of_process_0(placement, _NONE)
            _told(text)


def _told(text: str) -> str:
    """The text that process 0 gives, on every process."""
    data = np.zeros(_TEXT_BYTES, np.uint8)
    encoded = text.encode()[:_TEXT_BYTES]
    data[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(data)).rstrip(b"\0").decode(errors="replace")
