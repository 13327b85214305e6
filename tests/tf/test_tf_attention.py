"""Every way to attend in TensorFlow against float64, with gradients; the calls of cuDNN; what refuses, and how."""

import functools
import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from attention_truth import (
    DTYPES,
    Attended,
    attention_inputs,
    attention_truth,
    beyond_twice,
    check_bound,
    far_below_zero,
)
from harness import (
    BOUND,
    MASKS,
    ROUNDOFF,
    config_of,
    load_backend,
    mask_named,
    reference_of,
    token_ids,
    worst_row,
)

from opt_core.errors import InputError
from opt_tf import TFOPTForCausalLM, attention, blockwise, cudnn, rowwise
from opt_tf.attention import cached_attention, causal_attention, check_implementation, eager_attention
from opt_tf.blockwise import blockwise_attention
from opt_tf.cudnn import BACKWARD, FORWARD, HALF, cudnn_attention
from opt_tf.rowwise import rowwise_attention

B, N, T, H = 2, 3, 89, 64
HEAD_SIZES = (64, 80, 128)  # of all published sizes
WAYS = {
    "eager": lambda *qkv: eager_attention(*qkv, None)[0],
    "blocks": blockwise_attention,
    "rows": rowwise_attention,
}
ON_GPU = {**WAYS, "cudnn": cudnn_attention}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", 32)
    monkeypatch.setattr(rowwise, "ROWS", 32)


