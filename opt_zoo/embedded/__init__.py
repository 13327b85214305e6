"""The trained checkpoints that come with the package, by name: folders with config, weights, tokenizer and card."""

from pathlib import Path

NAMES = ("opt-tiny", "opt-tiny-350m-style")  # pre-norm; post-norm with projections
DEFAULT = "opt-tiny"


def embedded_folder(name: str = DEFAULT) -> Path:
    """The folder of an embedded checkpoint.

    Raises:
        KeyError: no checkpoint has that name.
    """
    if name not in NAMES:
        raise KeyError(f"{name}: expected one of {', '.join(NAMES)}")
    return Path(__file__).parent / name
