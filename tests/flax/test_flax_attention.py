"""Which kernel runs where, and that it is in the program: lowered for CUDA, on a host without a GPU."""

import contextlib
import functools
import logging
import re

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn_in_jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_truth import DTYPES, Attended, attention_inputs, beyond_twice, check_bound, far_below_zero
from flax import nnx
from harness import BOUND, ROUNDOFF, config_of, load_backend, reference_of, token_ids, worst_row

from opt_core import OPTConfig
from opt_core.errors import InputError
from opt_flax import FlaxOPTForCausalLM, attention
from opt_flax.attention import KERNELS, cached_attention, causal_attention, eager_attention, fused_kernel
from opt_flax.blockwise import BLOCK, blockwise_attention
from opt_flax.cudnn import compile_problems
from opt_flax.pallas_attention import plt

HALF = ("float16", "bfloat16")
NAMES = r"__cudnn\$\w+|opt_(?:forward|d_queries|d_keys_values|decode)"
OPT_HEADS = (64, 80, 128)  # of all published sizes
CONFIG = OPTConfig(vocab_size=97, hidden_size=64, num_hidden_layers=1, ffn_dim=53, num_attention_heads=1)
# Without a kink: rounding may move an activation across that of relu, and its gradient with it.
LONG = config_of(hidden_size=128, num_attention_heads=2, activation_function="gelu", max_position_embeddings=331)


@pytest.fixture
def hopper(monkeypatch):
    """A host that takes itself for one with an H100; what it lowers for CUDA cannot run here."""
    monkeypatch.setattr(attention, "compute_capability", lambda: (9, 0))
    monkeypatch.setattr(attention, "compile_problems", lambda: ())
    monkeypatch.setattr(plt, "get_gpu_info", lambda: None, raising=False)
    monkeypatch.setattr(cudnn_in_jax, "check_cudnn_version", lambda: 91500)
    monkeypatch.setattr(cudnn_in_jax, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn_in_jax, "is_cuda_compute_capability_equal", lambda capability: False)


def kernels_in(function, *arguments, platform: str = "cuda", pallas: bool = False) -> set[str]:
    """The fused kernels that a function calls when lowered for a platform; `pallas`: some of Pallas are expected."""
    with an_absent_gpu() if pallas else contextlib.nullcontext():
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    return set(re.findall(NAMES, text))


def an_absent_gpu() -> contextlib.AbstractContextManager:
    """From jax 0.11 on, Pallas asks which GPU a program is lowered for (and cuDNN's sharding refuses to be told)."""
    try:
        from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

        device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    except (ImportError, TypeError):
        return contextlib.nullcontext()
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def shapes(T: int, S: int, H: int, dtype) -> list[jax.ShapeDtypeStruct]:
    """Queries, keys, values, a cotangent, and an integer for each row."""
    rows = [jax.ShapeDtypeStruct((2, 3, tokens, H), dtype) for tokens in (T, S, S, T)]
    return [*rows, jax.ShapeDtypeStruct((2,), jnp.int32)]


def gradients(function, q, k, v, d_out):
    return jax.vjp(function, q, k, v)[1](d_out)


@functools.partial(jax.jit, static_argnums=0)
def attended(function, q, k, v, d_out, *more) -> Attended:
    """The output and the gradients."""
    out, vjp = jax.vjp(lambda *qkv: function(*qkv, *more), q, k, v)
    return Attended(out, *vjp(d_out))


