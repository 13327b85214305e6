"""Beam search and beam sampling, with the rule of the PyTorch class of Hugging Face transformers 4.57.6.

The published TensorFlow and Flax classes follow other rules. Of each prompt K beams run. At each step the best C = K x
max(2, 1 + number of ids that end texts) continuations are candidates; those of the first K that end a text are
finished, with the score sum(log p) / length ** length_penalty, the length counted without the prompt; of the
others the best K run on. Reaching the maximal length, or any stopping criterion, ends a text as an id does, so running
beams compete with finished ones at the end. A prompt is closed, and takes no further finished beam, when

    early_stopping=False    the best running score over its present length ** length_penalty is no better than the worst
                            of K finished ones: a heuristic where length_penalty is not 0
    early_stopping="never"  the same with the maximal length where length_penalty > 0: no better text can come
    early_stopping=True     K beams have finished

Beam sampling draws the C candidates without replacement from the softmax of the summed scores; the first K drawn may
finish. Equal scores are taken in the order of beams and ids. The rest of its batch does not change a prompt's texts.
"""

from dataclasses import dataclass

import numpy as np

from opt_core.errors import InputError
from opt_core.generation_output import GenerateOutput, Record
from opt_core.generation_request import GenerationRequest
from opt_core.prefix import Prefix
from opt_core.prompting import begun
from opt_core.sampling import NO_TOKEN_LEFT, Noise, largest, log_softmax
from opt_core.stepper import Stepper

NONE = np.float32(-1e9)  # the score of a beam that is not there, as published


@dataclass
class Beams:
    """K texts of each prompt, best first. Arrays are [B, K], or [B, K, N] with N new tokens at most."""

    scores: np.ndarray  # float32
    tokens: np.ndarray  # int64, the padding id where none is yet
    origins: np.ndarray  # int64, the row that each token came from; -1 where none is yet
    ended: np.ndarray  # bool

    @classmethod
    def empty(cls, prompts: int, beams: int, length: int, pad_token_id: int) -> "Beams":
        shape = (prompts, beams, length)
        scores = np.full(shape[:2], NONE)
        return cls(scores, np.full(shape, pad_token_id), np.full(shape, -1), np.zeros(shape[:2], bool))

    def take(self, beams_BQ: np.ndarray) -> "Beams":
        """Of each prompt the beams listed, in that order."""
        rows_B1 = np.arange(len(beams_BQ))[:, None]
        return Beams(*(array[rows_B1, beams_BQ] for array in (self.scores, self.tokens, self.origins, self.ended)))

    def best(self, scores_BK: np.ndarray, number: int) -> "Beams":
        """The `number` best by `scores_BK`, which become their scores."""
        chosen = self.take(order := np.argsort(-scores_BK, axis=1, kind="stable")[:, :number])
        chosen.scores = np.take_along_axis(scores_BK, order, axis=1)
        return chosen

    def joined(self, other: "Beams") -> "Beams":
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Beams(*(np.concatenate(pair, axis=1) for pair in pairs))


def beam_search(request: GenerationRequest, stepper: Stepper) -> GenerateOutput:
    """Runs a request with beams; returns the best `num_return_sequences` texts of each prompt, best first."""
    plan, settings, record = request.plan, request.settings, Record(request.rules, request.settings)
    prompts, beams = len(plan.input_ids), settings.num_beams
    noise = Noise(request.seeds, prompts, beams)
    prompt, out = begun(request, stepper)
    logits_RV = out.logits
    running = Beams.empty(prompts, beams, plan.max_new_tokens, plan.pad_token_id)
    finished = Beams.empty(prompts, beams, plan.max_new_tokens, plan.pad_token_id)
    running.scores[:, 0] = 0  # all beams are equal at first: one of them speaks
    open_B = np.ones(prompts, bool)
    step = 0
    while True:
        texts = _texts(prompt, running, step)
        scores_RV = record.processed(texts, logits_RV, log_softmax(logits_RV))
        _check_tokens_are_left(scores_RV, running, open_B)
        candidates = _candidates(request, running, scores_RV, noise, step)
        ended_BC = request.stopping(_texts(prompt, candidates, step + 1), record.scores_so_far)
        candidates.ended = ended_BC.reshape(candidates.scores.shape)
        running = candidates.best(candidates.scores + candidates.ended * NONE, beams)
        finished = _finished(request, finished, candidates, open_B, step + 1)
        open_B = open_B & _can_improve(request, running, finished, step + 1)
        all_full = settings.early_stopping is True and finished.ended.all()
        if not open_B.any() or all_full or candidates.ended.all():
            return _output(request, record, finished)
        stepper.reorder(running.origins[:, :, step].reshape(-1))
        logits_RV = stepper.step(running.tokens[:, :, step].reshape(-1, 1)).logits[:, 0]
        step += 1


