"""Models of Hugging Face transformers 4.57.6 with the random weights that the harness gives to ours.

The PyTorch ones run in float64 with SDPA, where their softmax stays in float64: an oracle independent of ours to 1e-12.
"Eager" rounds its softmax to float32, as published. Defects of that version are named in the tests that meet them.
"""

from functools import lru_cache

import numpy as np
import pytest
from harness import Backend, config_of, mask_named, rounded_weights, token_ids

from opt_core import OPTConfig
from opt_core.schema import published_name

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CLASS_OF_TASK = {
    "base": "OPTModel",
    "causal-lm": "OPTForCausalLM",
    "sequence-classification": "OPTForSequenceClassification",
    "question-answering": "OPTForQuestionAnswering",
}


def published_config(config: OPTConfig, **options):
    return transformers.OPTConfig(**config.to_dict(), **options)


def published_model(config: OPTConfig, task: str = "causal-lm", *, attention: str = "sdpa", dtype=torch.float64):
    """The published PyTorch class with the weights of `harness.rounded_weights`, in evaluation mode."""
    # Skips the published initialisation, which fails on norms without weights (`NoneType` has no `data`).
    with transformers.modeling_utils.no_init_weights():
        model = getattr(transformers, CLASS_OF_TASK[task])(published_config(config, attn_implementation=attention))
    weights = {published_name(name, task): torch.tensor(w) for name, w in rounded_weights(config, task).items()}
    if task == "causal-lm" and config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.tie_weights()  # skipped with the initialisation
    return model.to(dtype).eval()


@lru_cache
def published_logits(variant: str, mask_name: str) -> np.ndarray:
    """Float64 logits [B, T, V] of the harness' tokens; rows of padding hold what that version puts there."""
    config, mask = config_of(variant), mask_named(mask_name)
    mask = None if mask is None else torch.tensor(mask)
    with torch.no_grad():
        return published_model(config)(torch.tensor(token_ids(config)), attention_mask=mask).logits.numpy()


def real_rows(mask_name: str, shape: tuple[int, int]) -> np.ndarray:
    mask = mask_named(mask_name)
    return np.ones(shape, bool) if mask is None else mask.astype(bool)


@lru_cache
def our_model(backend: Backend, variant: str, task: str = "causal-lm", attention: str = "sdpa", **changes):
    return backend.random_model(config_of(variant, **changes), task, attn_implementation=attention)
