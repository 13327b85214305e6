"""Text to token ids and back: OPT's byte-level BPE with the behaviour of the published slow tokenizer.

The published OPT checkpoints name `GPT2Tokenizer` with unk = bos = eos = "</s>", pad = "<pad>" and `add_bos_token` true
(Hugging Face transformers 4.57.6 is the version compared with). Here it runs on the `tokenizers` library. Where the two
published classes differ, this one follows the slow class: a pair becomes [2, A, 2, B], and `add_bos_token` or
`bos_token` changed after loading take effect (transformers #25886).

Only "</s>" and "<pad>" are special: "<s>", "<unk>" and "<mask>" in a text are plain characters. A `tokenizer.json` of
another model of the family (Galactica) is loaded as it is; BOS is added where its files ask for it and nowhere else.

Ids without a token: an embedding has more rows than the vocabulary (OPT: 50272 for 50265 tokens), and a model can
generate these. Ids from `len(tokenizer)` to the next multiple of 128 decode to "", as in the published fast class; any
other id outside the vocabulary is an error. This module imports no framework and, until arrays are asked for, no NumPy.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from opt_core.batch_encoding import BatchEncoding, BatchLayout, encode_rows, rows_to_array
from opt_core.errors import InputError, raise_if
from opt_core.small_files import find_folder
from opt_core.tokenizer_files import (
    FILES,
    PRESET_FILES,
    TokenizerParts,
    build_backend,
    read_tokenizer,
    write_tokenizer,
)
from opt_core.tokenizer_roles import TokensWithRoles, as_lists
from opt_core.tokenizer_settings import SETTINGS, TokenizerError, check_setting_names, setting_problems
from opt_core.tokenizer_template import Template

__all__ = ["OPTTokenizer", "TokenizerError"]

_NO_LIMIT = 10**20  # the published files write "no limit" as 1e30

# As in the published `clean_up_tokenization`, in this order.
_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
            (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class OPTTokenizer(TokensWithRoles):
    """OPT's tokenizer.

    `vocab_file` and `merges_file` are the paths of `vocab.json` and `merges.txt`, or in memory a dict from token to id
    and a list of pairs. `settings` and their defaults are `opt_core.tokenizer_settings.SETTINGS`. "</s>" and "<pad>"
    must be in the vocabulary where they have a role; any other special token that is not is added at its end.

    Raises:
        TokenizerError: lists everything wrong with the vocabulary, the merges or the settings.
        TypeError: an unknown keyword.
    """

    model_input_names = ("input_ids", "attention_mask")
    errors = "replace"  # bytes that are no UTF-8 become U+FFFD
    split_special_tokens = False

    def __init__(self, vocab_file: str | Path | Mapping[str, int], merges_file: str | Path | Iterable, **settings: Any):
        check_setting_names("OPTTokenizer", settings)
        self._set_up(TokenizerParts(build_backend(vocab_file, merges_file)), settings)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
        use_fast: bool | None = None,
        **settings: Any,
    ) -> "OPTTokenizer":
        """Loads from a folder or a hub id; `settings` (`padding_side`, `add_bos_token`, ...) win over its files.

        `use_fast` is accepted and without effect: there is one tokenizer.

        Raises:
            TokenizerError: missing or damaged files, each named.
            TypeError: an unknown keyword.
        """
        check_setting_names("OPTTokenizer.from_pretrained", settings)
        hub_options = dict(revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
        names = (*FILES, *PRESET_FILES)
        folder = find_folder(source, names, subfolder=subfolder, error=TokenizerError, **hub_options)
        tokenizer = cls.__new__(cls)
        tokenizer._set_up(read_tokenizer(folder), settings)
        return tokenizer

    def save_pretrained(self, folder: str | Path) -> tuple[str, ...]:
        """Writes the tokenizer files, which transformers' `GPT2Tokenizer`, its fast class and this class all load.

        A role given to a token after loading makes it a special token, which texts are split at, when loaded again:
        so do the published classes.
        """
        settings, template = {name: getattr(self, name) for name in SETTINGS}, self._template()
        if template != (Template.with_bos(self.bos_token_id) if self.add_bos_token else Template()):
            settings["add_bos_token"] = None  # a foreign rule, which tokenizer.json alone can tell
        return write_tokenizer(Path(folder), self._backend, template, settings, self._extra)

    def __repr__(self) -> str:
        return f"OPTTokenizer(len={len(self)}, padding_side={self.padding_side!r}, {self.special_tokens_map})"

    # -- settings -----------------------------------------------------------------------------------------------------

    def _set_up(self, parts: TokenizerParts, given: Mapping[str, Any]) -> None:
        settings = {**SETTINGS, **parts.settings, **given}
        raise_if(TokenizerError, parts.source, setting_problems(settings))
        parts.backend.no_truncation()
        parts.backend.no_padding()
        if isinstance(words := parts.backend.pre_tokenizer, ByteLevel):
            # The slow class puts one space before the whole text, the backend before each part between special tokens.
            parts.backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=words.use_regex)
        self._take_tokens(parts.backend, parts.added_tokens, settings, parts.source)
        self._extra, self._file_template = parts.extra, parts.template
        self._add_bos_token: bool | None = settings["add_bos_token"]
        self.add_prefix_space = settings["add_prefix_space"]
        self.clean_up_tokenization_spaces = settings["clean_up_tokenization_spaces"]
        self.padding_side, self.truncation_side = settings["padding_side"], settings["truncation_side"]
        limit = settings["model_max_length"]
        self.model_max_length: int | None = None if limit is None or limit > _NO_LIMIT else int(limit)
        if self._add_bos_token and self.bos_token is None:
            raise TokenizerError(parts.source, ["bos_token: expected one for add_bos_token=True, got None"])

    @property
    def add_bos_token(self) -> bool:
        """Whether each text is preceded by `bos_token`; can be set at any time."""
        if self._add_bos_token is not None:
            return self._add_bos_token
        return self.bos_token_id is not None and self._file_template.single[0] == self.bos_token_id

    @add_bos_token.setter
    def add_bos_token(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise InputError("OPTTokenizer", [f"add_bos_token: expected True or False, got {value!r}"])
        self._add_bos_token = value

    def _template(self) -> Template:
        if self._add_bos_token is None:
            return self._file_template
        if self._add_bos_token and self.bos_token_id is None:
            raise InputError("OPTTokenizer", ["bos_token: expected one for add_bos_token=True, got None"])
        return Template.with_bos(self.bos_token_id) if self._add_bos_token else Template()

    # -- text to ids --------------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        add_special_tokens: bool = True,
        return_attention_mask: bool = True,
        padding_side: str | None = None,
        pad_to_multiple_of: int | None = None,
    ) -> BatchEncoding:
        """Encodes a text or a list of texts, each with its `text_pair` where given.

        Args:
            padding: False, True or "longest" (to the longest row), "max_length".
            truncation: False, True or "longest_first", "only_first", "only_second"; None cuts where `max_length` is
                given without padding.
            max_length: ids in a row, added ones included; without it `model_max_length`.
            return_tensors: None (lists), "np", "pt", "tf", "jax" or "flax".
            padding_side: "left" or "right", here only; use "left" for batched generation.

        Returns:
            `input_ids` and `attention_mask`: lists; for one text without `return_tensors` flat ones. Arrays are (B, T):
            int64 of NumPy and torch, int32 of TensorFlow and JAX.

        Raises:
            InputError: wrong arguments; a text that is no valid Unicode (a lone surrogate).
            ImportError: the framework of `return_tensors` is missing.
        """
        layout = BatchLayout.from_arguments(
            padding=padding, truncation=truncation, max_length=max_length, pad_to_multiple_of=pad_to_multiple_of,
            padding_side=self.padding_side if padding_side is None else padding_side,
            truncation_side=self.truncation_side, model_max_length=self.model_max_length,
        )  # fmt: skip
        rows = self._rows(text, text_pair, layout, self._template() if add_special_tokens else Template())
        encoded = encode_rows(rows, layout, self.pad_token_id, return_attention_mask=return_attention_mask)
        if return_tensors is not None:
            return BatchEncoding({name: rows_to_array(values, return_tensors) for name, values in encoded.items()})
        if isinstance(text, str):
            return BatchEncoding({name: values[0] for name, values in encoded.items()})
        return BatchEncoding(encoded)

    def encode(self, text: str, text_pair: str | None = None, **options):
        """The `input_ids` of one text; `options` are those of the call."""
        return self(text, text_pair, **options)["input_ids"]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of one text, with nothing added."""
        _check_text("text", text)
        return self._backend.encode(self._prefixed([text])[0], add_special_tokens=False).tokens

    def build_inputs_with_special_tokens(self, ids: list[int], pair_ids: list[int] | None = None) -> list[int]:
        return self._template().join(ids, pair_ids)

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        return self._template().special_count(pair=pair)

    def _rows(self, text, text_pair, layout: BatchLayout, template: Template) -> list[list[int]]:
        first = self._encode_texts("text", text)
        second = [None] * len(first) if text_pair is None else self._encode_texts("text_pair", text_pair)
        alike = text_pair is None or isinstance(text, str) == isinstance(text_pair, str)
        if len(first) != len(second) or not alike:
            raise InputError(
                "OPTTokenizer", [f"text_pair: expected a pair for each text ({len(first)}), got {len(second)}"]
            )
        special = template.special_count(pair=text_pair is not None)
        return [template.join(*layout.cut(a, b, special)) for a, b in zip(first, second, strict=True)]

    def _encode_texts(self, name: str, text) -> list[list[int]]:
        texts = self._prefixed(_checked_texts(name, text))
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _prefixed(self, texts: list[str]) -> list[str]:
        return [" " + text for text in texts] if self.add_prefix_space else texts

    # -- ids to text --------------------------------------------------------------------------------------------------

    def decode(
        self, token_ids, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> str:
        """The text of an id or of one row of ids: a list, or an array of any framework.

        Bytes that are no UTF-8 become U+FFFD. `clean_up_tokenization_spaces` (None: as set) removes spaces before
        punctuation, which loses information. Ids that only pad the embedding decode to "".

        Raises:
            InputError: lists the ids that are outside the vocabulary.
        """
        row = self._checked_ids(as_lists(token_ids))
        row = self._without_special(row) if skip_special_tokens else row
        text = self._backend.decode(row, skip_special_tokens=False)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        for spaced, joined in _CLEANED if clean_up_tokenization_spaces else ():
            text = text.replace(spaced, joined)
        return text

    def batch_decode(self, sequences, **options) -> list[str]:
        """The text of each row of `sequences`: a list of rows, or an array (B, T); `options` are those of `decode`."""
        return [self.decode(row, **options) for row in as_lists(sequences)]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        return self._backend.decoder.decode(list(tokens))


def _checked_texts(name: str, text) -> list[str]:
    if isinstance(text, str):
        _check_text(name, text)
        return [text]
    if not isinstance(text, (list, tuple)):
        raise InputError("OPTTokenizer", [f"{name}: expected a string or a list of strings, got {type(text).__name__}"])
    for index, single in enumerate(text):
        _check_text(f"{name}[{index}]", single)
    return list(text)


def _check_text(name: str, text) -> None:
    if not isinstance(text, str):
        raise InputError("OPTTokenizer", [f"{name}: expected a string, got {type(text).__name__}"])
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        problem = f"{name}: expected valid Unicode, got the lone surrogate {text[at]!r} at position {at}"
        raise InputError("OPTTokenizer", [problem]) from None
