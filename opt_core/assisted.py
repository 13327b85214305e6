"""Assisted decoding: several tokens of a draft are verified in one step of the model, and the text does not change.

A drafted token is accepted when it is the one that the model chooses there: the best, or the one that sampling finds
with the random numbers of that place. So greedy search, and sampling with a seed, write the same text with any draft as
without; a fortiori the law of sampling is preserved. A draft model samples with the same numbers, and then agrees with
probability (1 - d) / (1 + d) or more, at total variation d of the two distributions (Daliri, Musco and Suresh,
"Coupling without communication and drafter-invariant speculative decoding", arXiv:2408.07978); the rule of Leviathan et
al. (arXiv:2211.17192), 1 - d, would give a text that depends on the draft.

Rows advance by different numbers of tokens; each is verified on its own, as it would be alone.
"""

from collections.abc import Iterator

import numpy as np

from opt_core.drafts import Draft, Drafter, ModelDraft, PromptLookup
from opt_core.errors import InputError
from opt_core.generation_output import Record
from opt_core.generation_request import GenerationRequest
from opt_core.prefix import Prefix
from opt_core.prompting import begun
from opt_core.sampling import NO_TOKEN_LEFT, Noise
from opt_core.stepper import Stepper


def assisted_tokens(
    request: GenerationRequest, stepper: Stepper, draft: Stepper | None, record: Record
) -> Iterator[np.ndarray]:
    """Yields the tokens [R] of each step, as soon as every row has its own."""
    rows = AssistedRows(request, stepper, draft, record)
    made = 0
    while True:
        while made < rows.known_columns():
            column = [tokens[made] if made < len(tokens) else request.plan.pad_token_id for tokens in rows.tokens]
            rows.record_column(made)
            made += 1
            yield np.array(column)
        if rows.ended_R.all():
            return
        rows.advance()


class AssistedRows:
    """The texts of a request, each as far as it has come. The newest token of each is not in the cache yet."""

    def __init__(self, request: GenerationRequest, stepper: Stepper, draft: Stepper | None, record: Record):
        self.request, self.stepper, self.record = request, stepper, record
        self.noise = Noise(request.seeds, len(request.plan.input_ids), request.rows_per_prompt)
        texts, out = begun(request, stepper)
        rows = range(len(out.logits))
        self.prefixes = [texts.take(np.array([row])) for row in rows]
        self.tokens: list[list[int]] = [[] for _ in rows]
        self.seen: list[list[tuple]] = [[] for _ in rows]  # logits and scores of each token, where they are kept
        self.ended_R = np.zeros(len(rows), bool)
        self.fed_R = texts.lengths_R
        self.drafter: Drafter = PromptLookup(request) if draft is None else ModelDraft(request, draft, self.noise)
        for row in rows:
            self._verify(row, out.logits[row, None], Draft())

    def known_columns(self) -> int:
        """New tokens that every row has, or had before it ended."""
        lengths_R = np.array([len(tokens) for tokens in self.tokens])
        return int(lengths_R.max() if self.ended_R.all() else lengths_R[~self.ended_R].min())

    def advance(self) -> None:
        """Drafts, verifies, and forgets what was wrong: at least one more token for each row that goes on."""
        drafts = self._drafts()
        width = 1 + max(len(draft) for draft in drafts)
        tokens_RT = np.full((len(drafts), width), self.request.plan.pad_token_id)
        for row, draft in enumerate(drafts):
            tokens_RT[row, 0] = self.prefixes[row].ids_RS[0, -1]
            tokens_RT[row, 1 : 1 + len(draft)] = draft
        logits_RTV = self.stepper.step(tokens_RT).logits
        right_R = np.zeros(len(drafts), np.int64)
        for row in np.flatnonzero(~self.ended_R).tolist():
            right_R[row] = self._verify(row, logits_RTV[row], drafts[row]) - 1
        # An ended row needs its cache no more; one token of it stays clear of the last position.
        kept_R = np.where(self.ended_R, 1, self.fed_R + 1 + right_R)
        if (kept_R != self.fed_R + width).any():
            self.stepper.truncate(kept_R)
        self.fed_R = kept_R
        if width > 1:
            self.drafter.learn(all(len(draft) == right for draft, right in zip(drafts, right_R, strict=True)))

    def _drafts(self) -> list[Draft]:
        """A draft for each row, as long as there is use for it and room in the positions of every row."""
        live = np.flatnonzero(~self.ended_R)
        useful = self.request.plan.max_new_tokens - 1 - min(len(self.tokens[row]) for row in live)
        room = self.request.max_positions - 1 - int(self.fed_R[live].max())
        if useful <= 0:
            return [Draft()] * len(self.prefixes)
        return self.drafter.propose(self.prefixes, self.ended_R, min(useful, room))

    def _verify(self, row: int, logits_TV: np.ndarray, draft: Draft) -> int:
        """Extends a row by the drafted tokens that are right and the one after them; returns how many that is."""
        number = 0
        for logits_V in logits_TV[: len(draft) + 1]:
            prefix = self.prefixes[row]
            raw = logits_V[None].copy() if self.record.logits is not None else None
            scores_1V = self.record.apply(prefix, logits_V[None].copy())
            token = self._decide(row, prefix, scores_1V)
            is_right = draft[number : number + 1] == [token]
            self.seen[row].append((raw, scores_1V if self.record.scores is not None else None))
            self.tokens[row].append(token)
            self.prefixes[row] = prefix.extended(np.array([token]))
            number += 1
            self.ended_R[row] = self.request.stopping(self.prefixes[row])[0]
            if self.ended_R[row] or not is_right:
                break
        return number

    def _decide(self, row: int, prefix: Prefix, scores_1V: np.ndarray) -> int:
        """The next token of a row."""
        if self.request.settings.do_sample:
            token = self.noise.sampled(row, prefix.new_tokens, scores_1V[0])
        else:
            token = int(scores_1V[0].argmax())
        if not scores_1V[0, token] > -np.inf:
            raise InputError("generate", [NO_TOKEN_LEFT.format(row=row)])
        return token

    def record_column(self, column: int) -> None:
        """Keeps logits and scores of one step of all rows; zero for rows that have ended."""
        for part, kept in enumerate((self.record.logits, self.record.scores)):
            if kept is not None:
                zero = np.zeros_like(next(seen for seen in self.seen if len(seen) > column)[column][part])
                kept.append(np.concatenate([seen[column][part] if column < len(seen) else zero for seen in self.seen]))
