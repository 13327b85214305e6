"""The texts so far, as rules and stopping criteria see them: right-aligned rows, whatever the padding was.

Padding is no part of a text: nothing here counts it, so a row of a batch is treated as it would be alone.
"""

from typing import NamedTuple

import numpy as np


class Prefix(NamedTuple):
    """R texts that have the same number of new tokens. The last column holds the newest token of each row."""

    ids_RS: np.ndarray  # int64, prompt and new tokens; the padding id before a text begins
    starts_R: np.ndarray  # the column in which the text of a row begins
    prompt_length: int  # columns of the prompt, padding included
    prompts_R: np.ndarray  # which prompt a row continues

    @property
    def new_tokens(self) -> int:
        return self.ids_RS.shape[1] - self.prompt_length

    @property
    def lengths_R(self) -> np.ndarray:
        """Tokens of each text."""
        return self.ids_RS.shape[1] - self.starts_R

    @property
    def real_RS(self) -> np.ndarray:
        """True where a token is part of the text."""
        return np.arange(self.ids_RS.shape[1]) >= self.starts_R[:, None]

    def text(self, row: int) -> np.ndarray:
        return self.ids_RS[row, self.starts_R[row] :]

    def take(self, rows: np.ndarray) -> "Prefix":
        return Prefix(self.ids_RS[rows], self.starts_R[rows], self.prompt_length, self.prompts_R[rows])

    def extended(self, tokens_R: np.ndarray) -> "Prefix":
        """With one more token in each row."""
        ids_RS = np.concatenate([self.ids_RS, np.reshape(tokens_R, (-1, 1))], axis=1)
        return self._replace(ids_RS=ids_RS)


def prefix_of(input_ids_RT: np.ndarray, real_RT: np.ndarray, pad_token_id: int) -> Prefix:
    """A prompt, its real tokens moved to the right in their order."""
    order_RT = np.argsort(real_RT, axis=1, kind="stable")
    ids_RT = np.take_along_axis(np.where(real_RT, input_ids_RT, pad_token_id), order_RT, axis=1).astype(np.int64)
    rows, columns = ids_RT.shape
    return Prefix(ids_RT, columns - real_RT.sum(1), columns, np.arange(rows))