FORWARD_AND_BACKWARD = {
    "cudnn": {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"},
    "pallas": {"opt_forward", "opt_d_queries", "opt_d_keys_values"},
}


@pytest.mark.parametrize("H", OPT_HEADS)
@pytest.mark.parametrize(
    ("name", "dtype", "kernel"),
    [
        ("sdpa", "bfloat16", "cudnn"),
        ("sdpa", "float16", "cudnn"),
        ("sdpa", "float32", "pallas"),
        ("flash_attention_2", "bfloat16", "cudnn"),
        ("cudnn", "float16", "cudnn"),
        ("pallas", "bfloat16", "pallas"),
    ],
)
def test_a_gpu_runs_the_kernel_of_that_name_forward_and_backward(hopper, name, dtype, kernel, H):
    function = functools.partial(causal_attention, attn_implementation=name)
    found = kernels_in(functools.partial(gradients, function), *shapes(37, 37, H, dtype)[:4], pallas=kernel == "pallas")
    assert found == FORWARD_AND_BACKWARD[kernel]


@pytest.mark.parametrize("H", OPT_HEADS)
@pytest.mark.parametrize(
    ("name", "dtype", "kernel"),
    [
        ("sdpa", "bfloat16", "opt_decode"),
        ("sdpa", "float32", "opt_decode"),
        ("flash_attention_2", "float16", "opt_decode"),
        ("cudnn", "bfloat16", "__cudnn$fmhaSoftmax"),
    ],
)
def test_a_gpu_decodes_with_the_kernel_of_that_name(hopper, name, dtype, kernel, H):
    def step(q, k, v, lengths_B):
        return cached_attention(q, k, v, lengths_B, name)

    q, k, v, _, lengths_B = shapes(1, 301, H, dtype)
    assert kernels_in(step, q, k, v, lengths_B, pallas=name != "cudnn") == {kernel}


def test_documents_and_several_cached_tokens_go_to_pallas(hopper):
    q, k, v, _, lengths_B = shapes(7, 301, 64, jnp.bfloat16)
    assert kernels_in(cached_attention, q, k, v, lengths_B, pallas=True) == {"opt_forward"}
    first_BT = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    assert kernels_in(causal_attention, q, q, q, first_BT, pallas=True) == {"opt_forward"}


def test_beside_a_gpu_a_model_on_the_cpu_runs_no_kernel(hopper):
    q, k, v, d_out, lengths_B = shapes(37, 37, 64, jnp.bfloat16)
    assert kernels_in(functools.partial(gradients, causal_attention), q, k, v, d_out, platform="cpu") == set()
    assert kernels_in(cached_attention, q, k, v, lengths_B, platform="cpu") == set()


def test_a_whole_model_holds_the_kernels_and_no_square_of_its_length(hopper):
    model = FlaxOPTForCausalLM(CONFIG, dtype=jnp.bfloat16)
    model.eval()
    graphdef, weights, rest = nnx.split(model, nnx.Param, ...)

    def loss(weights, ids):
        return nnx.merge(graphdef, weights, rest)(ids, labels=ids).loss

    ids = jax.ShapeDtypeStruct((2, 307), jnp.int32)
    text = jax.jit(jax.grad(loss)).trace(weights, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert not re.search("30[78]x30[78]", text)  # cuDNN is given an even number of tokens


CANNOT = [
    ("cudnn", jnp.float32, 64, {}, "expects float16 or bfloat16, got float32"),
    ("cudnn", jnp.float16, 68, {}, "a multiple of 8 up to 256, got 68"),
    ("cudnn", jnp.float16, 64, dict(documents=True), "expects one document a row"),
    ("cudnn", jnp.float16, 64, dict(cached_tokens=5), "expects one token at a time behind a cache, got 5"),
    ("pallas", jnp.float64, 64, {}, "expects float32, float16 or bfloat16, got float64"),
    ("pallas", jnp.float32, 160, {}, "a head size of at most 128, got 160"),
    ("flash_attention_2", jnp.float32, 64, {}, "expects float16 or bfloat16, got float32"),
]


@pytest.mark.parametrize(("name", "dtype", "H", "call", "problem"), CANNOT)
def test_a_name_that_asks_for_one_kernel_gets_no_other(hopper, name, dtype, H, call, problem):
    with pytest.raises(InputError, match=f"attn_implementation: {name} .*{problem}"):
        fused_kernel(name, dtype, H, **call)


def test_sdpa_takes_what_no_kernel_does(hopper):
    assert fused_kernel("sdpa", jnp.float16, 68) == "pallas"
    assert fused_kernel("sdpa", jnp.float64, 64) is None
    assert fused_kernel("sdpa", jnp.float32, 160) is None


@pytest.fixture
def broken_cudnn(hopper, monkeypatch):
    """What is compiled for a CPU is no kernel of cuDNN."""
    compile_problems.cache_clear()
    monkeypatch.setattr(attention, "compile_problems", compile_problems)
    yield
    compile_problems.cache_clear()


def test_where_cudnn_does_not_compile_names_that_may_mean_another_kernel_do(broken_cudnn, caplog):
    with caplog.at_level(logging.WARNING):
        assert {fused_kernel(name, jnp.bfloat16, 64) for name in ("sdpa", "flash_attention_2")} == {"pallas"}
        assert fused_kernel("sdpa", jnp.float16, 160) is None
    (record,) = caplog.records
    assert "does not compile here" in record.message
    assert "NotImplementedError" in record.message
    with pytest.raises(
        InputError, match=r"cudnn expects a cuDNN whose attention compiles, got NotImplementedError: \w+"
    ):
        FlaxOPTForCausalLM(CONFIG, attn_implementation="cudnn", dtype=jnp.bfloat16)


def test_cudnn_that_compiles_has_no_problem(broken_cudnn, monkeypatch, caplog):
    monkeypatch.setattr("opt_flax.cudnn.cudnn_attention", blockwise_attention)
    assert compile_problems() == ()
    assert caplog.records == []


def test_a_gpu_that_pallas_does_not_know_has_no_kernels_of_it(hopper, monkeypatch):
    """As JAX 0.11.0 and 0.11.1 do not know an A6000."""

    def unknown():
        raise ValueError("Unsupported GPU device kind: NVIDIA RTX A6000")

    monkeypatch.setattr(plt, "get_gpu_info", unknown)
    assert fused_kernel("sdpa", jnp.float32, 64) is None
    assert fused_kernel("sdpa", jnp.bfloat16, 64) == "cudnn"
    assert fused_kernel("sdpa", jnp.bfloat16, 64, documents=True) is None
    with pytest.raises(InputError, match="flash_attention_2 expects a GPU that Pallas knows"):
        fused_kernel("flash_attention_2", jnp.bfloat16, 64, cached_tokens=1)
    with pytest.raises(InputError, match=r"pallas expects a GPU that Pallas knows, .* kind: NVIDIA RTX A6000"):
        FlaxOPTForCausalLM(CONFIG, attn_implementation="pallas")
    monkeypatch.delattr(plt, "get_gpu_info")  # before 0.11 any GPU will do
    assert fused_kernel("pallas", jnp.float32, 64) == "pallas"


@pytest.mark.parametrize("capability", [None, (7, 5)])
def test_without_a_recent_gpu_only_sdpa_and_eager_exist(monkeypatch, capability):
    monkeypatch.setattr(attention, "compute_capability", lambda: capability)
    assert fused_kernel("sdpa", jnp.bfloat16, 64) is None
    got = "cpu" if capability is None else "7.5"
    for name in KERNELS.keys() - {"sdpa"}:
        with pytest.raises(InputError, match=f"{name} expects an NVIDIA GPU .* 8.0 or newer, got {got}"):
            FlaxOPTForCausalLM(CONFIG, attn_implementation=name)


def test_a_model_is_refused_a_kernel_that_its_dtype_rules_out_when_it_is_made(hopper):
    with pytest.raises(InputError, match="flash_attention_2 expects float16 or bfloat16, got float32"):
        FlaxOPTForCausalLM(CONFIG, attn_implementation="flash_attention_2")
    model = FlaxOPTForCausalLM(CONFIG, attn_implementation="flash_attention_2", dtype=jnp.bfloat16)
    model.set_attn_implementation("pallas")
    with pytest.raises(InputError, match="one of eager, sdpa, flash_attention_2, cudnn, pallas, got 'flash'"):
        model.set_attn_implementation("flash")


def test_dropout_of_weights_needs_the_eager_path(hopper):
    config = CONFIG.replace(attention_dropout=0.3)
    model = FlaxOPTForCausalLM(config, attn_implementation="pallas")
    with pytest.raises(InputError, match=r"pallas expects attention_dropout 0 in training, got 0\.3"):
        model(jnp.zeros((1, 5), jnp.int32))


@pytest.mark.parametrize("T", [37, BLOCK + 11], ids=lambda T: f"{T} tokens")
def test_documents_in_a_row_equal_the_truth(T):
    """Both paths of a CPU: the plain formula, and blocks."""
    first_BT = np.sort(np.random.default_rng(3).integers(0, np.arange(T) + 1, (2, T)), axis=1)
    first_BT = np.minimum(first_BT, np.arange(T))
    inputs = attention_inputs("float32", 2, 1, T, 64)
    got = attended(causal_attention, *inputs, first_BT)
    check_bound(got, inputs, "float32", first_BT)


def check_cudnn(dtype: str, inputs) -> tuple[Attended, Attended]:
    """Within the bound at every number; returns what cuDNN gave, and the truth."""
    got = attended(functools.partial(causal_attention, attn_implementation="cudnn"), *inputs)
    return got, check_bound(got, inputs, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("H", OPT_HEADS)
@pytest.mark.parametrize(("T", "dtype"), [*((T, dtype) for T in (2, 131) for dtype in HALF), (1031, "bfloat16")])
def test_cudnn_equals_the_truth(T, dtype, H):
    """And errs at most twice as much as the plain formula, but of two tokens, whose few errors do not level out."""
    inputs = attention_inputs(dtype, 2, 3, T, H)
    got, truth = check_cudnn(dtype, inputs)
    assert T == 2 or not beyond_twice(attended(lambda *qkv: eager_attention(*qkv, None)[0], *inputs), got, truth)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("T", [67, 192, 704])
def test_cudnn_computes_scores_far_below_zero(T, dtype):
    check_cudnn(dtype, far_below_zero(dtype, 2, 3, T, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("H", OPT_HEADS)
def test_cudnn_decodes_like_the_truth(H, dtype):
    q, k, v, _ = attention_inputs(dtype, 4, 3, 1, H, 307)
    lengths_B = np.array([0, 40, 255, 306])
    got = Attended(jax.jit(functools.partial(cached_attention, attn_implementation="cudnn"))(q, k, v, lengths_B))
    truth = check_bound(got, (q, k, v), dtype, None, lengths_B)
    assert not beyond_twice(Attended(jax.jit(eager_attention)(q, k, v, lengths_B)[0]), got, truth)


@pytest.mark.gpu
def test_cudnn_compiles():
    """Where this fails, half precision goes to Pallas."""
    assert compile_problems() == ()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sdpa", "pallas"])
def test_padding_changes_nothing_on_a_gpu(name, dtype):
    """Left, right and holes: rows are packed, and what follows them is seen by none."""
    model = FlaxOPTForCausalLM(CONFIG, attn_implementation=name, dtype=jnp.dtype(dtype))
    model.eval()
    rng = np.random.default_rng(0)
    ids, alone = rng.integers(4, 97, (3, 67)), rng.integers(4, 97, (1, 41))
    mask = np.zeros((3, 67), int)
    mask[0, -41:], mask[1, :41] = 1, 1
    mask[2, np.sort(rng.choice(67, 41, replace=False))] = 1
    for row in range(3):
        ids[row, mask[row] == 1] = alone[0]
    want = np.asarray(model(alone).logits[0], np.float32)
    got = np.asarray(model(ids, attention_mask=mask).logits, np.float32)
    for row in range(3):
        np.testing.assert_allclose(got[row, mask[row] == 1], want, atol=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["sdpa", "pallas"])
def test_packed_documents_on_a_gpu_have_the_logits_and_gradients_of_eager_attention(name, dtype):
    """Rows of several documents, of one, and with padding on the left."""
    flax, ids = load_backend("flax"), token_ids(LONG, 3, 307)
    segment_ids = np.stack(
        [np.repeat([1, 2, 3, 4], [131, 1, 64, 111]), np.ones(307, int), np.repeat([1, 2], [120, 187])]
    )
    mask = np.ones_like(ids)
    mask[2, :40] = 0
    inputs = dict(input_ids=ids, attention_mask=mask, segment_ids=segment_ids)
    labels = np.where(mask == 1, ids, -100)
    model = flax.random_model(LONG, dtype=dtype, attn_implementation=name)
    model.eval()
    logits, (_, got) = flax.numpy(model(**inputs).logits), flax.loss_and_gradients(model, labels=labels, **inputs)
    model.set_attn_implementation("eager")
    _, eager = flax.loss_and_gradients(model, labels=labels, **inputs)
    allowed = 2 * BOUND[dtype] * ROUNDOFF[dtype]  # both err
    assert worst_row(logits, flax.numpy(model(**inputs).logits)) <= allowed
    for weight in got.keys() - {f"decoder.layers.{i}.self_attn.k_proj.bias" for i in range(3)}:  # rounding alone
        error = np.linalg.norm(got[weight] - eager[weight])
        assert error <= allowed * np.linalg.norm(eager[weight]), weight


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [0, 61], ids=["no padding", "left padding"])
def test_tokens_generated_on_a_gpu_have_the_largest_logits(padded, dtype):
    """Of the text as a whole in float64, but for what rounding may make of them."""
    T, new = 283, 23
    ids, mask = token_ids(LONG, 2, T), np.ones((2, T + new), int)
    mask[1, :padded] = 0
    model = load_backend("flax").random_model(LONG, dtype=dtype)
    text = np.asarray(model.generate(ids, attention_mask=mask[:, :T], max_new_tokens=new, eos_token_id=()))
    reference = reference_of(LONG, dtype=dtype)
    logits_BTV = reference.logits(reference(text, mask).last_hidden_state)[:, T - 1 : -1]
    chosen_BT = np.take_along_axis(logits_BTV, text[:, T:, None], axis=-1)[..., 0]
    allowed_BT = (
        BOUND[dtype] / 2 * ROUNDOFF[dtype] * np.linalg.norm(logits_BTV, axis=-1)
    )  # a random token: 4 times that
    assert (logits_BTV.max(-1) - chosen_BT <= allowed_BT).all()


def test_eager_attention_sees_documents_alone():
    q, k, v, _ = map(jnp.asarray, attention_inputs("float32", 1, 3, 11, 7))
    eager = jax.jit(eager_attention)
    got = eager(q, k, v, None, None, jnp.asarray([[0] * 4 + [4] * 7]))[0]
    for document in (slice(0, 4), slice(4, 11)):
        apart = eager(*(x[:, :, document] for x in (q, k, v)), None)[0]
        np.testing.assert_allclose(got[:, :, document], apart, atol=1e-6)
