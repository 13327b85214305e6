"""The fused kernels against float64, forward and backward: interpreted on any device, compiled on a GPU (`-m gpu`).

Interpreted, blocks are small, so that a short row has many of them.
"""

import functools
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import DTYPES, Attended, attention_inputs, beyond_twice, check_bound
from harness import ROUNDOFF
from jax.experimental import pallas
from test_flax_attention import HALF, OPT_HEADS, far_below_zero

from opt_flax import pallas_attention as module
from opt_flax.attention import eager_attention
from opt_flax.pallas_attention import pallas_attention, pallas_problems

B, N = 2, 3
HEADS_AND_DTYPES = [(64, "float32"), (80, "bfloat16"), (128, "float16")]  # on a GPU each with each, of more tokens
EACH = [(H, dtype) for H in OPT_HEADS for dtype in DTYPES]
FIRST_BT = np.stack([np.repeat([0, 5, 20], [5, 15, 17]), np.repeat([0, 16, 36], [16, 20, 1])])  # documents of 37 tokens
LONG_FIRST_BT = np.stack([np.repeat([0, 5, 192], [5, 187, 139]), np.repeat([0, 128, 330], [128, 202, 1])])


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def kernel(request, monkeypatch):
    """The attention to test."""
    if request.param == "interpreted":
        monkeypatch.setattr(module, "block_sizes", lambda T, S, H, dtype, *, backward: (16, 16))
        monkeypatch.setattr(module, "DECODE_KEYS", 16)
        monkeypatch.setattr(module, "DECODE_SLOTS", 32)
    return functools.partial(pallas_attention, interpret=request.param == "interpreted")


def attended(function, q, k, v, d_out, *more) -> Attended:
    """The output and the gradients, compiled."""

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(lambda q, k, v: function(q, k, v, *more), q, k, v)
        return out, *vjp(d_out)

    return Attended(*run(*map(jnp.asarray, (q, k, v, d_out))))


def check_kernel(kernel, dtype: str, inputs, lengths_B=None, first_BT=None) -> tuple[Attended, Attended]:
    """Within the bound at every number; returns what the kernel gave, and the truth."""
    got = attended(kernel, *inputs, *(None if x is None else jnp.asarray(x) for x in (lengths_B, first_BT)))
    assert {x.dtype.name for x in got} == {dtype}
    return got, check_bound(got, inputs, dtype, first_BT, lengths_B)


def check(kernel, dtype: str, inputs, lengths_B=None, first_BT=None) -> None:
    """Within the bound, and at most twice as far from the truth as the plain formula."""
    got, truth = check_kernel(kernel, dtype, inputs, lengths_B, first_BT)
    eager = attended(lambda *x: eager_attention(*x, lengths_B, None, first_BT)[0], *inputs)
    assert not beyond_twice(eager, got, truth, slack(dtype))


def check_step(kernel, dtype: str, inputs, lengths_B) -> None:
    """The same of one token behind a cache."""
    q, k, v, _ = inputs
    got = Attended(jax.jit(kernel)(q, k, v, lengths_B))
    truth = check_bound(got, inputs, dtype, None, lengths_B)
    assert not beyond_twice(Attended(jax.jit(eager_attention)(q, k, v, lengths_B)[0]), got, truth, slack(dtype))


def slack(dtype: str) -> float:
    """On a GPU the eager formula's sums of float32 are cuBLAS', in another order."""
    return 4 * ROUNDOFF[dtype] if dtype == "float32" and jax.default_backend() == "gpu" else 0.0


@pytest.mark.parametrize(("H", "dtype"), HEADS_AND_DTYPES)
def test_tokens_attend_among_themselves(kernel, H, dtype):
    check(kernel, dtype, attention_inputs(dtype, 1, N, 37, H, size=2.0))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "H", "dtype"), [*((131, *each) for each in EACH), *((1031, H, "bfloat16") for H in OPT_HEADS)]
)
def test_tokens_attend_among_themselves_on_a_gpu(T, H, dtype):
    check(pallas_attention, dtype, attention_inputs(dtype, B, N, T, H))


