"""Causal attention as fused kernels for NVIDIA GPUs, Pallas with Triton: FlashAttention-2 (Dao, arXiv:2307.08691).

Three kernels for any number of queries: the output (algorithm 1), the derivatives of keys and values, and those of
queries (algorithm 2, as two kernels, so that nothing is added up by atomics and a gradient is the same in every run).
A fourth for one query over a cache: programs that share a row's keys read only the blocks that are filled
(Flash-Decoding, Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).

Products of float32 are float32 (no TF32); sums are float32 for all dtypes. Block sizes are those usual for Triton on
Ampere and Hopper, not tuned. XLA does not split a kernel over devices: sharded arrays need `jax.shard_map` around it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton as plt
except ImportError:  # deprecated in jax 0.11, to be removed
    plt = None

LARGEST_HEAD = 128
LOWEST = -1e30  # a score that is not seen; not -inf, since the difference of two of them must be a number
DECODE_KEYS, DECODE_SLOTS = 64, 256  # keys that are held at a time, and slots that a program reads


def pallas_problems(dtype, head_size: int) -> list[str]:
    """Why the kernels cannot run, beyond the device."""
    problems = []
    if plt is None:
        problems.append(f"expects a JAX that has Pallas' Triton backend, got {jax.__version__}")
    if dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
        problems.append(f"expects float32, float16 or bfloat16, got {jnp.dtype(dtype).name}")
    if head_size > LARGEST_HEAD:
        problems.append(f"expects a head size of at most {LARGEST_HEAD}, got {head_size}")
    return problems


def gpu_problems() -> list[str]:
    """Why Pallas cannot lower for the GPU of this process: jax 0.11.0 and 0.11.1 know some by name, and no others."""
    try:
        if hasattr(plt, "get_gpu_info"):  # what lowering asks, from jax 0.11 on
            plt.get_gpu_info()
    except (RuntimeError, ValueError) as error:
        return [f"expects a GPU that Pallas knows, as jax 0.11.2 does all of NVIDIA's, got {error}"]
    return []


def pallas_attention(
    q_BNTH: Array,
    k_BNSH: Array,
    v_BNSH: Array,
    lengths_B: Array | None = None,
    first_BT: Array | None = None,
    interpret: bool = False,
) -> Array:
    """Attention [B, N, T, H] of T queries, scaled already, to the slots first_BT[b, t] to lengths_B[b] + t.

    Without `lengths_B`, keys are those of the same T tokens; without `first_BT`, which may not decrease along a row,
    every query sees slot 0. `interpret` runs the kernels as ordinary JAX, on any device, for tests.
    """
    if lengths_B is not None:
        lengths_B = lengths_B.astype(jnp.int32)
    if first_BT is not None:
        first_BT = first_BT.astype(jnp.int32)
    return _attend(q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT, interpret: bool) -> Array:
    return _forward(q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT, interpret)[0]


def _forward(q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT, interpret: bool) -> tuple[Array, tuple]:
    if q_BNTH.shape[2] == 1 and lengths_B is not None and first_BT is None:
        out_BNTH, log_sum_BNT = _decode(q_BNTH, k_BNSH, v_BNSH, lengths_B, interpret)
    else:
        out_BNTH, log_sum_BNT = _call(
            _forward_kernel,
            (q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT),
            (q_BNTH.shape, q_BNTH.dtype),
            (q_BNTH.shape[:3], jnp.float32),
            by_keys=False,
            interpret=interpret,
        )
    return out_BNTH, (q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT, out_BNTH, log_sum_BNT)


def _backward(interpret: bool, saved: tuple, d_out_BNTH: Array) -> tuple:
    q_BNTH, k_BNSH, v_BNSH, lengths_B, first_BT, out_BNTH, log_sum_BNT = saved
    mean_BNT = (out_BNTH.astype(jnp.float32) * d_out_BNTH.astype(jnp.float32)).sum(-1)  # of d_weights under the weights
    rows = (q_BNTH, k_BNSH, v_BNSH, d_out_BNTH, log_sum_BNT, mean_BNT, lengths_B, first_BT)
    outs = [(x.shape, x.dtype) for x in (q_BNTH, k_BNSH, v_BNSH)]
    (d_q_BNTH,) = _call(_d_queries_kernel, rows, outs[0], by_keys=False, interpret=interpret)
    d_k_BNSH, d_v_BNSH = _call(_d_keys_values_kernel, rows, *outs[1:], by_keys=True, interpret=interpret)
    return d_q_BNTH, d_k_BNSH, d_v_BNSH, None, None


_attend.defvjp(_forward, _backward)


def _forward_kernel(q_ref, k_ref, v_ref, lengths_ref, first_ref, out_ref, log_sum_ref, *, T, S, H, queries, keys):
    start, length = pl.program_id(2) * queries, _length(lengths_ref)
    q_TH, first_T = _rows(q_ref, start, queries, T, H), _first(first_ref, start, queries, T, S)

    def add_keys(j, carry):
        largest_T, sum_T, out_TH = carry
        k_SH, v_SH = (_rows(ref, j * keys, keys, S, H) for ref in (k_ref, v_ref))
        scores_TS = _mask(_dot(q_TH, k_SH.T), start + length, j * keys, first_T)
        larger_T = jnp.maximum(largest_T, scores_TS.max(-1))
        weights_TS = jnp.exp(scores_TS - larger_T[:, None])
        shrink_T = jnp.exp(largest_T - larger_T)
        out_TH = out_TH * shrink_T[:, None] + _dot(weights_TS.astype(v_SH.dtype), v_SH)
        return larger_T, sum_T * shrink_T + weights_TS.sum(-1), out_TH

    zeros_T = jnp.zeros(queries, jnp.float32)
    carry = (zeros_T + LOWEST, zeros_T, jnp.zeros(q_TH.shape, jnp.float32))
    blocks = _blocks_of_keys(start, length, first_T, T=T, S=S, queries=queries, keys=keys)
    largest_T, sum_T, out_TH = lax.fori_loop(*blocks, add_keys, carry)
    _store_rows(out_ref, start, out_TH / sum_T[:, None], T, H)
    slot_T = start + _arange(queries)
    plt.store(log_sum_ref.at[pl.ds(start, queries)], largest_T + jnp.log(sum_T), mask=slot_T < T)


def _d_queries_kernel(*refs, T, S, H, queries, keys):
    q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, mean_ref, lengths_ref, first_ref, d_q_ref = refs
    start, length = pl.program_id(2) * queries, _length(lengths_ref)
    q_TH, d_out_TH = (_rows(ref, start, queries, T, H) for ref in (q_ref, d_out_ref))
    log_sum_T, mean_T = (_numbers(ref, start, queries, T) for ref in (log_sum_ref, mean_ref))
    first_T = _first(first_ref, start, queries, T, S)

    def add_keys(j, d_q_TH):
        k_SH, v_SH = (_rows(ref, j * keys, keys, S, H) for ref in (k_ref, v_ref))
        scores_TS = _mask(_dot(q_TH, k_SH.T), start + length, j * keys, first_T)
        weights_TS = jnp.exp(scores_TS - log_sum_T[:, None])
        d_scores_TS = weights_TS * (_dot(d_out_TH, v_SH.T) - mean_T[:, None])
        return d_q_TH + _dot(d_scores_TS.astype(k_SH.dtype), k_SH)

    blocks = _blocks_of_keys(start, length, first_T, T=T, S=S, queries=queries, keys=keys)
    d_q_TH = lax.fori_loop(*blocks, add_keys, jnp.zeros(q_TH.shape, jnp.float32))
    _store_rows(d_q_ref, start, d_q_TH, T, H)


def _d_keys_values_kernel(*refs, T, S, H, queries, keys):
    q_ref, k_ref, v_ref, d_out_ref, log_sum_ref, mean_ref, lengths_ref, first_ref, behind_ref, d_k_ref, d_v_ref = refs
    start, length = pl.program_id(2) * keys, _length(lengths_ref)
    k_SH, v_SH = (_rows(ref, start, keys, S, H) for ref in (k_ref, v_ref))

    def add_queries(i, carry):
        d_k_SH, d_v_SH = carry
        q_TH, d_out_TH = (_rows(ref, i * queries, queries, T, H) for ref in (q_ref, d_out_ref))
        log_sum_T, mean_T = (_numbers(ref, i * queries, queries, T) for ref in (log_sum_ref, mean_ref))
        first_T = _first(first_ref, i * queries, queries, T, S)
        scores_TS = _mask(_dot(q_TH, k_SH.T), i * queries + length, start, first_T)
        weights_TS = jnp.exp(scores_TS - log_sum_T[:, None])
        d_scores_TS = weights_TS * (_dot(d_out_TH, v_SH.T) - mean_T[:, None])
        d_v_SH += _dot(weights_TS.astype(v_SH.dtype).T, d_out_TH)
        return d_k_SH + _dot(d_scores_TS.astype(q_TH.dtype).T, q_TH), d_v_SH

    zeros_SH = jnp.zeros(k_SH.shape, jnp.float32)
    begin = lax.div(jnp.maximum(start - length, 0), queries)  # earlier queries are before these keys
    behind = T if behind_ref is None else behind_ref[0]  # queries from here on are in later documents
    d_k_SH, d_v_SH = lax.fori_loop(begin, pl.cdiv(behind, queries), add_queries, (zeros_SH, zeros_SH))
    _store_rows(d_k_ref, start, d_k_SH, S, H)
    _store_rows(d_v_ref, start, d_v_SH, S, H)


def _decode_kernel(q_ref, k_ref, v_ref, lengths_ref, out_ref, log_sum_ref, *, S, H):
    """One query and DECODE_SLOTS slots of its row; the output of these alone, and the log-sum-exp of their scores."""
    start = pl.program_id(2) * DECODE_SLOTS
    q_H = _rows(q_ref, 0, 1, 1, H).astype(jnp.float32)
    filled = jnp.minimum(_length(lengths_ref) + 1, S)

    def add_keys(j, carry):
        largest, sum_, out_H = carry
        slot = start + j * DECODE_KEYS
        k_SH, v_SH = (_rows(ref, slot, DECODE_KEYS, S, H).astype(jnp.float32) for ref in (k_ref, v_ref))
        scores_S = jnp.where(slot + _arange(DECODE_KEYS) < filled, (k_SH * q_H).sum(-1), LOWEST)
        larger = jnp.maximum(largest, scores_S.max())
        weights_S, shrink = jnp.exp(scores_S - larger), jnp.exp(largest - larger)
        return larger, sum_ * shrink + weights_S.sum(), out_H * shrink + (weights_S[:, None] * v_SH).sum(0)

    blocks = pl.cdiv(jnp.clip(filled - start, 0, DECODE_SLOTS), DECODE_KEYS)
    carry = (jnp.float32(LOWEST), jnp.float32(0), jnp.zeros(q_H.shape[1:], jnp.float32))
    largest, sum_, out_H = lax.fori_loop(0, blocks, add_keys, carry)
    sum_ = jnp.where(blocks > 0, sum_, 1.0)
    plt.store(out_ref, out_H / sum_, mask=_arange(out_H.shape[0]) < H)
    log_sum_ref[...] = largest + jnp.log(sum_)


def _decode(q_BNTH: Array, k_BNSH: Array, v_BNSH: Array, lengths_B: Array, interpret: bool) -> tuple[Array, Array]:
    """The shares of a row's programs, weighed by their log-sum-exps."""
    B, N, S, H = k_BNSH.shape
    wide, parts = _padded(H), pl.cdiv(S, DECODE_SLOTS)
    out_BNPH, log_sum_BNP = pl.pallas_call(
        functools.partial(_decode_kernel, S=S, H=H),
        grid=(B, N, parts),
        in_specs=[*(_whole((rows, wide)) for rows in (1, S, S)), pl.BlockSpec((1,), lambda b, n, p: (b,))],
        out_specs=[
            pl.BlockSpec((None, None, None, wide), lambda b, n, p: (b, n, p, 0)),
            pl.BlockSpec((None, None, None), lambda b, n, p: (b, n, p)),
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, N, parts, H), (B, N, parts))],
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="opt_decode",
    )(q_BNTH, k_BNSH, v_BNSH, lengths_B)
    share_BNP = jax.nn.softmax(log_sum_BNP, axis=-1)
    out_BNTH = (out_BNPH * share_BNP[..., None]).sum(2, keepdims=True).astype(q_BNTH.dtype)
    return out_BNTH, jax.nn.logsumexp(log_sum_BNP, axis=-1, keepdims=True)


