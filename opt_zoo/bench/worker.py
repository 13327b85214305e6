"""One measurement in a process of its own: `python -m opt_zoo.bench.worker JOB`; the last line of stdout is its JSON.

Times are of whole calls of `generate`, because the loop of a compiled one cannot be seen into. A call for few tokens
and one for many differ by steps alone, so

    step = (seconds of many - seconds of few) / (many - few),    prefill = seconds of few - step x (few - 1),

where few is one token, if the contestant takes that. Prefill hence is what a user waits for the first token of a call.
Both are medians over `runs` pairs of calls, after one call of each kind that compiles.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opt_core.config import CONFIG_NAME, OPTConfig
from opt_zoo.bench.contestant import Contestant, NotRunError, Ours
from opt_zoo.bench.memory import PeakMemory, peak_gpu_bytes
from opt_zoo.bench.peers import PEERS

FIRST_TOKEN_ID = 4  # below are those with roles


class Job(NamedTuple):
    """What a worker is told."""

    peer: str  # "" for ours, else a key of PEERS
    framework: str
    folder: str
    device: str
    dtype: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    runs: int


def contestant_of(job: Job) -> Contestant:
    where = (job.folder, job.device, job.dtype)
    return PEERS[job.peer][job.framework](*where) if job.peer else Ours(job.framework, *where)


def measure(job: Job) -> dict[str, Any]:
    """A sample, or `{"not_run": why}`."""
    contestant = contestant_of(job)
    start = time.perf_counter()
    try:
        contestant.start()
    except NotRunError as reason:
        return {"not_run": str(reason)}
    import_seconds, memory = time.perf_counter() - start, PeakMemory()
    return {
        "import_seconds": import_seconds,
        **measure_seconds(contestant, job, prompt(job)),
        "peak_bytes": memory.growth,
        "peak_gpu_bytes": peak_gpu_bytes(contestant.framework) if job.device == "cuda" else None,
    }


def measure_seconds(contestant: Contestant, job: Job, ids_BT: np.ndarray) -> dict[str, Any]:
    """Seconds, and the tokens of the first row, by which it is seen who computed the same."""
    few, many = contestant.fewest_tokens, job.new_tokens
    tokens_BS = np.zeros((0, 0))

    def seconds(new_tokens: int) -> float:
        nonlocal tokens_BS
        start = time.perf_counter()
        tokens_BS = contestant.generate(ids_BT, new_tokens)
        elapsed = time.perf_counter() - start
        if tokens_BS.shape != (job.batch, new_tokens):
            raise AssertionError(f"{new_tokens} tokens for {job.batch} rows were asked for, got {tokens_BS.shape}")
        return elapsed

    start = time.perf_counter()
    contestant.load()
    load_seconds = time.perf_counter() - start
    first_call_seconds = seconds(few)
    seconds(many)
    pairs = [(seconds(few), seconds(many)) for _ in range(job.runs)]
    step_seconds, prefill_seconds = split(pairs, few, many)
    return {
        "load_seconds": load_seconds,
        "first_token_seconds": load_seconds + first_call_seconds,
        "prefill_seconds": prefill_seconds,
        "step_seconds": step_seconds,
        "tokens": tokens_BS[0].tolist(),
    }


def split(pairs: list[tuple[float, float]], few: int, many: int) -> tuple[float, float]:
    """Seconds of a step and of the prefill, from those of calls for `few` and for `many` tokens."""
    step = statistics.median((longer - shorter) / (many - few) for shorter, longer in pairs)
    return step, statistics.median(shorter for shorter, _ in pairs) - step * (few - 1)


def prompt(job: Job) -> np.ndarray:
    """Random tokens [B, T] int64, the same for everybody."""
    vocab_size = OPTConfig.from_json(Path(job.folder) / CONFIG_NAME).vocab_size
    return np.random.default_rng(0).integers(FIRST_TOKEN_ID, vocab_size, (job.batch, job.prompt_tokens))


if __name__ == "__main__":
    print(json.dumps(measure(Job(*json.loads(sys.argv[1])))))
