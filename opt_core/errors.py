"""The errors that every package raises: each collects all problems found, not the first."""

from collections.abc import Iterable


class ProblemsError(ValueError):
    """One error that lists every problem found.

    `problems` holds the single lines; the message joins them under `title`.
    """

    def __init__(self, title: str, problems: Iterable[str]):
        self.title = title
        self.problems = tuple(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.problems) == 1:
            return f"{self.title}: {self.problems[0]}"
        return "\n  - ".join([f"{self.title}: {len(self.problems)} problems", *self.problems])

    def __reduce__(self):
        return type(self), (self.title, self.problems)


class ConfigError(ProblemsError):
    """A configuration that describes no OPT model."""


class CheckpointError(ProblemsError):
    """A file or folder that does not hold the tensors which its configuration asks for."""


class InputError(ProblemsError):
    """Arguments of a call that the model cannot take."""


class KeywordError(InputError, TypeError):
    """Keyword arguments that a function does not have."""


class MissingFrameworkError(ImportError):
    """A backend was asked for whose framework is not installed."""


def raise_if(error: type[ProblemsError], title: str, problems: Iterable[str]) -> None:
    """Raises `error` with all `problems`, or returns when there are none."""
    problems = tuple(problems)
    if problems:
        raise error(title, problems)