def _call(kernel, inputs: tuple, *outs: tuple, by_keys: bool, interpret: bool) -> list[Array]:
    """Runs a kernel for each row, head and block of queries or keys; the last two inputs: `lengths_B`, `first_BT`."""
    (B, N, T, H), S, dtype = inputs[0].shape, inputs[1].shape[2], inputs[0].dtype
    queries, keys = block_sizes(T, S, H, dtype, backward=len(inputs) > 5)
    first_BT = inputs[-1]
    in_specs = [_whole((*x.shape[2:3], *map(_padded, x.shape[3:]))) for x in inputs[:-2]]
    in_specs.append(None if inputs[-2] is None else pl.BlockSpec((1,), lambda b, n, i: (b,)))
    in_specs.append(None if first_BT is None else pl.BlockSpec((None, T), lambda b, n, i: (b, 0)))
    if by_keys:
        ends_J = jnp.arange(1, pl.cdiv(S, keys) + 1) * keys
        behind_BJ = None if first_BT is None else (first_BT[:, None] < ends_J[:, None]).sum(-1, dtype=jnp.int32)
        inputs = (*inputs, behind_BJ)
        in_specs.append(None if first_BT is None else pl.BlockSpec((None, 1), lambda b, n, j: (b, j)))
    return pl.pallas_call(
        functools.partial(kernel, T=T, S=S, H=H, queries=queries, keys=keys),
        grid=(B, N, pl.cdiv(S, keys) if by_keys else pl.cdiv(T, queries)),
        in_specs=in_specs,
        out_specs=[_whole((*shape[2:3], *map(_padded, shape[3:]))) for shape, _ in outs],
        out_shape=[jax.ShapeDtypeStruct(*out) for out in outs],
        compiler_params=plt.CompilerParams(num_warps=4 if _padded(H) <= 64 else 8, num_stages=2),
        interpret=interpret,
        name=f"opt{kernel.__name__.removesuffix('_kernel')}",
    )(*inputs)


