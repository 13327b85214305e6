"""Where special tokens go around a text or a pair of texts, as data, and as the post-processor of a `tokenizer.json`.

The library fixes this rule when a tokenizer is built; users change it later (`add_bos_token`, `bos_token`). So it is
read from the file, applied in Python, and written back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Template:
    """The texts "A" and "B" and the ids around them, in order."""

    single: tuple[int | str, ...] = ("A",)
    pair: tuple[int | str, ...] = ("A", "B")

    @classmethod
    def with_bos(cls, bos_token_id: int) -> "Template":
        """One BOS before each text, as the published slow tokenizer does; its fast one leaves out the second."""
        return cls((bos_token_id, "A"), (bos_token_id, "A", bos_token_id, "B"))

    def join(self, first: list[int], second: list[int] | None = None) -> list[int]:
        texts = {"A": first, "B": second or []}
        pieces = self.single if second is None else self.pair
        return [i for piece in pieces for i in (texts[piece] if isinstance(piece, str) else [piece])]

    def special_count(self, *, pair: bool) -> int:
        return sum(not isinstance(piece, str) for piece in (self.pair if pair else self.single))


def template_of(processor: Mapping[str, Any] | None) -> Template:
    """Reads a post-processor; one that only moves offsets (ByteLevel) adds nothing, and so does none at all.

    Raises:
        ValueError: a kind that is neither of these nor TemplateProcessing nor a sequence of them.
    """
    if processor is None or processor.get("type") == "ByteLevel":
        return Template()
    kind = processor.get("type")
    if kind == "Sequence":
        templates = [template_of(step) for step in processor["processors"]]
        return next((template for template in templates if template != Template()), Template())
    if kind == "TemplateProcessing":
        return Template(_read_pieces(processor, "single"), _read_pieces(processor, "pair"))
    raise ValueError(f"post_processor: expected TemplateProcessing, ByteLevel or none, got {kind!r}")


def post_processor_of(template: Template, token_of: Callable[[int], str]) -> dict[str, Any] | None:
    """The inverse of `template_of`: a post-processor for `tokenizer.json`."""
    if template == Template():
        return None
    tokens = {i: token_of(i) for i in (*template.single, *template.pair) if not isinstance(i, str)}
    return {
        "type": "TemplateProcessing",
        "single": _write_pieces(template.single, tokens),
        "pair": _write_pieces(template.pair, tokens),
        "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]} for i, token in tokens.items()},
    }


def _read_pieces(processor: Mapping[str, Any], name: str) -> tuple[int | str, ...]:
    pieces: list[int | str] = []
    for piece in processor[name]:
        if "Sequence" in piece:
            pieces.append(piece["Sequence"]["id"])
        else:
            pieces.extend(processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"])
    return tuple(pieces)


def _write_pieces(pieces: Sequence[int | str], tokens: Mapping[int, str]) -> list[dict[str, Any]]:
    rows = []
    for index, piece in enumerate(pieces):
        type_id = int("B" in pieces and "A" in pieces[:index])  # OPT has no token types; readers of the file want one
        kind, name = ("Sequence", piece) if isinstance(piece, str) else ("SpecialToken", tokens[piece])
        rows.append({kind: {"id": name, "type_id": type_id}})
    return rows
