"""Every way to attend in TensorFlow against float64, with gradients; the calls of cuDNN; what refuses, and how."""

import json
import re

import numpy as np
import pytest
import tensorflow as tf
from attention_truth import (
    DTYPES,
    Attended,
    attention_inputs,
    attention_truth,
    error_bound,
    root_mean_square_error,
    worst_share,
)
from harness import config_of

from opt_core.errors import InputError
from opt_tf import TFOPTForCausalLM, blockwise, cudnn, rowwise
from opt_tf.attention import cached_attention, causal_attention, check_implementation, eager_attention
from opt_tf.blockwise import blockwise_attention
from opt_tf.cudnn import BACKWARD, FORWARD, cudnn_attention
from opt_tf.rowwise import rowwise_attention

B, N, T, H = 2, 3, 89, 40
WAYS = {
    "eager": lambda *qkv: eager_attention(*qkv, None)[0],
    "blocks": blockwise_attention,
    "rows": rowwise_attention,
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    monkeypatch.setattr(rowwise, "ROWS", 32)


def attended(attend, q, k, v, d_out, jit_compile: bool = False) -> Attended:
    def output_and_gradients(q, k, v, d_out):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            out = attend(q, k, v)
        return out, *tape.gradient(out, [q, k, v], d_out)

    traced = tf.function(output_and_gradients, autograph=False, jit_compile=jit_compile)
    return Attended(*(tf.cast(x, tf.float64).numpy() for x in traced(*map(tf.constant, (q, k, v, d_out)))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize(
    ("way", "jit_compile"), [("eager", False), ("eager", True), ("blocks", False), ("blocks", True), ("rows", False)]
)
def test_output_and_gradients_lie_within_the_bound(way, jit_compile, size, dtype):
    q, k, v, d_out = attention_inputs(dtype, B, N, T, H, size=size)
    got = attended(WAYS[way], q, k, v, d_out, jit_compile)
    shares = worst_share(got, attention_truth(q, k, v, d_out=d_out), error_bound(q, k, v, dtype, d_out=d_out))
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", ["blocks", "rows"])
def test_the_error_is_at_most_twice_that_of_the_eager_one(way, dtype):
    inputs = attention_inputs(dtype, B, N, T, H)
    truth = attention_truth(*inputs[:3], d_out=inputs[3])
    got, eager = (root_mean_square_error(attended(WAYS[name], *inputs), truth) for name in (way, "eager"))
    for part in Attended._fields:
        assert got[part] <= 2 * eager[part], part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("jit_compile", [None, True], ids=["eager", "xla"])
def test_attention_over_a_cache_lies_within_the_bound(jit_compile, tokens, dtype):
    q, k, v, _ = attention_inputs(dtype, B, N, tokens, H, S=T, size=4)
    lengths_B = np.array([T - tokens, 17])
    attend = cached_attention if jit_compile is None else tf.function(cached_attention, jit_compile=jit_compile)
    got = Attended(tf.cast(attend(*map(tf.constant, (q, k, v, lengths_B))), tf.float64))
    bound = error_bound(q, k, v, dtype, lengths_B=lengths_B)
    shares = worst_share(got, attention_truth(q, k, v, lengths_B=lengths_B), bound)
    assert shares["out"] <= 1


def test_outside_a_graph_the_unused_part_of_a_cache_is_not_read():
    q, k, v, _ = map(tf.constant, attention_inputs("float32", B, N, 1, H, S=199))
    behind = tf.range(199)[:, None] >= 64
    k_broken, v_broken = (tf.where(behind, float("nan"), x) for x in (k, v))
    lengths_B = tf.constant([63, 5], tf.int64)
    want = eager_attention(q, k, v, lengths_B)[0]
    np.testing.assert_allclose(cached_attention(q, k_broken, v_broken, lengths_B), want, atol=1e-6)


# -- cuDNN ------------------------------------------------------------------------------------------------------------


def custom_calls(function, head_size: int, dtype: tf.DType) -> list[tuple[str, str]]:
    """Names and configurations of the custom calls in TensorFlow's own program for a GPU, on any machine."""
    qkv = [tf.TensorSpec([B, N, 96, head_size], dtype)] * 3
    compiled = tf.function(function, autograph=False, jit_compile=True).experimental_get_compiler_ir(*qkv)
    program = compiled(stage="hlo", platform_name="GPU")
    return re.findall(r'custom_call_target="([^"]+)".*backend_config=(\{.*\})', program)


@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16])
def test_the_fused_kernels_are_called_forward_and_backward(dtype, head_size):
    def gradients(*qkv):
        with tf.GradientTape() as tape:
            tape.watch(qkv)
            out = cudnn_attention(*qkv)
        return tape.gradient(out, qkv)

    assert [name for name, _ in custom_calls(cudnn_attention, head_size, dtype)] == [FORWARD]
    assert [name for name, _ in custom_calls(gradients, head_size, dtype)] == [FORWARD, BACKWARD]


@pytest.mark.parametrize("target", [FORWARD, BACKWARD])
def test_the_calls_are_configured_as_jax_configures_them(target):
    """JAX 0.10, which runs the same kernels through the same calls; what it leaves at zero is not written here."""
    theirs = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    mlir = pytest.importorskip("jax._src.interpreters.mlir")
    with mlir.make_ir_context():
        want = theirs.create_dot_product_attention_backend_config(
            *(B, N, T, T, mlir.ir.BF16Type.get(), 1.0, 42, 0.0, theirs.MaskType.CAUSAL),
            *(theirs.AttentionLayout.BNTH.value, None, 1, False, target == BACKWARD),
        )
    got, want = (
        json.loads(x)["cudnn_fmha_backend_config"]
        for x in (cudnn._backend_config(target, tf.zeros([B, N, T, H], tf.bfloat16)), want)
    )
    shapes = [config.pop("intermediate_tensor_shape") for config in (got, want)]
    assert got == want
    for name in ("element_type", "dimensions", "is_dynamic_dimension"):
        assert shapes[0][name] == shapes[1][name]
    assert shapes[0]["layout"].items() <= shapes[1]["layout"].items()


def test_cudnn_says_that_it_needs_to_know_sizes():
    traced = tf.function(cudnn_attention, input_signature=[tf.TensorSpec([None, N, None, 64], tf.float16)] * 3)
    with pytest.raises(InputError, match=r"expects sizes known to a traced function, got .*\(None, 3, None, 64\)"):
        traced.get_concrete_function()


@pytest.mark.parametrize("name", ["cudnn", "flash_attention_2"])
def test_a_fused_kernel_without_a_gpu_is_refused_with_every_reason(name, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    config = config_of(hidden_size=21, num_attention_heads=3)
    with pytest.raises(InputError) as caught:
        TFOPTForCausalLM(config, attn_implementation=name)
    assert caught.value.problems == (
        f"attn_implementation: {name} expects an NVIDIA GPU of compute capability 8.0 or newer, got no GPU",
        f"attn_implementation: {name} expects float16 or bfloat16, got float32",
        f"attn_implementation: {name} expects a head size that is a multiple of 8 up to 128, got 7",
    )
    model = TFOPTForCausalLM(config)
    with pytest.raises(InputError, match="got no GPU"):
        model.set_attn_implementation(name)
    assert model.attn_implementation == "sdpa"


class FakeGPU:
    name = "GPU:0"


def test_a_gpu_that_is_there_is_asked_for_its_kind(monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [FakeGPU])
    for capability, head_size, allowed in (
        ((7, 5), 64, False),
        ((8, 0), 64, True),
        ((8, 0), 136, False),
        ((9, 0), 136, True),
    ):
        details = {"compute_capability": capability}
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu, details=details: details)
        assert (cudnn.cudnn_problems("bfloat16", head_size) == []) is allowed


def test_documents_and_dropout_are_refused_by_a_fused_kernel(monkeypatch):
    monkeypatch.setattr("opt_tf.attention.cudnn_problems", lambda dtype, head_size: [])
    x = tf.zeros([B, N, T, 64], tf.bfloat16)
    with pytest.raises(InputError) as caught:
        causal_attention(x, x, x, 0.1, tf.zeros([B, T], tf.int64), "cudnn")
    assert caught.value.problems == (
        "attn_implementation: cudnn expects no dropout of attention weights, got 0.1",
        "attn_implementation: cudnn expects one document a row, got several (first_BT)",
    )


def test_an_unknown_implementation_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="expected one of eager, sdpa, flash_attention_2, cudnn, got 'flash'"):
        check_implementation("flash", config_of(), "float32")


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_tf32():
    """Parity is claimed for float32 products, not for those of 10 bits that TensorFlow makes by default."""
    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    yield
    tf.config.experimental.enable_tensor_float_32_execution(before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 80, 128])