@pytest.mark.parametrize("dtype", HALF)
def test_scores_may_lie_far_below_zero(kernel, dtype):
    check_kernel(kernel, dtype, far_below_zero(dtype, B, 1, 67, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("T", [192, 704])
def test_scores_may_lie_far_below_zero_on_a_gpu(T, dtype):
    check_kernel(pallas_attention, dtype, far_below_zero(dtype, B, N, T, 64))


def test_gradients_are_the_same_in_every_run(kernel):
    T = 37 if kernel.keywords["interpret"] else 1031
    inputs = attention_inputs("bfloat16", B, N, T, 64)
    first, second = (attended(kernel, *inputs) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


def test_documents_in_a_row_do_not_see_each_other(kernel):
    check(kernel, "float32", attention_inputs("float32", B, 1, 37, 64), None, FIRST_BT)


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "dtype"), EACH)
def test_documents_in_a_row_do_not_see_each_other_on_a_gpu(H, dtype):
    check(pallas_attention, dtype, attention_inputs(dtype, B, N, 331, H), None, LONG_FIRST_BT)


def test_keys_of_other_documents_are_not_even_read(kernel):
    """NaN in a block of keys that no query of the later document sees."""
    q, k, v, _ = map(jnp.asarray, attention_inputs("float32", 1, N, 137, 64))
    first_BT = jnp.asarray([[0] * 128 + [128] * 9])
    spoilt = [x.at[:, :, :64].set(jnp.nan) for x in (k, v)]
    later = jax.jit(lambda *x: kernel(*x, None, first_BT)[:, :, 128:])
    np.testing.assert_array_equal(later(q, *spoilt), later(q, k, v))


def test_several_tokens_behind_a_cache(kernel):
    check(kernel, "float32", attention_inputs("float32", B, 1, 7, 80, 53), np.array([31, 46]))


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "dtype"), EACH)
def test_several_tokens_behind_a_cache_on_a_gpu(H, dtype):
    check(pallas_attention, dtype, attention_inputs(dtype, B, N, 71, H, 331), np.array([129, 260]))


@pytest.mark.parametrize(("H", "dtype"), HEADS_AND_DTYPES)
def test_one_token_behind_a_cache(kernel, H, dtype):
    """Rows that fill no slot, a part, a whole number of parts, and all slots."""
    check_step(kernel, dtype, attention_inputs(dtype, 4, N, 1, H, 83), np.array([0, 40, 63, 82]))


@pytest.mark.gpu
@pytest.mark.parametrize(("H", "dtype"), EACH)
def test_one_token_behind_a_cache_on_a_gpu(H, dtype):
    check_step(pallas_attention, dtype, attention_inputs(dtype, 4, N, 1, H, 601), np.array([0, 40, 511, 600]))


def test_a_step_reads_filled_blocks_alone(kernel):
    q, k, v, _ = map(jnp.asarray, attention_inputs("float32", B, N, 1, 64, 307))
    lengths_B = jnp.asarray([2, 11])
    spoilt = [x.at[:, :, 64:].set(jnp.nan) for x in (k, v)]
    step = jax.jit(kernel)
    np.testing.assert_array_equal(step(q, *spoilt, lengths_B), step(q, k, v, lengths_B))


@pytest.mark.parametrize("T", [1, 7, 16, 100, 2048])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True])
def test_blocks_are_powers_of_two_that_a_triton_product_takes(T, dtype, backward):
    for size in module.block_sizes(T, 2 * T, 80, jnp.dtype(dtype), backward=backward):
        assert size >= 16
        assert size & (size - 1) == 0


def test_what_the_kernels_cannot_take_is_said():
    assert pallas_problems(jnp.float16, 128) == []
    assert pallas_problems(jnp.float64, 160) == [
        "expects float32, float16 or bfloat16, got float64",
        "expects a head size of at most 128, got 160",
    ]


def test_without_pallas_triton_backend_the_module_loads_and_says_so(monkeypatch):
    monkeypatch.delattr(pallas, "triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    problems = runpy.run_path(module.__file__)["pallas_problems"](jnp.float32, 64)
    assert problems == [f"expects a JAX that has Pallas' Triton backend, got {jax.__version__}"]
