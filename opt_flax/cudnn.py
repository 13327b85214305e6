"""Causal attention by cuDNN's fused kernels, in half precision on NVIDIA GPUs, through `jax.nn.dot_product_attention`.

What that function does not offer is not done here: documents within a row, which would need a mask of T x T numbers,
and several queries over a cache, since its causal flag counts queries from slot 0.
"""

import functools
import logging

import jax
import jax.numpy as jnp
from jax import Array

HALF = (jnp.float16, jnp.bfloat16)

logger = logging.getLogger(__name__)


def cudnn_problems(
    dtype, head_size: int, capability: tuple[int, int] | None, documents: bool, cached_tokens: int
) -> list[str]:
    """Why cuDNN cannot run, beyond the absence of a GPU (jax/_src/cudnn/fused_attention_stablehlo.py, jax 0.10)."""
    largest = 128 if capability and capability < (9, 0) else 256
    problems = []
    if dtype not in HALF:
        problems.append(f"expects float16 or bfloat16, got {jnp.dtype(dtype).name}")
    if head_size % 8 or head_size > largest:
        problems.append(f"expects a head size that is a multiple of 8 up to {largest}, got {head_size}")
    if documents:
        problems.append("expects one document a row, got several (first_BT)")
    if cached_tokens > 1:
        problems.append(f"expects one token at a time behind a cache, got {cached_tokens}")
    return problems


@functools.cache
def compile_problems() -> tuple[str, ...]:
    """Why the kernels do not compile here, forward and backward; tried once a process, without running them.

    With some builds for CUDA 13 they do not (https://github.com/jax-ml/jax/issues/32430).
    """
    x_BNTH = jax.ShapeDtypeStruct((1, 1, 2, 64), jnp.bfloat16)
    gradients = jax.grad(lambda *qkv_BNTH: cudnn_attention(*qkv_BNTH).astype(jnp.float32).sum(), (0, 1, 2))
    try:
        with jax.default_device(jax.local_devices()[0]):
            jax.jit(gradients).lower(x_BNTH, x_BNTH, x_BNTH).compile()
    except Exception as error:  # of JAX, XLA or cuDNN, each with its own classes
        reason = f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"
        logger.warning("cuDNN's attention does not compile here, sdpa and flash_attention_2 go without it: %s", reason)
        return (f"expects a cuDNN whose attention compiles, got {reason}",)
    return ()


def cudnn_attention(q_BNTH: Array, k_BNTH: Array, v_BNTH: Array) -> Array:
    """Attention of T tokens among themselves; the query is scaled already.

    An odd T is filled up, with a token that no other sees: for a gradient, JAX asks for an even one (jax 0.10, which
    takes the absence of a bias for one).
    """
    T = q_BNTH.shape[2]
    rows = (jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, T % 2), (0, 0))) for x_BNTH in (q_BNTH, k_BNTH, v_BNTH))
    q_BTNH, k_BTNH, v_BTNH = (x_BNTH.swapaxes(1, 2) for x_BNTH in rows)  # XLA undoes `split_heads`
    out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, scale=1.0, is_causal=True, implementation="cudnn")
    return out_BTNH[:, :T].swapaxes(1, 2)


def cudnn_decode(q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, lengths_B: Array) -> Array:
    """Attention of one token that follows `lengths_B` cached ones, to itself and to those.

    JAX gives cuDNN its arrays as [B, S, N, H] only, so the whole cache is copied in every step (jax 0.10).
    """
    q_BTNH, k_BSNH, v_BSNH = (x_BNSH.swapaxes(1, 2) for x_BNSH in (q_BNTH, k_BNSH, v_BNSH))
    filled_B = jnp.minimum(lengths_B + 1, k_BNSH.shape[2]).astype(jnp.int32)
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSNH, v_BSNH, scale=1.0, key_value_seq_lengths=filled_B, implementation="cudnn"
    )
    return out_BTNH.swapaxes(1, 2)
