"""A random checkpoint, for code that documentation shows with a trained one."""

from pathlib import Path

import pytest
from tiny_checkpoint import save_checkpoint

TEXTS = [
    "Hey, are you conscious? Can you talk to me?",
    "Hello, my dog is cute",
    "Who was Jim Henson?",
    "Jim Henson was a nice puppet",
    "Once upon a time, in a land far, far away, ",
    "A chat between a curious human and the Statue of Liberty.",
]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A folder of random weights in 350m style with a tokenizer that encodes `TEXTS` in few tokens."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, TEXTS, "350m style")
    return folder
