"""Processes that tests start together: they know their places, and none of them outlives its test."""

import time

import processes
import pytest
from processes import free_port, run_processes, started_processes


@pytest.fixture
def script(tmp_path):
    """Makes a script of some lines."""

    def write(lines: str):
        (tmp_path / "worker.py").write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{lines}\n")
        return tmp_path / "worker.py"

    return write


def test_each_process_knows_its_place_and_its_arguments(script):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "MORE")
    done = run_processes(script(f"print(*map(os.environ.get, {names}), sys.argv[1])"), 3, "x", env={"MORE": "y"})
    places = [process.stdout.split() for process in done]
    port = places[0][4]
    assert places == [[str(rank), str(rank), "3", "127.0.0.1", port, "1", "y", "x"] for rank in range(3)]


def test_a_process_that_fails_is_shown_and_takes_the_others_along(script, monkeypatch):
    monkeypatch.setattr(processes, "SECONDS_TO_FOLLOW", 0.2)
    start = time.monotonic()
    waits = script("print('waiting', file=sys.stderr, flush=True)\nif rank == 1: sys.exit('spoilt')\ntime.sleep(60)")
    with pytest.raises(AssertionError, match=r"(?s)ranks \[0\] had not ended.*waiting.*rank 1, exit code 1.*spoilt"):
        run_processes(waits, 2)
    assert time.monotonic() - start < 20


def test_an_exit_code_that_was_not_expected_is_an_error(script):
    ends = script("sys.exit(7)")
    assert [process.returncode for process in run_processes(ends, 2, expect=7)] == [7, 7]
    with pytest.raises(AssertionError, match="expected 0 from all"):
        run_processes(ends, 2)


def test_what_is_late_is_killed(script):
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] had not ended in time"):
        run_processes(script("time.sleep(60)"), 2, timeout=0.3)


def test_one_process_is_killed_and_nothing_outlives_the_context(script):
    with started_processes(script("time.sleep(60)"), 2) as job:
        job.kill(1)
        assert [process.poll() for process in job.processes] == [None, -9]
    assert all(process.poll() == -9 for process in job.processes)


def test_ports_are_free():
    assert len({free_port() for _ in range(5)}) > 1