@pytest.mark.parametrize(("way", "jit_compile"), [("eager", False), ("blocks", True), ("rows", False), ("cudnn", True)])
@pytest.mark.parametrize("length", [1, 127, 448])  # 448: 64 more than a multiple of 128
def test_on_a_gpu_output_and_gradients_lie_within_the_bound(length, way, jit_compile, head_size, dtype, without_tf32):
    if way == "cudnn" and dtype == "float32":
        pytest.skip("cuDNN has no float32 kernel")
    attend = cudnn_attention if way == "cudnn" else WAYS[way]
    q, k, v, d_out = attention_inputs(dtype, B, N, length, head_size)
    with tf.device("GPU:0"):
        got = attended(attend, q, k, v, d_out, jit_compile)
    shares = worst_share(got, attention_truth(q, k, v, d_out=d_out), error_bound(q, k, v, dtype, d_out=d_out))
    assert max(shares.values()) <= 1, shares


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash_attention_2"])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_on_a_gpu_a_model_runs_the_fused_kernel(name, jit_compile):
    config = config_of(hidden_size=192, num_attention_heads=3)
    model = TFOPTForCausalLM(config, attn_implementation=name, dtype="bfloat16")
    ids = tf.constant(np.random.default_rng(0).integers(4, config.vocab_size, (B, 11)))
    fused = tf.function(lambda ids: model(ids).logits, jit_compile=jit_compile)(ids)
    model.set_attn_implementation("eager")
    np.testing.assert_allclose(*(tf.cast(x, tf.float32) for x in (fused, model(ids).logits)), atol=0.05)
