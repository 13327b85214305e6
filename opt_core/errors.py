"""The errors that every package raises: each collects all problems found, not the first."""

from collections.abc import Iterable

_MOST_LINES = 1000  # those of a wrong switch in OPT's largest are fewer
_LONGEST_LINE = 10_000


class ProblemsError(ValueError):
    """One error that lists every problem found.

    `problems` holds the single lines; the message joins them under `title`: of very many the first, of very long ones
    the beginning, and what would act on a terminal as an escape sequence. What they quote may come from anywhere.
    """

    def __init__(self, title: str, problems: Iterable[str]):
        self.title = title
        self.problems = tuple(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [_printable(problem) for problem in self.problems[:_MOST_LINES]]
        if len(self.problems) == 1:
            return f"{self.title}: {lines[0]}"
        if len(self.problems) > _MOST_LINES:
            lines.append(f"and {len(self.problems) - _MOST_LINES} more")
        return "\n  - ".join([f"{self.title}: {len(self.problems)} problems", *lines])

    def __reduce__(self):
        return type(self), (self.title, self.problems)


class ConfigError(ProblemsError):
    """A configuration that describes no OPT model, no training of one, or no adapter to one."""


class CheckpointError(ProblemsError):
    """A file or folder that does not hold the tensors which its configuration asks for."""


class TrainingError(ProblemsError):
    """A step that would spoil the weights, by a loss or a gradient that is not finite, or that lacks a process."""


class InputError(ProblemsError):
    """Arguments of a call that the model cannot take."""


class KeywordError(InputError, TypeError):
    """Keyword arguments that a function does not have."""


class MissingFrameworkError(ImportError):
    """A backend was asked for whose framework is not installed."""


def _printable(problem: str) -> str:
    text = problem if len(problem) <= _LONGEST_LINE else f"{problem[:_LONGEST_LINE]}..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def raise_if(error: type[ProblemsError], title: str, problems: Iterable[str]) -> None:
    """Raises `error` with all `problems`, or returns when there are none."""
    problems = tuple(problems)
    if problems:
        raise error(title, problems)
