"""The files of a tokenizer: read them, check them, write them. Nothing here encodes text.

Read are `tokenizer.json`, or else `vocab.json` with `merges.txt`; beside them `tokenizer_config.json`,
`special_tokens_map.json` and `added_tokens.json`, in the layout of Hugging Face transformers 4.57.6. Of a KerasHub
preset, whose `tokenizer.json` is another kind of file, the vocabulary and the merges among its assets are read.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from opt_core.errors import ConfigError, raise_if
from opt_core.json_file import read_json_object
from opt_core.small_files import write_whole
from opt_core.tokenizer_settings import FLAGS, OPT_ROLES, ROLES, SETTINGS, TokenizerError, as_added_token, is_token
from opt_core.tokenizer_template import Template, post_processor_of, template_of

VOCAB, MERGES, TOKENIZER = "vocab.json", "merges.txt", "tokenizer.json"
CONFIG, SPECIAL_TOKENS, ADDED_TOKENS = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FILES = (VOCAB, MERGES, TOKENIZER, CONFIG, SPECIAL_TOKENS, ADDED_TOKENS)
PRESET_FILES = ("assets/tokenizer/vocabulary.json", "assets/tokenizer/merges.txt")  # of KerasHub

_SHOWN = 5  # of many problems of one kind, how many are spelt out


@dataclass
class TokenizerParts:
    """What the files say: the backend, the template of `tokenizer.json` (adding nothing without one), and settings."""

    backend: Tokenizer
    template: Template = field(default_factory=Template)
    settings: dict[str, Any] = field(default_factory=dict)
    added_tokens: dict[int, AddedToken] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)  # fields that nothing here obeys, kept for saving
    source: str = "OPTTokenizer"  # how errors call it


# -- finding ----------------------------------------------------------------------------------------------------------


def bpe_files(folder: Path) -> tuple[Path, Path] | None:
    """The vocabulary and the merges in a folder or a KerasHub preset; None where not both are there."""
    published, preset = ((folder / vocab, folder / merges) for vocab, merges in ((VOCAB, MERGES), PRESET_FILES))
    return next((pair for pair in (published, preset) if all(path.is_file() for path in pair)), None)


def is_preset(folder: Path) -> bool:
    """True where a folder has the tokenizer of a KerasHub preset and no other vocabulary."""
    found = bpe_files(folder)
    return found is not None and found[0] != folder / VOCAB


# -- reading ----------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> TokenizerParts:
    """Reads the tokenizer files of a folder; `tokenizer.json` wins over `vocab.json`, as it holds all of it.

    Raises:
        TokenizerError: names the file, and what it should hold.
    """
    if is_preset(folder):
        return TokenizerParts(build_backend(*(folder / name for name in PRESET_FILES)), source=str(folder))
    if (folder / TOKENIZER).is_file():
        parts = _read_tokenizer_json(folder / TOKENIZER)
    elif pair := bpe_files(folder):
        parts = TokenizerParts(build_backend(*pair))
    else:
        found = ", ".join(name for name in FILES if (folder / name).is_file()) or "none of them"
        raise TokenizerError(str(folder), [f"expected {TOKENIZER}, or {VOCAB} and {MERGES}, got {found}"])
    parts.source = str(folder)
    _apply_side_files(parts, folder)
    return parts


def build_backend(vocab: str | Path | Mapping[str, int], merges: str | Path | Iterable) -> Tokenizer:
    """A byte-level BPE of a vocabulary and its merges: paths of files, or a dict and a list of pairs or "a b" lines.

    Raises:
        TokenizerError: ids that are not 0 to n-1, or merges of tokens outside the vocabulary.
        FileNotFoundError: no such file.
    """
    vocab_name, merges_name = _name_of(vocab, "vocab"), _name_of(merges, "merges")
    vocab = dict(vocab) if isinstance(vocab, Mapping) else _read_json(Path(vocab))
    raise_if(TokenizerError, vocab_name, _vocab_problems(vocab))
    lines = _read_merges(Path(merges)) if isinstance(merges, (str, Path)) else list(merges)
    pairs = [tuple(line.split(" ")) if isinstance(line, str) else tuple(line) for line in lines]
    raise_if(TokenizerError, merges_name, _merge_problems(pairs, vocab))
    backend = Tokenizer(BPE(vocab, pairs))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = ByteLevelDecoder()
    return backend


def _name_of(source, name: str) -> str:
    return str(source) if isinstance(source, (str, Path)) else name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path)
    except ConfigError as error:
        raise TokenizerError(error.title, error.problems) from None


def _read_merges(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(str(path), [f"expected UTF-8 text, got {error}"]) from None
    lines = lines[1:] if lines[0].startswith("#version") else lines
    return lines[:-1] if lines and lines[-1] == "" else lines


def _vocab_problems(vocab: Mapping) -> list[str]:
    wrong = [(token, i) for token, i in vocab.items() if not isinstance(i, int) or isinstance(i, bool)]
    if wrong:
        return [f"id of {token!r}: expected an integer, got {i!r}" for token, i in wrong[:_SHOWN]]
    missing = sorted(set(range(len(vocab))) - set(vocab.values()))
    if missing or not vocab:
        return [f"ids: expected each of 0 to {len(vocab) - 1} once, got none for {missing[:_SHOWN]}"]
    return []


def _merge_problems(pairs: Sequence[tuple], vocab: Mapping[str, int]) -> list[str]:
    problems = []
    for number, pair in enumerate(pairs, 1):
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            problems.append(f"merge {number}: expected two tokens, got {' '.join(map(str, pair))!r}")
        elif not (pair[0] in vocab and pair[1] in vocab and pair[0] + pair[1] in vocab):
            missing = [token for token in (*pair, pair[0] + pair[1]) if token not in vocab]
            problems.append(f"merge {number}: expected tokens of the vocabulary, got {', '.join(map(repr, missing))}")
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return problems[:_SHOWN] + more


def _read_tokenizer_json(path: Path) -> TokenizerParts:
    content = _read_json(path)
    try:
        backend = Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the binding raises bare Exception for whatever it cannot read
        raise TokenizerError(str(path), [f"expected a file of the tokenizers library, got: {error}"]) from None
    try:
        template = template_of(content.get("post_processor"))
    except ValueError as error:
        raise TokenizerError(str(path), [str(error)]) from None
    return TokenizerParts(backend, template, _settings_in(content, template, backend))


def _settings_in(content: Mapping[str, Any], template: Template, backend: Tokenizer) -> dict[str, Any]:
    """What a `tokenizer.json` says of settings: no role but those it shows, and BOS where its template has it."""
    padding, words, first = content.get("padding") or {}, content.get("pre_tokenizer") or {}, template.single[0]
    settings = {**dict.fromkeys(ROLES), "pad_token": padding.get("pad_token"), "add_bos_token": None}
    settings["add_prefix_space"] = words.get("type") == "ByteLevel" and words["add_prefix_space"]
    settings["padding_side"] = str(padding.get("direction", "right")).lower()
    if template.single == (backend.token_to_id(OPT_ROLES["bos_token"]), "A"):
        settings |= {**OPT_ROLES, "add_bos_token": True}  # OPT's own file, which may lie there alone
    elif not isinstance(first, str):
        settings["bos_token"] = backend.id_to_token(first)
    return settings


def _apply_side_files(parts: TokenizerParts, folder: Path) -> None:
    """Lays the other files over `parts`, in the published loader's order of precedence."""
    config = _read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "added_tokens_decoder" not in config and (folder / SPECIAL_TOKENS).is_file():
        config |= _read_json(folder / SPECIAL_TOKENS)
    parts.added_tokens = _added_tokens(config.pop("added_tokens_decoder", None), folder)
    for name, value in config.items():
        (parts.settings if name in SETTINGS else parts.extra)[name] = value


