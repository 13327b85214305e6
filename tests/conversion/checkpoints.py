"""Tiny checkpoints for the tests of `conversion`: every variant of OPT, sizes distinct primes wherever OPT allows."""

import ml_dtypes
import numpy as np

from opt_core import OPTConfig
from opt_core.synthetic import random_tensors

TINY = dict(
    vocab_size=101, hidden_size=22, num_hidden_layers=3, ffn_dim=31, max_position_embeddings=37, num_attention_heads=2
)
VARIANTS = {
    "pre-norm": {},
    "350m-style": dict(word_embed_proj_dim=13, do_layer_norm_before=False),
    "no-final-norm": dict(_remove_final_layer_norm=True),
    "no-bias": dict(enable_bias=False),
    "non-affine": dict(layer_norm_elementwise_affine=False),
    "untied": dict(tie_word_embeddings=False),
    "pruned": dict(pruned_heads={0: [1], 2: [0]}),
}
NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def config_of(variant: str = "pre-norm", **more) -> OPTConfig:
    return OPTConfig(**{**TINY, **VARIANTS[variant], **more})


def tensors_of(config: OPTConfig, task: str = "causal-lm", dtype: str = "float32") -> dict[str, np.ndarray]:
    return {name: array.astype(NUMPY_DTYPES[dtype]) for name, array in random_tensors(config, task, seed=7)}


def assert_holds(checkpoint, tensors: dict[str, np.ndarray]) -> None:
    """The checkpoint's tensors are `tensors`, bit for bit."""
    assert set(checkpoint.shapes) == set(tensors)
    for name, expected in tensors.items():
        got = checkpoint.read(name)
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        assert got.tobytes() == expected.tobytes(), name
