"""Compiled programs kept for the next process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opt_tf.compilation_cache import default_folder

PROGRAM = """
import sys
import tensorflow as tf
import opt_tf
if sys.argv[2:]:
    tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1))
print(opt_tf.use_compilation_cache(sys.argv[1]))
tf.function(lambda x: tf.matmul(x, x), jit_compile=True)(tf.ones([7, 7]))
"""


def entries_after(folder: Path, *arguments: str) -> tuple[int, set[tuple[str, int]]]:
    """The exit code of a process that compiles one program, and what lies in the folder then."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM, str(folder), *arguments]
    code = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True).returncode
    return code, {(entry.name, entry.stat().st_mtime_ns) for entry in folder.iterdir()}


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    first, second = (entries_after(tmp_path / "a folder") for _ in range(2))
    assert first == second
    assert first[0] == 0
    assert len(first[1]) == 1


@pytest.mark.slow
def test_a_cache_asked_for_too_late_is_refused(tmp_path):
    code, entries = entries_after(tmp_path / "late", "compile before")
    assert code == 1
    assert not entries


def test_the_default_folder_is_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "opt-zoo" / "compilation" / "tf"
