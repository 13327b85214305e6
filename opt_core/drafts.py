"""Where the drafts of assisted decoding come from: a smaller model, or the text itself.

A draft is a guess at the next few tokens of one text; `opt_core.assisted` says which of them are right.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from opt_core.generation_request import GenerationRequest
from opt_core.logits_pipeline import apply_rules
from opt_core.prefix import Prefix
from opt_core.prompting import begun
from opt_core.sampling import Noise, softmax
from opt_core.stepper import Stepper

Draft = list[int]


class Drafter(Protocol):
    def propose(self, prefixes: Sequence[Prefix], ended_R: np.ndarray, most: int) -> list[Draft]:
        """At most `most` tokens, from 0, for each text (a prefix of one row); none for texts that have ended."""

    def learn(self, all_were_right: bool) -> None:
        """Told after each verification, to draft more or less the next time."""


class PromptLookup:
    """Drafts what followed the last tokens where the text had them before; the first place, the longest match.

    Source: github.com/apoorvumang/prompt-lookup-decoding; `prompt_lookup_num_tokens`, `max_matching_ngram_size` (2).
    """

    def __init__(self, request: GenerationRequest):
        self.number = request.settings.prompt_lookup_num_tokens or 0
        self.longest = request.settings.max_matching_ngram_size or 2

    def propose(self, prefixes: Sequence[Prefix], ended_R: np.ndarray, most: int) -> list[Draft]:
        most = min(most, self.number)
        return [[] if end else self._look_up(p.text(0), most) for p, end in zip(prefixes, ended_R, strict=True)]

    def learn(self, all_were_right: bool) -> None:
        pass

    def _look_up(self, text: np.ndarray, most: int) -> Draft:
        for size in range(min(self.longest, len(text) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            found = np.flatnonzero((windows == text[-size:]).all(1))
            if len(found):
                return text[found[0] + size :][:most].tolist()
        return []


class ModelDraft:
    """Drafts with a smaller model, by the same rules: the best token, or the one sampled with the same random numbers.

    A draft ends early after an id that ends texts, and after a token of less than `assistant_confidence_threshold`.
    """

    def __init__(self, request: GenerationRequest, stepper: Stepper, noise: Noise):
        self.request, self.stepper, self.noise = request, stepper, noise
        self.number = request.settings.num_assistant_tokens
        texts, _ = begun(request, stepper)
        self.fed_R = texts.lengths_R
        self.is_new = True

    def propose(self, prefixes: Sequence[Prefix], ended_R: np.ndarray, most: int) -> list[Draft]:
        prefixes, drafts = list(prefixes), [Draft() for _ in prefixes]
        going_R, most = ~ended_R, min(most, self.number)
        logits_RV = self._catch_up(prefixes, ended_R)
        for place in range(most):
            tokens_R = np.full(len(prefixes), self.request.plan.pad_token_id)
            for row in np.flatnonzero(going_R).tolist():
                token, share = self._guess(prefixes[row], logits_RV[row], row)
                drafts[row].append(token)
                tokens_R[row], prefixes[row] = token, prefixes[row].extended(np.array([token]))
                going_R[row] = token not in self.request.plan.eos_token_ids and share >= self._threshold
            if place == most - 1 or not going_R.any():
                break
            logits_RV = self._feed(tokens_R[:, None])
        return drafts

    def learn(self, all_were_right: bool) -> None:
        """The heuristic of transformers: two more tokens after a draft that was all right, one less otherwise."""
        if self.request.settings.num_assistant_tokens_schedule != "constant":
            self.number = self.number + 2 if all_were_right else max(1, self.number - 1)

    @property
    def _threshold(self) -> float:
        return self.request.settings.assistant_confidence_threshold or 0.0

    def _catch_up(self, prefixes: list[Prefix], ended_R: np.ndarray) -> np.ndarray:
        """Forgets what was drafted in vain, and feeds the newest token of each row; logits [R, V] after it.

        A draft that was all right lacks its last token in the cache, so the newest two are fed, whatever happened.
        An ended row falls back to one token, and stays clear of the last position.
        """
        lengths_R = np.array([len(prefix.text(0)) for prefix in prefixes])
        behind = 1 if self.is_new else 2
        kept_R = np.where(ended_R, 1, lengths_R - behind)
        if (kept_R != self.fed_R).any():
            self.stepper.truncate(kept_R)
            self.fed_R = kept_R
        self.is_new = False
        return self._feed(np.stack([prefix.ids_RS[0, -behind:] for prefix in prefixes]))

    def _feed(self, tokens_RT: np.ndarray) -> np.ndarray:
        self.fed_R = self.fed_R + tokens_RT.shape[1]
        return self.stepper.step(tokens_RT).logits[:, -1]

    def _guess(self, prefix: Prefix, logits_V: np.ndarray, row: int) -> tuple[int, float]:
        """The next token of a row, and its probability."""
        scores_V = apply_rules(self.request.rules, prefix, logits_V[None].copy())[0]
        if self.request.settings.do_sample:
            token = self.noise.sampled(row, prefix.new_tokens, scores_V)
        else:
            token = int(scores_V.argmax())
        return token, float(softmax(scores_V)[token])
