"""The tokens of a tokenizer: their ids, the special ones among them, and the roles that these play.

No text is encoded here; `opt_core.tokenizer` does that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from opt_core.errors import InputError, raise_if
from opt_core.tokenizer_settings import OPT_ROLES, ROLES, TokenizerError, as_added_token

_ROW_MULTIPLE = 128  # embeddings are padded to a multiple of 8 (published) up to 128 (common on GPUs)


def _token_property(role: str) -> property:
    """The text of a special token. Setting it changes the role only: texts are not split anew at that token."""

    def set_token(self: "TokensWithRoles", token: str | None) -> None:
        self._set_role(role, None if token is None else str(token))

    return property(lambda self: self._roles[role], set_token, doc=_token_property.__doc__)


def _token_id_property(role: str) -> property:
    """The id of a special token, None where the role is empty. Setting it gives the role to the token of that id."""

    def set_id(self: "TokensWithRoles", token_id: int | None) -> None:
        token = None if token_id is None else self._backend.id_to_token(self._checked_ids(token_id)[0])
        if token is None and token_id is not None:
            raise InputError("OPTTokenizer", [f"{role}_id: expected the id of a token, got {token_id}"])
        self._set_role(role, token)

    return property(lambda self: self._id_of_role(role), set_id, doc=_token_id_property.__doc__)


class TokensWithRoles:
    """Vocabulary and special tokens over a tokenizer of the `tokenizers` library."""

    bos_token, bos_token_id = _token_property("bos_token"), _token_id_property("bos_token")
    eos_token, eos_token_id = _token_property("eos_token"), _token_id_property("eos_token")
    unk_token, unk_token_id = _token_property("unk_token"), _token_id_property("unk_token")
    pad_token, pad_token_id = _token_property("pad_token"), _token_id_property("pad_token")

    def _take_tokens(
        self, backend: Tokenizer, added_tokens: Mapping[int, AddedToken], settings: Mapping[str, Any], source: str
    ) -> None:
        """Registers the added tokens, whose ids must come out as listed, then the tokens with roles."""
        self._backend, self._roles = backend, dict.fromkeys(ROLES)
        self.additional_special_tokens: tuple[str, ...] = ()
        problems = []
        for token_id, token in sorted(added_tokens.items()):
            self._add(token, special=token.special)
            if (got := backend.token_to_id(token.content)) != token_id:
                problems.append(f"added token {token.content!r}: expected the id {token_id}, got {got}")
        wanted = {role: as_added_token(settings[role]) for role in ROLES if settings[role] is not None}
        for role, token in wanted.items():
            if token.content in OPT_ROLES.values() and backend.token_to_id(token.content) is None:
                problems.append(f"{role}: expected an entry of the vocabulary, got {token.content!r}")
        raise_if(TokenizerError, source, problems)
        more = settings["additional_special_tokens"] or ()
        self.add_special_tokens({**wanted, "additional_special_tokens": more})

    def _set_role(self, role: str, token: str | None) -> None:
        if token is not None and self._backend.token_to_id(token) is None:
            problem = f"{role}: expected an entry of the vocabulary, got {token!r}; add_special_tokens adds a new one"
            raise InputError("OPTTokenizer", [problem])
        self._roles[role] = token
        model = self._backend.model
        if role == "unk_token" and isinstance(model, BPE) and token is not None:
            model.unk_token = token  # an id for each byte outside the vocabulary, which the library alone would drop

    def _id_of_role(self, role: str) -> int | None:
        return None if self._roles[role] is None else self._backend.token_to_id(self._roles[role])

    # -- vocabulary ---------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def __bool__(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The object of the `tokenizers` library."""
        return self._backend

    def get_vocab(self) -> dict[str, int]:
        """Every token with its id, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Ids of tokens; one that is not in the vocabulary has the id of `unk_token`, or None without one."""
        ids = (self._backend.token_to_id(token) for token in ([tokens] if isinstance(tokens, str) else tokens))
        known = [self.unk_token_id if token_id is None else token_id for token_id in ids]
        return known[0] if isinstance(tokens, str) else known

    def convert_ids_to_tokens(self, ids, skip_special_tokens: bool = False) -> str | list[str | None] | None:
        """Tokens of an id or a row of ids; None for an id that only pads the embedding.

        Raises:
            InputError: lists the ids that are outside the vocabulary.
        """
        ids = as_lists(ids)
        row = self._checked_ids(ids)
        row = self._without_special(row) if skip_special_tokens else row
        tokens = [self._backend.id_to_token(i) for i in row]
        return tokens[0] if isinstance(ids, int) and tokens else tokens

    def _checked_ids(self, ids) -> list[int]:
        """One row of ids: of tokens, or of the rows that pad an embedding to a multiple of 128."""
        row = [ids] if isinstance(ids, int) else ids
        if not isinstance(row, list) or not all(type(i) is int for i in row):
            raise InputError("OPTTokenizer", [f"token_ids: expected an integer or one row of integers, got {ids!r}"])
        size = max([len(self), *(i + 1 for i in self._backend.get_added_tokens_decoder())])
        end = -(-size // _ROW_MULTIPLE) * _ROW_MULTIPLE
        beyond = sorted({i for i in row if not 0 <= i < end})
        if beyond:
            problem = f"token_ids: expected 0 to {size - 1} (or to {end - 1}, rows without a token), got {beyond[:10]}"
            raise InputError("OPTTokenizer", [problem])
        return row

    # -- special tokens -----------------------------------------------------------------------------------------------

    @property
    def special_tokens_map(self) -> dict[str, str]:
        return {role: token for role, token in self._roles.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Tokens that `skip_special_tokens` leaves out: those with a role, and those added as special."""
        added = self._backend.get_added_tokens_decoder()
        special = [added[i].content for i in sorted(added) if added[i].special]
        return list(dict.fromkeys([*self.special_tokens_map.values(), *self.additional_special_tokens, *special]))

    @property
    def all_special_ids(self) -> list[int]:
        return [self._backend.token_to_id(token) for token in self.all_special_tokens]

    def _without_special(self, row: list[int]) -> list[int]:
        special = set(self.all_special_ids)
        return [i for i in row if i not in special]

    def add_tokens(self, tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        """Adds tokens that a text is split at; returns how many are new to the vocabulary.

        The model needs `resize_token_embeddings(len(tokenizer))` where its table is too short for them.
        """
        before = len(self)
        for token in [tokens] if isinstance(tokens, (str, AddedToken)) else tokens:
            self._add(as_added_token(token), special=special_tokens)
        return len(self) - before

    def add_special_tokens(self, tokens: Mapping[str, Any]) -> int:
        """Gives roles ("pad_token", ..., "additional_special_tokens") to tokens, adding what the vocabulary lacks."""
        unknown = sorted(tokens.keys() - {*ROLES, "additional_special_tokens"})
        raise_if(InputError, "OPTTokenizer", [f"tokens: expected one of {', '.join(ROLES)}, got {n}" for n in unknown])
        before, tokens = len(self), dict(tokens)
        more = [as_added_token(token) for token in tokens.pop("additional_special_tokens", ())]
        roles = {role: as_added_token(token) for role, token in tokens.items()}
        for token in (*roles.values(), *more):
            self._add(token, special=True)
        for role, token in roles.items():
            self._set_role(role, token.content)
        names = (*self.additional_special_tokens, *(token.content for token in more))
        self.additional_special_tokens = tuple(dict.fromkeys(names))
        return len(self) - before

    def _add(self, token: AddedToken, *, special: bool) -> None:
        if token.content not in {known.content for known in self._backend.get_added_tokens_decoder().values()}:
            (self._backend.add_special_tokens if special else self._backend.add_tokens)([token])


def as_lists(value):
    """Nested lists of Python numbers from the arrays of any framework, alone or inside a list."""
    if isinstance(value, (list, tuple)):
        return [item if type(item) is int else as_lists(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy, torch, JAX
        return value.tolist()
    return value.numpy().tolist() if hasattr(value, "numpy") else value  # TensorFlow
