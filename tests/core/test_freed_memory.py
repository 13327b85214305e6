"""Freed memory goes back."""

import re
import sys
from pathlib import Path

import pytest

from opt_core.freed_memory import _malloc_trim, give_back_freed_memory


def resident_bytes() -> int:
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(sys.platform != "linux" or _malloc_trim() is None, reason="the C library is not glibc")
def test_blocks_freed_between_others_leave_the_process():
    blocks = [bytearray(b"x" * 60_000) for _ in range(2_000)]  # each below what malloc maps by itself
    kept = blocks[::20]
    del blocks
    before = resident_bytes()
    give_back_freed_memory()
    assert before - resident_bytes() > 80_000_000, len(kept)


def test_it_may_be_called_anywhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    _malloc_trim.cache_clear()
    give_back_freed_memory()
    _malloc_trim.cache_clear()
