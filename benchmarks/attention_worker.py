"""One cell of benchmarks/attention.py in a process of its own: `python -m benchmarks.attention_worker JOB`.

The implementations of a cell are timed in turn on the same weights, so that other work on the machine falls on all; the
last line of stdout is one JSON document. What one of them does not do here, it says, and the others go on. The calls
themselves are in attention_calls.py; memory is that of one call after the first, which compiles.
"""

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.attention_calls import CALLS, NotHere
from opt_core.errors import InputError
from opt_zoo.bench.contestant import NotRunError, Ours, check_device
from opt_zoo.bench.memory import PeakMemory, peak_gpu_bytes
from opt_zoo.bench.peers import TransformersTorch
from opt_zoo.bench.worker import Job as Generation
from opt_zoo.bench.worker import measure_seconds, prompt

SAMPLE_SECONDS = 0.05  # of a GPU


class Job(NamedTuple):
    """What a worker is told."""

    part: str  # "attention", "decoding", "training" or "inference"
    contestant: str  # a key of `attention_calls.CALLS`
    config: dict[str, Any]
    device: str
    dtype: str
    batch: int
    length: int
    implementations: tuple[str, ...]  # "eager" and those to compare with it
    runs: int  # timed turns at most
    seconds: float  # for the timed turns; one of them is always made
    folder: str = ""  # the checkpoint, for inference
    new_tokens: int = 0


def measure(job: Job) -> dict[str, Any]:
    """Figures of each implementation under its name, or `{"not_run": why}`; of all, `{"not_run": why}` alone."""
    if job.part == "inference":
        return {name: generate(job, name) for name in job.implementations}
    try:
        calls = CALLS[job.contestant](job)
        calls.start()
        check_device(calls.framework, job.device)
    except NotRunError as reason:
        return {"not_run": str(reason)}
    make, alone = getattr(calls, job.part), job.part != "training"
    prepared: dict[str, dict[str, Callable[[], Any]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name in sorted(job.implementations, key="eager".__eq__):  # last: it takes most, and may not give it back
        try:
            prepared[name] = make(name)
            results[name] = {f"{what}_bytes": calls.memory(call, alone) for what, call in prepared[name].items()}
        except (InputError, NotHere, NotImplementedError) as reason:
            results[name] = {"not_run": " ".join(str(reason).split())}
        except Exception as error:  # such as a GPU's memory being too small
            results[name] = {"failed": described(error)}
        print(json.dumps(results), flush=True)  # all that is known, should what follows not end
    timed = {(name, what): call for name in prepared for what, call in prepared[name].items() if ran(results[name])}
    for seconds, failed in in_turn(timed, calls.wait, job):
        for (name, what), samples in seconds.items():
            if samples:
                results[name] |= {f"{what}_seconds": statistics.median(samples), "runs": len(samples)}
        for (name, _), reason in failed.items():
            results[name] = {"failed": reason}
        print(json.dumps(results), flush=True)
    return {name: results[name] for name in job.implementations}


def ran(result: dict[str, Any]) -> bool:
    return not {"not_run", "failed"} & set(result)


def in_turn(
    calls: dict[tuple[str, str], Callable[[], Any]], wait: Callable[[Any], Any], job: Job
) -> Iterator[tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], str]]]:
    """After each turn the seconds of each call so far, and why those that failed did.

    Before a sample of attention alone, and of all on a GPU, comes a call that is not timed: milliseconds depend on
    whose memory the caches hold. On a GPU a sample is the mean of as many calls in a row as fill `SAMPLE_SECONDS`, so
    that it does not wait for Python. Turns end when there were `job.runs` of them, or `job.seconds` are over.
    """
    on_gpu = job.device == "cuda"
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    failed: dict[tuple[str, str], str] = {}
    begin = time.perf_counter()
    for _ in range(job.runs if calls else 0):
        for key in (key for key in calls if key not in failed):
            try:
                repeats = 1
                if on_gpu or job.part != "training":
                    once = seconds_of(calls[key], wait)
                    repeats = max(1, int(SAMPLE_SECONDS / once)) if on_gpu else 1
                seconds[key].append(seconds_of(calls[key], wait, repeats))
            except Exception as error:
                failed[key] = described(error)
        yield seconds, failed
        if time.perf_counter() - begin > job.seconds:
            return


def seconds_of(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int = 1) -> float:
    """The mean of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        result = call()
    wait(result)
    return (time.perf_counter() - start) / repeats


def described(error: Exception) -> str:
    """Its first line; the traceback goes to stderr."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


# -- inference: the measurement of `opt-zoo bench`, with an implementation of attention -------------------------------


def generate(job: Job, implementation: str) -> dict[str, Any]:
    """`step_seconds` of the whole batch, `prefill_seconds` and memory, of greedy tokens after a random prompt."""
    contestant = (PeerWith if job.contestant == "transformers" else OursWith)(job, implementation)
    try:
        contestant.start()
        memory = PeakMemory()
        names = (job.folder, job.device, job.dtype, job.batch, job.length, job.new_tokens, job.runs)
        generation = Generation("", contestant.framework, *names)
        measured = measure_seconds(contestant, generation, prompt(generation))
    except (NotRunError, InputError) as reason:
        return {"not_run": " ".join(str(reason).split())}
    on_gpu = job.device == "cuda"
    return {
        "step_seconds": measured["step_seconds"] if measured["step_seconds"] > 0 else None,  # else lost in noise
        "prefill_seconds": measured["prefill_seconds"],
        "step_bytes": peak_gpu_bytes(contestant.framework) if on_gpu else memory.growth,
        "runs": job.runs,
    }


class OursWith(Ours):
    def __init__(self, job: Job, implementation: str):
        super().__init__(job.contestant, job.folder, job.device, job.dtype)
        self._implementation = implementation

    def load(self) -> None:
        options = {"device": self.device} if self.framework == "torch" else {}
        options |= {"attn_implementation": self._implementation}
        self._model = self._backend.load(self.folder, dtype=self.dtype, **options).model


class PeerWith(TransformersTorch):
    def __init__(self, job: Job, implementation: str):
        super().__init__(job.folder, job.device, job.dtype)
        self._implementation = implementation

    def load(self) -> None:
        super().load()
        self._model.set_attn_implementation(self._implementation)


if __name__ == "__main__":
    print(json.dumps(measure(Job(*json.loads(sys.argv[1])))))
