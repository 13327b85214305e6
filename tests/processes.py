"""Several processes that are one job, for tests of what runs on several devices.

Each gets what `torchrun` gives (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), in its environment alone:
PyTorch takes it from there, and JAX is told by the script. They are killed, all of them, when their time is over, when
one has failed and the others do not follow, and when a test that started them ends otherwise.
"""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
SECONDS_TO_FOLLOW = 30  # what the others have to end in, once one process has failed


class Job:
    """Processes that were started together, by rank."""

    def __init__(self, processes: list[subprocess.Popen], folder: Path):
        self.processes, self._folder = processes, folder

    def kill(self, rank: int) -> None:
        """SIGKILL, and waits until the process is gone."""
        self.processes[rank].send_signal(signal.SIGKILL)
        self.processes[rank].wait()

    def output(self, rank: int) -> tuple[str, str]:
        """What a process has written to stdout and stderr so far."""
        stdout, stderr = ((self._folder / f"{rank}.{name}").read_text(errors="replace") for name in ("out", "err"))
        return stdout, stderr

    def wait(self, timeout: float = 120) -> list[subprocess.CompletedProcess]:
        """Waits until all have ended; one that fails gives the others `SECONDS_TO_FOLLOW`, then they are killed.

        Raises:
            AssertionError: they had not ended in time, with what each of them wrote to stderr.
        """
        end, failed = time.monotonic() + timeout, False
        while None in (codes := [process.poll() for process in self.processes]):
            if not failed and any(codes):
                failed, end = True, min(end, time.monotonic() + SECONDS_TO_FOLLOW)
            if time.monotonic() > end:
                late = [rank for rank, code in enumerate(codes) if code is None]
                self.stop()
                raise AssertionError(f"ranks {late} had not ended in time\n{self.report()}")
            time.sleep(0.02)
        done = enumerate(self.processes)
        return [subprocess.CompletedProcess(p.args, p.returncode, *self.output(rank)) for rank, p in done]

    def stop(self) -> None:
        """Kills what still runs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()

    def report(self) -> str:
        codes = [process.returncode for process in self.processes]
        return "\n".join(
            f"--- rank {rank}, exit code {code}\n{self.output(rank)[1]}" for rank, code in enumerate(codes)
        )


@contextlib.contextmanager
def started_processes(script: Path, processes: int, *args, env: Mapping[str, str] | None = None) -> Iterator[Job]:
    """`python script args` so many times, killed at the end of the context; `env` is added to the environment."""
    port = str(free_port())
    job = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    job["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, *map(str, (script, *args))]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as files:
        running = Job([], Path(name))
        try:
            for rank in range(processes):
                variables = {**os.environ, **job, "RANK": str(rank), "LOCAL_RANK": str(rank), **(env or {})}
                out, err = (files.enter_context(open(f"{name}/{rank}.{which}", "wb")) for which in ("out", "err"))
                running.processes.append(subprocess.Popen(command, env=variables, stdout=out, stderr=err))
            yield running
        finally:
            running.stop()


def run_processes(
    script: Path, processes: int, *args, env: Mapping[str, str] | None = None, timeout: float = 120, expect: int = 0
) -> list[subprocess.CompletedProcess]:
    """Runs `python script args` so many times at once, to the end; returns them by rank, with stdout and stderr.

    Raises:
        AssertionError: one ended with another exit code than `expect`, or did not end in time; it shows what each
            wrote to stderr.
    """
    with started_processes(script, processes, *args, env=env) as job:
        done = job.wait(timeout)
        assert all(process.returncode == expect for process in done), f"expected {expect} from all\n{job.report()}"
    return done


def module_of(script: Path) -> ModuleType:
    """A worker's script as a module: what it does in several processes or on a mesh, a test does in its own."""
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[script.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