def any_length(function, tensors):
    """`function` traced for tensors [B, T] or [B, N, T, H] of any T."""
    shapes = [[None if axis == len(x.shape) // 2 else size for axis, size in enumerate(x.shape)] for x in tensors]
    specs = [tf.TensorSpec(shape, x.dtype) for shape, x in zip(shapes, tensors, strict=True)]
    return tf.function(function, autograph=False, input_signature=specs)


HOW = {
    "outside a graph": lambda function, tensors: function,
    "graph": lambda function, tensors: tf.function(function, autograph=False),
    "xla": lambda function, tensors: tf.function(function, autograph=False, jit_compile=True),
    "any length": any_length,
}


def attended(attend, q, k, v, d_out, *more, how: str = "graph") -> Attended:
    def output_and_gradients(q, k, v, d_out, *more):
        with tf.GradientTape() as tape:
            tape.watch([q, k, v])
            out = attend(q, k, v, *more)
        return out, *tape.gradient(out, [q, k, v], d_out)

    tensors = [tf.constant(x) for x in (q, k, v, d_out, *more)]
    return Attended(*(tf.cast(x, tf.float64).numpy() for x in HOW[how](output_and_gradients, tensors)(*tensors)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("way", "how", "head_size", "size"),
    [
        *((way, how, H, s) for way, how in (("eager", "graph"), ("eager", "xla"), ("blocks", "xla")) for s in (1, 4)),
        *((way, "graph", *case) for way in ("blocks", "rows") for case in ((64, 1), (64, 4), (80, 1), (128, 4))),
    ],
)
def test_output_and_gradients_lie_within_the_bound(way, how, head_size, size, dtype):
    inputs = attention_inputs(dtype, B, N, T, head_size, size=size)
    check_bound(attended(WAYS[way], *inputs, how=how), inputs, dtype)


@pytest.mark.parametrize(("head_size", "dtype"), list(zip(HEAD_SIZES, DTYPES, strict=True)))
@pytest.mark.parametrize("way", ["blocks", "rows"])
def test_the_error_is_at_most_twice_that_of_the_eager_one(way, head_size, dtype):
    inputs = attention_inputs(dtype, B, N, T, head_size)
    got, eager = (attended(WAYS[name], *inputs) for name in (way, "eager"))
    assert not beyond_twice(eager, got, attention_truth(*inputs[:3], d_out=inputs[3]))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("way", ["blocks", "rows"])
def test_scores_may_lie_far_below_zero(way, dtype):
    inputs = far_below_zero(dtype, B, N, 67, H)
    got = attended(WAYS[way], *inputs)
    check_bound(got, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("jit_compile", [None, True], ids=["eager", "xla"])
def test_attention_over_a_cache_lies_within_the_bound(jit_compile, tokens, dtype):
    q, k, v, _ = attention_inputs(dtype, B, N, tokens, H, S=T, size=4)
    lengths_B = np.array([T - tokens, 17])
    attend = cached_attention if jit_compile is None else tf.function(cached_attention, jit_compile=jit_compile)
    got = Attended(tf.cast(attend(*map(tf.constant, (q, k, v, lengths_B))), tf.float64))
    check_bound(got, (q, k, v), dtype, None, lengths_B)


def test_outside_a_graph_the_unused_part_of_a_cache_is_not_read():
    q, k, v, _ = map(tf.constant, attention_inputs("float32", B, N, 1, H, S=199))
    behind = tf.range(199)[:, None] >= 64
    k_broken, v_broken = (tf.where(behind, float("nan"), x) for x in (k, v))
    lengths_B = tf.constant([63, 5], tf.int64)
    want = eager_attention(q, k, v, lengths_B)[0]
    np.testing.assert_allclose(cached_attention(q, k_broken, v_broken, lengths_B), want, atol=1e-6)


# -- documents --------------------------------------------------------------------------------------------------------


@pytest.fixture
def blocks_of_4(monkeypatch):
    """So that a few tokens are too many for the plain formula."""
    for module in (attention, blockwise):
        monkeypatch.setattr(module, "BLOCK", 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOW)
def test_documents_in_a_row_lie_within_the_bound(how, dtype, blocks_of_4):
    """Which begin inside a block and on its edge."""
    first_BT = np.stack([np.repeat([0, 5, 12], [5, 7, 1]), np.repeat([0, 8], [8, 5])])
    inputs = attention_inputs(dtype, B, N, 13, H)
    got = attended(lambda q, k, v, first: causal_attention(q, k, v, 0.0, first), *inputs, first_BT, how=how)
    check_bound(got, inputs, dtype, first_BT)


@pytest.mark.parametrize(("how", "dtype"), list(zip(HOW, ("float32", *DTYPES), strict=True)))
def test_a_model_keeps_documents_apart(how, dtype, blocks_of_4):
    config = config_of(num_hidden_layers=1, activation_function="gelu")
    ids = token_ids(config)
    segment_ids = np.stack(
        [np.repeat([1, 2, 3], [5, 7, 1]), np.ones(13, int), np.arange(13), np.repeat([1, 2], [8, 5])]
    )
    reference, model = reference_of(config, dtype=dtype), load_backend("tf").random_model(config, dtype=dtype)
    projections = [model.weight(f"decoder.layers.0.self_attn.{x}_proj.weight") for x in "qkv"]

    def logits_and_gradients(ids, segment_ids):
        with tf.GradientTape() as tape:
            out = model(ids, segment_ids=segment_ids, labels=ids)
        return out.logits, tape.gradient(out.loss, projections)

    tensors = tf.constant(ids), tf.constant(segment_ids)
    logits, got = HOW[how](logits_and_gradients, tensors)(*tensors)
    truth = reference.logits(reference(ids, segment_ids=segment_ids).last_hidden_state)
    assert worst_row(tf.cast(logits, tf.float64).numpy(), truth) <= BOUND[dtype] * ROUNDOFF[dtype]
    model.set_attn_implementation("eager")
    for x, y in zip(got, logits_and_gradients(*tensors)[1], strict=True):
        x, y = (tf.cast(z, tf.float64) for z in (x, y))
        assert np.linalg.norm(x - y) <= 2 * BOUND[dtype] * ROUNDOFF[dtype] * np.linalg.norm(y)


# -- cuDNN ------------------------------------------------------------------------------------------------------------


def custom_calls(function, *specs: tf.TensorSpec) -> list[tuple[str, dict]]:
    """Names and configurations of the custom calls in TensorFlow's own program for a GPU, on any machine."""
    compiled = tf.function(function, autograph=False, jit_compile=True).experimental_get_compiler_ir(*specs)
    program = compiled(stage="hlo", platform_name="GPU")
    found = re.findall(r'custom_call_target="([^"]+)".*backend_config=(\{.*\})', program)
    return [(name, json.loads(config)["cudnn_fmha_backend_config"]) for name, config in found]


def names_of_calls(function, *specs: tf.TensorSpec) -> list[str]:
    return [name for name, _ in custom_calls(function, *specs)]


def gradients(attend, *qkv):
    with tf.GradientTape() as tape:
        tape.watch(qkv)
        out = attend(*qkv)
    return tape.gradient(out, qkv)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", HALF)
def test_the_fused_kernels_are_called_forward_and_backward(dtype, head_size):
    qkv = [tf.TensorSpec([B, N, 96, head_size], dtype)] * 3
    assert names_of_calls(cudnn_attention, *qkv) == [FORWARD]
    assert names_of_calls(functools.partial(gradients, cudnn_attention), *qkv) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("name", ["cudnn", "flash_attention_2"])
def test_a_name_that_asks_for_a_fused_kernel_calls_it(name, monkeypatch):
    monkeypatch.setattr(attention, "cudnn_problems", lambda dtype, head_size: [])
    qkv = [tf.TensorSpec([B, N, 96, 64], tf.bfloat16)] * 3
    attend = lambda *qkv: causal_attention(*qkv, attn_implementation=name)  # noqa: E731
    assert names_of_calls(attend, *qkv) == [FORWARD]
    assert names_of_calls(functools.partial(gradients, attend), *qkv) == [FORWARD, BACKWARD]


@pytest.mark.parametrize("name", ["cudnn", "flash_attention_2"])
def test_a_model_of_a_name_that_asks_for_a_fused_kernel_calls_it(name, monkeypatch):
    """Once a layer for the loss, and once for its gradient."""
    monkeypatch.setattr(attention, "cudnn_problems", lambda dtype, head_size: [])
    config = config_of(hidden_size=128, num_attention_heads=2, num_hidden_layers=2)
    model = TFOPTForCausalLM(config, attn_implementation=name, dtype="bfloat16")
    weights = model.trainable_variables

    def gradient(ids, *values):  # TensorFlow shows no program for a device that is absent where it holds variables
        with keras.StatelessScope(zip(weights, values, strict=True)), tf.GradientTape() as tape:
            tape.watch(values)
            loss = model(ids, labels=ids).loss
        return tape.gradient(loss, values)

    specs = (tf.TensorSpec(weight.shape, weight.dtype) for weight in weights)
    found = names_of_calls(gradient, tf.TensorSpec([B, 13], tf.int64), *specs)
    assert found == [FORWARD, FORWARD, BACKWARD, BACKWARD]


@pytest.mark.parametrize("length", [1, 13])
def test_an_odd_number_of_tokens_is_filled_up(length, monkeypatch):
    qkv = [tf.TensorSpec([B, N, length, 64], tf.bfloat16)] * 3
    calls = custom_calls(functools.partial(gradients, cudnn_attention), *qkv)
    even = str(length + 1)
    assert [config["intermediate_tensor_shape"]["dimensions"][2:] for _, config in calls] == [[even, even]] * 2
    monkeypatch.setattr(cudnn, "_attend", WAYS["eager"])
    inputs = attention_inputs("bfloat16", B, N, length, 64)
    got, want = (attended(attend, *inputs, how="outside a graph") for attend in (cudnn_attention, WAYS["eager"]))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_array_equal(x, y)


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
    monkeypatch.setattr(attention, "cudnn_problems", lambda dtype, head_size: [])
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
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize(("way", "how"), [("eager", "graph"), ("blocks", "xla"), ("rows", "graph"), ("cudnn", "xla")])
@pytest.mark.parametrize("length", [1, 127, 448])  # 448: 64 more than a multiple of 128
def test_on_a_gpu_output_and_gradients_lie_within_the_bound(length, way, how, head_size, dtype, without_tf32):
    """And err at most twice as much as eager's, whose gradient of one token is exactly 0."""
    if way == "cudnn" and dtype == "float32":
        pytest.skip("cuDNN has no float32 kernel")
    inputs = attention_inputs(dtype, B, N, length, head_size)
    with tf.device("GPU:0"):
        got, eager = attended(ON_GPU[way], *inputs, how=how), attended(WAYS["eager"], *inputs)
    truth = check_bound(got, inputs, dtype)
    assert length == 1 or not beyond_twice(eager, got, truth, 4 * ROUNDOFF[dtype] if dtype == "float32" else 0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("way", "how"), [("blocks", "xla"), ("rows", "graph"), ("cudnn", "xla"), ("cudnn", "graph")])
@pytest.mark.parametrize("length", [67, 192, 704])
def test_on_a_gpu_scores_may_lie_far_below_zero(length, way, how, dtype, without_tf32):
    inputs = far_below_zero(dtype, B, N, length, H)
    with tf.device("GPU:0"):
        got = attended(ON_GPU[way], *inputs, how=how)
    check_bound(got, inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sdpa", "cudnn", "flash_attention_2"])
@pytest.mark.parametrize(
    ("padding", "how"), [*((padding, "graph") for padding in MASKS), ("left", "outside a graph"), ("left", "xla")]
)
def test_on_a_gpu_a_model_has_the_logits_and_gradients_of_eager_attention(padding, name, how, blocks_of_4):
    """In bfloat16; rows are packed, and what follows them is seen by none."""
    config = config_of(hidden_size=128, num_attention_heads=2, activation_function="gelu")
    ids, mask = token_ids(config), mask_named(padding)
    mask = np.ones_like(ids) if mask is None else mask
    model = load_backend("tf").random_model(config, dtype="bfloat16", attn_implementation=name)
    projections = [model.weight(f"decoder.layers.0.self_attn.{x}_proj.weight") for x in "qkv"]

    def logits_and_gradients(ids, mask):
        with tf.GradientTape() as tape:
            out = model(ids, attention_mask=mask, labels=tf.where(mask == 1, ids, -100))
        return out.logits, *tape.gradient(out.loss, projections)

    tensors = tf.constant(ids), tf.constant(mask)
    with tf.device("GPU:0"):
        got = HOW[how](logits_and_gradients, tensors)(*tensors)
        model.set_attn_implementation("eager")
        want = logits_and_gradients(*tensors)
    (logits, *got), (true, *want) = ([tf.cast(x, tf.float64).numpy() for x in xs] for xs in (got, want))
    allowed = 2 * BOUND["bfloat16"] * ROUNDOFF["bfloat16"]  # both err
    assert worst_row(logits, true) <= allowed
    for x, y in zip(got, want, strict=True):
        assert np.linalg.norm(x - y) <= allowed * np.linalg.norm(y)
