"""A stepper without a framework: the float64 reference with the texts themselves for a cache, all computed anew."""

import numpy as np
from harness import reference_of

from opt_core.checks import Known
from opt_core.generation_request import GenerationRequest, plan_request
from opt_core.reference import Reference
from opt_core.stepper import StepOutput


class ReferenceStepper:
    """Holds to the protocol strictly: it refuses what a cache could not do."""

    def __init__(self, config, scale: float = 1.0, reference: Reference | None = None):
        self.config, self.scale = config, scale
        self.reference = reference or reference_of(config)
        self.widths: list[int] = []  # tokens a row of each step

    def prefill(self, input_ids_RT, real_RT, capacity, *, output_hidden=False) -> StepOutput:
        self.capacity = capacity
        self.texts = [row[real].tolist() for row, real in zip(input_ids_RT, real_RT, strict=True)]
        assert all(self.texts)
        logits, hidden = self._run()
        last_R = np.array([len(text) - 1 for text in self.texts])
        hidden_RTE = np.zeros((*real_RT.shape, hidden.shape[-1]))
        for row, real in enumerate(real_RT):
            hidden_RTE[row, real] = hidden[row, : real.sum()]
        return read_only(logits[np.arange(len(last_R)), last_R], hidden_RTE if output_hidden else None)

    def step(self, tokens_RT, *, output_hidden=False) -> StepOutput:
        assert len(tokens_RT) == len(self.texts)
        self.widths.append(tokens_RT.shape[1])
        self.texts = [text + row.tolist() for text, row in zip(self.texts, tokens_RT, strict=True)]
        logits, hidden = self._run()
        columns = np.array([len(text) for text in self.texts])[:, None] + np.arange(-tokens_RT.shape[1], 0)
        rows = np.arange(len(self.texts))[:, None]
        return read_only(logits[rows, columns], hidden[rows, columns] if output_hidden else None)

    def reorder(self, rows_Q) -> None:
        self.texts = [list(self.texts[row]) for row in rows_Q]

    def truncate(self, lengths_R) -> None:
        assert all(1 <= length <= len(text) for length, text in zip(lengths_R, self.texts, strict=True))
        self.texts = [text[:length] for text, length in zip(self.texts, lengths_R, strict=True)]

    def _run(self):
        """Logits [R, T, V] and hidden states [R, T, E] of the texts, filled up on the right."""
        longest = max(map(len, self.texts))
        assert longest <= min(self.capacity, self.config.max_position_embeddings)
        ids = np.array([text + [0] * (longest - len(text)) for text in self.texts])
        hidden = self.reference(ids, ids * 0 + [[t < len(text) for t in range(longest)] for text in self.texts])
        hidden = hidden.last_hidden_state
        return (self.reference.logits(hidden) * self.scale).astype(np.float32), hidden


def read_only(logits, hidden) -> StepOutput:
    """As arrays that a framework hands out may be."""
    logits.flags.writeable = False
    return StepOutput(logits, hidden)


def known(values) -> Known | None:
    values = None if values is None else np.asarray(values)
    return None if values is None else Known(values.shape, str(values.dtype), values)


def request_of(config, ids, mask=None, **options) -> GenerationRequest:
    return plan_request(config, known(ids), known(mask), **options)
