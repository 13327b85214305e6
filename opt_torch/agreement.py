"""One call of `generate` on several processes, PyTorch: all must make the same, or none begins.

Processes that have parts of one model wait for each other at every step; one that was asked for something else would
wait for ever. What they compute after that is the same on all, and so is where they stop.
"""

from collections.abc import Callable

import torch.distributed as dist

from opt_core.errors import InputError, raise_if
from opt_core.generation_request import GenerationRequest


def agreed_request(plan: Callable[[], GenerationRequest], *, is_seeded: bool) -> GenerationRequest:
    """The request that `plan` makes, if all processes make the same; a seed that nobody gave is that of process 0.

    Raises:
        Exception: what `plan` raised here.
        InputError: it raised something on another process, or the requests differ.
    """
    request, error = None, None
    try:
        request = plan()
    except Exception as raised:
        error = raised
    mine = (None, None, f"{error}") if error else (request.digest(is_seeded=is_seeded), request.seeds, None)
    all_of_them: list = [None] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    if error is not None:
        raise error
    failed = [f"process {rank}: {text}" for rank, (_, _, text) in enumerate(all_of_them) if text is not None]
    raise_if(InputError, "generate", failed)
    others = [str(rank) for rank, (digest, _, _) in enumerate(all_of_them) if digest != all_of_them[0][0]]
    problem = f"arguments: expected the same on all processes, got others than process 0 on {', '.join(others)}"
    raise_if(InputError, "generate", [problem] if others else [])
    if request.settings.max_time is not None:
        raise InputError("generate", ["max_time: expected None, the clocks of several processes differ"])
    return request._replace(seeds=all_of_them[0][1])