def block_sizes(T: int, S: int, H: int, dtype, *, backward: bool) -> tuple[int, int]:
    """Queries and keys that a program holds at a time, powers of two of at least 16, as a Triton product needs."""
    if dtype == jnp.float32:
        queries, keys = (32, 32) if backward else (64, 32)
    else:
        queries, keys = (64, 64) if backward else (128, 64)
    return min(queries, max(16, pl.next_power_of_2(T))), min(keys, max(16, pl.next_power_of_2(S)))


def _whole(shape: tuple[int, ...]) -> pl.BlockSpec:
    """All rows of one head: a kernel loads from these what it needs."""
    return pl.BlockSpec((None, None, *shape), lambda b, n, i: (b, n, *(0 for _ in shape)))


def _padded(H: int) -> int:
    return max(16, pl.next_power_of_2(H))


def _blocks_of_keys(start, length, first_T, *, T, S, queries, keys):
    """The blocks of keys in which some query of a block sees one."""
    begin = 0 if first_T is None else lax.div(first_T.min(), keys)
    seen = jnp.minimum(jnp.minimum(start + queries, T) + length, S)
    return begin, pl.cdiv(seen, keys)


def _mask(scores_TS, last, slot, first_T):
    """Scores of queries, the first of which sees slots up to `last`, and keys from `slot` on."""
    T, S = scores_TS.shape
    slot_S = slot + _arange(S)[None]
    seen_TS = slot_S <= last + _arange(T)[:, None]
    return jnp.where(seen_TS if first_T is None else seen_TS & (slot_S >= first_T[:, None]), scores_TS, LOWEST)


def _length(lengths_ref):
    return 0 if lengths_ref is None else lengths_ref[0]


def _first(first_ref, start, rows, T, S):
    """The first slot that each query sees; S beyond the last query, since none has to be visited for those."""
    return None if first_ref is None else _numbers(first_ref, start, rows, T, S)


def _numbers(ref, start, rows, T, other=0):
    return plt.load(ref.at[pl.ds(start, rows)], mask=start + _arange(rows) < T, other=other)


def _rows(ref, start, rows, T, H):
    """Rows of a whole head, zero beyond its T tokens and H numbers: what lies there belongs to others."""
    return plt.load(ref.at[pl.ds(start, rows), :], mask=_inside(start, rows, T, ref.shape[-1], H), other=0)


def _store_rows(ref, start, x, T, H):
    rows, wide = x.shape
    plt.store(ref.at[pl.ds(start, rows), :], x.astype(ref.dtype), mask=_inside(start, rows, T, wide, H))


def _inside(start, rows, T, wide, H):
    return (start + _arange(rows) < T)[:, None] & (_arange(wide) < H)[None]


def _dot(x, y):
    return plt.dot(x, y, precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)


def _arange(size):
    return jnp.arange(size, dtype=jnp.int32)
