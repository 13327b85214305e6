"""What parity is measured on: token rows of a fixed text, placed among padding in four ways.

Rows differ in length, so that every case but "none" mixes padding and real tokens. Nothing is computed here.
"""

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import ProblemsError

logger = logging.getLogger(__name__)

PADDINGS = ("none", "left", "right", "holes")
TOKENS = 263  # real tokens of the longest row: more than a block of TensorFlow; Flax takes up to 512 as one
SHORT_LENGTHS = (31, 13, 1)  # of the other rows
PADDING_COLUMNS = 6  # of the longest row

# Shakespeare, sonnets 18, 29, 73 and 116 (public domain): one row each.
TEXTS = (
    "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: Rough winds do shake the darling "
    "buds of May, And summer's lease hath all too short a date",
    "When, in disgrace with fortune and men's eyes, I all alone beweep my outcast state, And trouble deaf heaven with "
    "my bootless cries, And look upon myself and curse my fate",
    "That time of year thou mayst in me behold When yellow leaves, or none, or few, do hang Upon those boughs which "
    "shake against the cold, Bare ruin'd choirs, where late the sweet birds sang",
    "Let me not to the marriage of true minds Admit impediments. Love is not love Which alters when it alteration "
    "finds, Or bends with the remover to remove",
)


class Case(NamedTuple):
    """One batch. `attention_mask` is None where there is no padding."""

    padding: str
    input_ids: np.ndarray  # [B, T] int64
    attention_mask: np.ndarray | None  # [B, T] int64, 1: a real token

    @property
    def real_BT(self) -> np.ndarray:
        """True: a real token."""
        return np.ones(self.input_ids.shape, bool) if self.attention_mask is None else self.attention_mask != 0

    @property
    def labels_BT(self) -> np.ndarray:
        """The tokens themselves, -100 at padding."""
        return np.where(self.real_BT, self.input_ids, -100)


def token_rows(source: str, config: OPTConfig, tokens: int = TOKENS) -> tuple[np.ndarray, str]:
    """Ids [B, `tokens`], and where they are from: "text", by the tokenizer of `source`, or "random ids" without one.

    Fewer columns where the model has fewer positions.
    """
    columns = min(tokens, config.max_position_embeddings)
    tokenizer = find_tokenizer(source)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, config.vocab_size, (len(TEXTS), columns)), "random ids"
    rows = [tokenizer.encode(" ".join([text] * columns))[:columns] for text in TEXTS]
    return np.array(rows, np.int64) % config.vocab_size, "text"


def load_tokenizer(source: str):
    """The tokenizer in the folder of `source` or in its hub repository; an error that names what was looked for."""
    from opt_core import OPTTokenizer

    path = Path(source)
    return OPTTokenizer.from_pretrained(path.parent if path.is_file() else source)


def find_tokenizer(source: str):
    """What `load_tokenizer` gives, or None where there is no tokenizer."""
    try:
        return load_tokenizer(source)
    except (ProblemsError, OSError) as error:
        logger.info("no tokenizer in %s: %s", source, error)
        return None


def make_case(padding: str, rows_BT: np.ndarray, pad_token_id: int | None) -> Case:
    """Places the rows among padding, all but the first cut short. In "holes" the last row is padding alone."""
    if padding == "none":
        return Case(padding, rows_BT, None)
    longest = rows_BT.shape[1]
    lengths = [longest, *(min(length, longest) for length in SHORT_LENGTHS)]
    if padding == "holes":
        lengths[-1] = 0
    mask_BT = np.stack([_mask_row(padding, length, longest + PADDING_COLUMNS) for length in lengths])
    return _place(padding, rows_BT, mask_BT, pad_token_id)


def _mask_row(padding: str, length: int, columns: int) -> np.ndarray:
    if padding == "left":
        return np.arange(columns) >= columns - length
    if padding == "right":
        return np.arange(columns) < length
    return np.random.default_rng(length).permutation(columns) < length


def _place(padding: str, rows_BT: np.ndarray, mask_BT: np.ndarray, pad_token_id: int | None) -> Case:
    """Puts the first tokens of each row where its mask is True."""
    ids_BT = np.full(mask_BT.shape, pad_token_id or 0, np.int64)
    for ids_T, row_T, mask_T in zip(ids_BT, rows_BT, mask_BT, strict=True):
        ids_T[mask_T] = row_T[: mask_T.sum()]
    return Case(padding, ids_BT, mask_BT.astype(np.int64))


def make_prompts(rows_BT: np.ndarray, pad_token_id: int | None, room: int) -> Case:
    """A left-padded batch of short prompts, of at most a third of the positions `room`."""
    columns = max(1, min(17, room // 3, rows_BT.shape[1]))
    lengths = [max(1, columns * (row + 1) // len(rows_BT)) for row in range(len(rows_BT))]
    mask_BT = np.stack([_mask_row("left", length, columns) for length in lengths])
    return _place("left", rows_BT, mask_BT, pad_token_id)