def _added_tokens(listed: Any, folder: Path) -> dict[int, AddedToken]:
    if listed is None:
        path = folder / ADDED_TOKENS
        listed = {i: token for token, i in _read_json(path).items()} if path.is_file() else {}
    wrong = dict(listed=listed) if not isinstance(listed, Mapping) else {}
    wrong = wrong or {i: token for i, token in listed.items() if not str(i).isdigit() or not is_token(token)}
    problems = [f"added tokens: expected ids with tokens, got {i!r}: {token!r}" for i, token in wrong.items()]
    raise_if(TokenizerError, str(folder), problems)
    return {int(i): as_added_token(token) for i, token in listed.items()}


# -- writing ----------------------------------------------------------------------------------------------------------


def write_tokenizer(
    folder: Path, backend: Tokenizer, template: Template, settings: Mapping[str, Any], extra: Mapping[str, Any]
) -> tuple[str, ...]:
    """Writes the files that both classes of transformers and this package read back; returns their paths.

    A tokenizer that is no byte-level BPE has no `vocab.json` and `merges.txt`.
    """
    content = json.loads(backend.to_str())
    if template_of(content["post_processor"]) != template:
        content["post_processor"] = post_processor_of(template, backend.id_to_token)
    byte_level = content["model"]["type"] == "BPE" and (content["pre_tokenizer"] or {}).get("type") == "ByteLevel"
    if byte_level:
        content["pre_tokenizer"]["add_prefix_space"] = settings["add_prefix_space"]
    files = {TOKENIZER: _json(content), **_side_files(backend, settings, extra, byte_level)}
    if byte_level:
        files |= {VOCAB: _vocab_text(content["model"]), MERGES: _merges_text(content["model"])}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_whole(folder / name, text)
    return tuple(str(folder / name) for name in files)


def _side_files(
    backend: Tokenizer, settings: Mapping[str, Any], extra: Mapping[str, Any], byte_level: bool
) -> dict[str, str]:
    named = {name: settings[name] for name in (*ROLES, "additional_special_tokens") if settings[name]}
    added = {str(i): _token_fields(token) for i, token in sorted(backend.get_added_tokens_decoder().items())}
    kind = "GPT2Tokenizer" if byte_level else "PreTrainedTokenizerFast"
    config = {"tokenizer_class": kind, **extra, **settings, "added_tokens_decoder": added}
    config = {name: value for name, value in config.items() if value is not None or name in ROLES}
    return {CONFIG: _json(config), SPECIAL_TOKENS: _json(named)}


def _token_fields(token: AddedToken) -> dict[str, Any]:
    return {"content": token.content, **{flag: getattr(token, flag) for flag in FLAGS}}


def _vocab_text(model: Mapping[str, Any]) -> str:
    return json.dumps(dict(sorted(model["vocab"].items(), key=lambda entry: entry[1])), ensure_ascii=False)


def _merges_text(model: Mapping[str, Any]) -> str:
    lines = (line if isinstance(line, str) else " ".join(line) for line in model["merges"])
    return "\n".join(["#version: 0.2", *lines, ""])  # the published slow class drops the first line unread


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
