"""Backends without a framework that can be made to compute something wrong."""

import numpy as np
from harness import config_of

from opt_core.reference import Reference, causal_lm_loss
from opt_core.synthetic import random_tensors
from opt_zoo.backends import BACKENDS, Outputs


class FakeModel:
    """A model of some backend: the reference itself, in float64."""

    def __init__(self, reference: Reference):
        self.reference = reference

    def __call__(self, input_ids, attention_mask=None, labels=None) -> Outputs:
        out = self.reference(input_ids, attention_mask)
        logits_BTV = self.reference.logits(out.last_hidden_state)
        return Outputs(logits_BTV, out.hidden_states, causal_lm_loss(logits_BTV, labels, attention_mask))

    def generate(self, input_ids, attention_mask=None, max_new_tokens=20) -> np.ndarray:
        ids_BS, mask_BS = input_ids, attention_mask
        for _ in range(max_new_tokens):
            logits_BTV = self.reference.logits(self.reference(ids_BS, mask_BS).last_hidden_state)
            ids_BS = np.concatenate([ids_BS, logits_BTV[:, -1:].argmax(-1)], axis=1)
            mask_BS = np.concatenate([mask_BS, np.ones_like(mask_BS[:, :1])], axis=1)
        return ids_BS


class FakeBackend:
    """Stands in for a backend, with `changes` made to its weights, and `model_class` in place of an honest model."""

    name, versions = "fake", {}

    def __init__(self, model_class=FakeModel, **changes):
        self.model_class, self.changes = model_class, changes

    def use_full_float32(self):
        pass

    def load(self, source, *, dtype, attn_implementation):
        config = config_of()
        weights = dict(random_tensors(config))
        weights.update({name: change(weights[name]) for name, change in self.changes.items()})
        return self.model_class(Reference(config, weights))


class BackendOnAlteredWeights:
    """A real backend that loads a checkpoint in which one value was changed."""

    def __init__(self, name: str, folder, weight: str):
        self._backend, self._folder, self._weight = BACKENDS[name], folder, weight

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def load(self, source, **options):
        from conversion import open_checkpoint, write_checkpoint

        with open_checkpoint(source) as opened:
            tensors = {name: opened.read(name).copy() for name in opened.shapes}
            tensors[self._weight].flat[0] += 1
            write_checkpoint(self._folder, opened.config, tensors, overwrite=True)
        return self._backend.load(self._folder, **options)
