"""A random checkpoint, and the command line as a call."""

import string

import pytest
from harness import config_of, save_random

from opt_core import OPTTokenizer
from opt_zoo.main import main

VOCABULARY = ["<s>", "<pad>", "</s>", "<unk>", *string.ascii_lowercase, "Ġ"]


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with random float32 weights, without a tokenizer."""
    return save_random(tmp_path / "checkpoint", config_of())


@pytest.fixture
def checkpoint_with_tokenizer(checkpoint):
    """The same with a tokenizer of single letters."""
    OPTTokenizer({token: i for i, token in enumerate(VOCABULARY)}, []).save_pretrained(checkpoint)
    return checkpoint


@pytest.fixture
def opt_zoo(capsys):
    """Runs a command line; returns the exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # of argparse
            code = exit_.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
