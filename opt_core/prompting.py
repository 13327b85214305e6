"""How every search begins: the prompt is fed once, and each row of it repeated as often as it has texts to write."""

import numpy as np

from opt_core.generation_request import GenerationRequest
from opt_core.prefix import Prefix, prefix_of
from opt_core.stepper import StepOutput, Stepper


def begun(request: GenerationRequest, stepper: Stepper, *, output_hidden: bool = False) -> tuple[Prefix, StepOutput]:
    """The texts so far and what the model says after them, `rows_per_prompt` rows for each prompt; the cache has them.

    Hidden states, where they are asked for, have a row for each prompt.
    """
    plan, copies = request.plan, request.rows_per_prompt
    texts = prefix_of(plan.input_ids, plan.real, plan.pad_token_id)
    out = stepper.prefill(plan.input_ids, plan.real, plan.capacity, output_hidden=output_hidden)
    if copies == 1:
        return texts, out
    rows_R = np.repeat(np.arange(len(plan.input_ids)), copies)
    stepper.reorder(rows_R)
    return texts.take(rows_R), out._replace(logits=out.logits[rows_R])
