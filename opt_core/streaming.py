"""Text that appears while it is generated: tokens to whole words, for a terminal or any other reader.

`TextStreamer` has the interface of the published class: `put(ids)`, `end()`, `on_finalized_text(text, stream_end)`.
`words` turns the tokens of `opt_core.searching.stream` into pieces of text.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from opt_core.errors import InputError

# Blocks of scripts that write no spaces between words (CJK ideographs): every character can be shown at once.
_IDEOGRAPHS = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2CEAF), (0x2F800, 0x2FA1F))


class WholeWords:
    """Holds back the end of a text until it is known to end a word. One text; ids in, text out."""

    def __init__(self, tokenizer, **decode_options):
        self.tokenizer, self.decode_options = tokenizer, decode_options
        self.ids: list[int] = []  # since the last end of a line
        self.shown = 0  # characters of their text

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become final with these ids."""
        self.ids.extend(int(token) for token in ids)
        text = self.tokenizer.decode(self.ids, **self.decode_options)
        if text.endswith("\n"):
            return self.flush()
        if text and any(first <= ord(text[-1]) <= last for first, last in _IDEOGRAPHS):
            final = len(text)
        else:
            final = text.rfind(" ") + 1
        piece = text[self.shown : final]
        self.shown = max(self.shown, final)
        return piece

    def flush(self) -> str:
        """All that was held back."""
        piece = self.tokenizer.decode(self.ids, **self.decode_options)[self.shown :] if self.ids else ""
        self.ids, self.shown = [], 0
        return piece


class TextStreamer:
    """Prints the text of one prompt, word by word; pass it to `generate` as `streamer`.

    `skip_prompt` leaves out the prompt; `decode_options` are those of the tokenizer's `decode`.
    """

    def __init__(self, tokenizer, skip_prompt: bool = False, **decode_options):
        self.words, self.skip_prompt = WholeWords(tokenizer, **decode_options), skip_prompt
        self.is_prompt = True

    def put(self, ids) -> None:
        """Takes the prompt [1, T] first, then the token [1] of each step.

        Raises:
            InputError: more than one text.
        """
        ids = np.asarray(ids)
        if ids.ndim > 1 and ids.shape[0] > 1:
            raise InputError("TextStreamer", [f"expected one text, got {len(ids)}"])
        is_skipped = self.is_prompt and self.skip_prompt
        self.is_prompt = False
        if not is_skipped:
            self.on_finalized_text(self.words.push(ids.reshape(-1)))

    def end(self) -> None:
        """Prints what was held back, and ends the line."""
        self.is_prompt = True
        self.on_finalized_text(self.words.flush(), stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints; override it to send the text elsewhere."""
        print(text, end="\n" if stream_end else "", flush=True)


def words(tokenizer, tokens: Iterable[np.ndarray], **decode_options) -> Iterator[str]:
    """Pieces of text from the tokens [1] of each step, whole words at a time; joined they are the whole text."""
    held = WholeWords(tokenizer, **decode_options)
    for ids in tokens:
        if piece := held.push(np.reshape(ids, -1)):
            yield piece
    if piece := held.flush():
        yield piece