def _texts(prompt: Prefix, beams: Beams, length: int) -> Prefix:
    """The texts of all beams, one row each, with their first `length` new tokens; `prompt` may repeat each prompt."""
    prompts, number = beams.scores.shape
    copies = len(prompt.ids_RS) // prompts
    new_RN = beams.tokens[:, :, :length].reshape(prompts * number, length)
    texts = prompt.take(np.repeat(np.arange(prompts) * copies, number))
    return texts._replace(ids_RS=np.concatenate([texts.ids_RS, new_RN], axis=1))


def _check_tokens_are_left(scores_RV: np.ndarray, running: Beams, open_B: np.ndarray) -> None:
    best_BK = scores_RV.max(1).reshape(running.scores.shape) + running.scores
    for row in np.flatnonzero(open_B & ~(best_BK.max(1) > -np.inf)):
        raise InputError("generate", [NO_TOKEN_LEFT.format(row=row)])


def _candidates(request: GenerationRequest, running: Beams, scores_RV: np.ndarray, noise: Noise, step: int) -> Beams:
    """The C continuations of each prompt, best first or in the order of drawing, their new token filled in."""
    (prompts, beams), vocabulary = running.scores.shape, scores_RV.shape[1]
    number = min(max(2, 1 + len(request.plan.eos_token_ids)), vocabulary) * beams
    totals_BX = (scores_RV.reshape(prompts, beams, -1) + running.scores[..., None]).reshape(prompts, -1)
    if request.settings.do_sample:
        totals_BKV = totals_BX.reshape(prompts, beams, vocabulary)
        rows = [range(prompt * beams, (prompt + 1) * beams) for prompt in range(prompts)]
        pairs = zip(rows, totals_BKV, strict=True)
        chosen_BC = np.stack([noise.drawn(rows_K, step, totals_KV, number) for rows_K, totals_KV in pairs])
    else:
        chosen_BC = np.stack([largest(totals_X, number) for totals_X in totals_BX])
    candidates = running.take(chosen_BC // vocabulary)
    candidates.scores = np.take_along_axis(totals_BX, chosen_BC, axis=1)
    candidates.tokens[:, :, step] = chosen_BC % vocabulary
    candidates.origins[:, :, step] = chosen_BC // vocabulary + np.arange(prompts)[:, None] * beams
    return candidates


def _finished(request: GenerationRequest, finished: Beams, candidates: Beams, open_B: np.ndarray, length: int) -> Beams:
    """The best K of what had finished and of what finishes at this length."""
    beams = finished.scores.shape[1]
    may_finish = open_B if request.settings.early_stopping is not True else open_B & ~finished.ended.all(1)
    newly_BC = candidates.ended & (np.arange(candidates.ended.shape[1]) < beams) & may_finish[:, None]
    scores_BC = candidates.scores / np.float32(length**request.settings.length_penalty)
    new = Beams(np.where(newly_BC, scores_BC, -np.inf), candidates.tokens, candidates.origins, newly_BC)
    both = finished.joined(new)
    return both.best(both.scores, beams)


def _can_improve(request: GenerationRequest, running: Beams, finished: Beams, length: int) -> np.ndarray:
    """True [B] where a running beam may still become better than the worst finished one, or beams are missing."""
    penalty = request.settings.length_penalty
    if request.settings.early_stopping == "never" and penalty > 0:
        length = request.plan.max_new_tokens
    best_B = running.scores[:, 0] / np.float32(length**penalty)
    worst_B = np.where(finished.ended.all(1), finished.scores.min(1), NONE)
    return best_B > worst_B


def _output(request: GenerationRequest, record: Record, finished: Beams) -> GenerateOutput:
    returned = request.settings.num_return_sequences
    flat = [array[:, :returned].reshape(-1, array.shape[2]) for array in (finished.tokens, finished.origins)]
    length = int((flat[1] >= 0).sum(1).max())
    tokens_Rn, origins_Rn = (array[:, :length] for array in flat)
    prompt_RT = np.repeat(request.plan.input_ids, returned, axis=0)
    scores_R = finished.scores[:, :returned].reshape(-1) if request.settings.output_scores else None
    return record.output(
        np.concatenate([prompt_RT, tokens_Rn], axis=1), sequences_scores=scores_R, beam_indices=origins_Rn
    )
