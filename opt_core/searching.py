"""Generation with any strategy, one host loop for all frameworks: `search` for the whole text, `stream` for its tokens.

Greedy search and sampling are here; beam, contrastive and assisted search have their own modules. What decides a token
is NumPy on the host, given logits by a `Stepper`; so that frameworks whose logits agree write the same text.
"""

from collections.abc import Iterator
from itertools import count

import numpy as np

from opt_core.assisted import assisted_tokens
from opt_core.beam_search import beam_search
from opt_core.contrastive_search import contrastive_tokens
from opt_core.errors import InputError
from opt_core.generation_options import ASSISTED, BEAM, CONTRASTIVE
from opt_core.generation_output import GenerateOutput, Record
from opt_core.generation_request import GenerationRequest
from opt_core.prompting import begun
from opt_core.sampling import Noise, choose_best, choose_sampled
from opt_core.stepper import Stepper

Tokens = Iterator[np.ndarray]  # [R] int64 for each step


def search(request: GenerationRequest, stepper: Stepper, draft: Stepper | None = None) -> GenerateOutput:
    """Runs a request to its end. `draft` steps the assistant model, where the request has one."""
    if request.strategy == BEAM:
        return beam_search(request, stepper)
    record = Record(request.rules, request.settings)
    prompt_RT = np.repeat(request.plan.input_ids, request.rows_per_prompt, axis=0)
    if request.streamer is not None:
        request.streamer.put(prompt_RT)
    columns = []
    for tokens_R in _tokens(request, stepper, draft, record):
        columns.append(tokens_R)
        if request.streamer is not None:
            request.streamer.put(tokens_R)
    if request.streamer is not None:
        request.streamer.end()
    return record.output(np.concatenate([prompt_RT, np.stack(columns, axis=1)], axis=1))


def stream(request: GenerationRequest, stepper: Stepper, draft: Stepper | None = None) -> Tokens:
    """Yields the new tokens [R] int64 of each step as soon as they are known; ended rows give the padding id.

    Raises:
        InputError: beam search, which does not know its text before the end.
    """
    if request.strategy == BEAM:
        raise InputError("generate", ["stream: beam search does not know its text before the end"])
    kept = request.settings.replace(output_scores=False, output_logits=False)
    return _tokens(request, stepper, draft, Record(request.rules, kept))


def _tokens(request: GenerationRequest, stepper: Stepper, draft: Stepper | None, record: Record) -> Tokens:
    if request.strategy == CONTRASTIVE:
        return contrastive_tokens(request, stepper, record)
    if request.strategy == ASSISTED:
        return assisted_tokens(request, stepper, draft, record)
    return sampled_tokens(request, stepper, record)


def sampled_tokens(request: GenerationRequest, stepper: Stepper, record: Record) -> Tokens:
    """Greedy search or sampling: yields the tokens [R] of each step."""
    plan = request.plan
    noise = Noise(request.seeds, len(plan.input_ids), request.rows_per_prompt)
    prefix, out = begun(request, stepper)
    logits_RV, ended_R = out.logits, np.zeros(len(out.logits), bool)
    for step in count():
        scores_RV = record.processed(prefix, logits_RV)
        if request.settings.do_sample:
            tokens_R = choose_sampled(scores_RV, noise, step, ~ended_R)
        else:
            tokens_R = choose_best(scores_RV, ~ended_R)
        tokens_R = np.where(ended_R, plan.pad_token_id, tokens_R)
        prefix = prefix.extended(tokens_R)
        ended_R = ended_R | request.stopping(prefix, record.scores_so_far)
        yield tokens_R
        if ended_R.all():
            return
        logits_RV = stepper.step(tokens_R[:, None]).logits[:, 0]
