"""A process that examines checkpoints of unknown origin, so that a crash, a hang or a flood of memory stays in it.

As a program it answers one line of JSON for each that it reads. `Worker` is the caller's side. Only for Linux, where a
process can be told how much memory it may have.
"""

import json
import logging
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

MEGABYTES, SECONDS = 500, 5  # the seconds of a processor, which other programs do not lengthen
_HANGS_AFTER = 60  # seconds of the clock
_ROOT = Path(__file__).parents[3]


class Outcome(NamedTuple):
    kind: str  # "read", "refused", or what went wrong
    text: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0  # the growth of resident memory at its peak

    @property
    def is_allowed(self) -> bool:
        return self.kind in ("read", "refused")


class Worker:
    """One process for many examinations, started again after it has died."""

    def __init__(self, warm_up: Path | None = None):
        self._warm_up = warm_up
        self._process: subprocess.Popen | None = None

    def run(self, source: Path, target: Path | None = None, **options: Any) -> Outcome:
        """Examines `source`, or converts it to `target`, within the limits of this module."""
        if self._process is None:
            self._start()
        job = dict(source=str(source), target=target and str(target), **options)
        self._process.stdin.write(json.dumps(job, default=dict) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _HANGS_AFTER)[0]:
            self.close()
            return Outcome("hang", f"more than {_HANGS_AFTER} s")
        answer = self._process.stdout.readline()
        if not answer:
            code = self._process.wait()
            self._process = None
            return Outcome("crash", f"exit code {code}")
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        path = os.pathsep.join(map(str, (_ROOT, _ROOT / "tests", _ROOT / "tests" / "conversion")))
        environment = {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
        command = [sys.executable, "-m", "hostile.worker", *([str(self._warm_up)] if self._warm_up else [])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )


# -- the process ------------------------------------------------------------------------------------------------------


def main(warm_up: list[str]) -> None:
    import resource  # not on every system

    from hostile.examination import examine

    logging.disable()
    for source in warm_up:
        examine(Path(source))  # imports what this format needs
    limit = (_memory("VmSize") + MEGABYTES) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    for line in sys.stdin:
        print(json.dumps(_measured(json.loads(line))._asdict()), flush=True)


def _measured(job: dict) -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before, start = _memory("VmRSS"), time.process_time()
    kind, text = _outcome(**job)
    return Outcome(kind, text, time.process_time() - start, max(0, _memory("VmHWM") - before))


def _outcome(source: str, target: str | None, opening: dict | None = None, **writing) -> tuple[str, str]:
    from hostile.examination import convert, examine
    from opt_core.errors import CheckpointError, ConfigError

    try:
        if target:
            convert(Path(source), Path(target), opening=opening, **writing)
        else:
            examine(Path(source), **(opening or {}))
    except (CheckpointError, ConfigError) as error:
        return "refused", str(error)[:10_000]
    except BaseException as error:
        import traceback

        return type(error).__name__, "".join(traceback.format_exception(error)[-4:])[-3000:]
    return "read", ""


def _memory(field: str) -> float:
    """Megabytes."""
    found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1]) / 2**10


if __name__ == "__main__":
    main(sys.argv[1:])
