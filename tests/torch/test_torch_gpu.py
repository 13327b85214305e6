"""Whole models on a GPU, judged by the same weights in float64 on a CPU; and which kernels run there.

What a CPU has runs there as well, so that these tests are tested themselves.
"""

import copy

import numpy as np
import pytest
import torch
from attention_truth import DTYPES, Attended, attention_inputs, beyond_twice, check_bound
from harness import BOUND, MASKS, ROUNDOFF, config_of, load_backend, mask_named, token_ids, worst_row
from test_torch_attention import HEAD_SIZES, B, N, attend, attended, slack, tensors, where

from opt_core.optimization import TrainingRecipe
from opt_core.schema import shapes
from opt_torch import sdpa
from opt_torch.attention import causal_attention
from opt_torch.training import Trainer

GPU = pytest.mark.gpu
# Without a kink: rounding may move an activation across that of relu, and its gradient with it.
CONFIG = config_of(hidden_size=128, num_attention_heads=2, activation_function="gelu", max_position_embeddings=61)
WHERE = where("sdpa", "flash_attention_2", "flex_attention")[1:]
HALF = ("float16", "bfloat16")


def results(model, ids, mask, segment_ids=None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the gradient of the loss for every weight, in float64 on a CPU."""
    model.zero_grad()
    labels = np.where((np.ones_like(ids) if mask is None else mask) == 1, ids, -100)
    out = model(ids, attention_mask=mask, labels=labels, segment_ids=segment_ids)
    out.loss.backward()
    gradients = {name: model.weight(name).grad.double().cpu().numpy() for name in shapes(CONFIG, "causal-lm")}
    return out.logits.detach().double().cpu().numpy(), gradients


def documents_of(mask) -> np.ndarray:
    """Two in each row: the first three tokens that are real, and the others."""
    real = np.ones((4, 13), int) if mask is None else mask
    return np.where(real == 1, 1 + (np.cumsum(real, axis=1) > 3), 0)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("device", "name"), WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", MASKS)
def test_a_padded_batch_has_the_logits_and_gradients_of_float64(device, name, dtype, padding, packed):
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    if name == "flex_attention" and padding not in ("none", "left"):
        pytest.skip("compiled for each shape, for seconds")
    ids, mask = token_ids(CONFIG), mask_named(padding)
    segment_ids = documents_of(mask) if packed else None
    model = load_backend("torch").random_model(CONFIG, dtype=dtype)
    truth, true_gradients = results(copy.deepcopy(model).double(), ids, mask, segment_ids)
    model = model.to(device)
    _, of_eager = results_of("eager", model, ids, mask, segment_ids)
    got, gradients = results_of(name, model, ids, mask, segment_ids)
    real = np.ones_like(ids) if mask is None else mask
    assert worst_row(got[real == 1], truth[real == 1]) <= BOUND[dtype] * ROUNDOFF[dtype]
    for weight, true in true_gradients.items():
        if weight.endswith("k_proj.bias"):
            continue  # its gradient is rounding alone
        error, plain = (np.linalg.norm(x[weight] - true) for x in (gradients, of_eager))
        assert error <= 2 * plain + 8 * ROUNDOFF[dtype] * np.linalg.norm(true), weight


def results_of(name: str, model, *args):
    model.set_attn_implementation(name)
    return results(model, *args)


@pytest.mark.parametrize(("device", "name"), where("eager", "sdpa", "flash_attention_2"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generated_tokens_are_those_of_the_largest_logits(device, name, dtype, padding):
    """Of the text as a whole in float64, but for what rounding may make of them."""
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    ids, mask = token_ids(CONFIG), mask_named(padding)
    mask = np.ones_like(ids) if mask is None else mask
    model = load_backend("torch").random_model(CONFIG, dtype=dtype, attn_implementation="eager")
    double = copy.deepcopy(model).double()
    model = model.to(device)
    model.set_attn_implementation(name)
    text = model.generate(ids, attention_mask=mask, max_new_tokens=40, eos_token_id=()).cpu().numpy()
    whole = np.concatenate([mask, np.ones((4, 40), int)], axis=1)
    with torch.no_grad():
        logits = double(text, attention_mask=whole).logits[:, ids.shape[1] - 1 : -1].numpy()
    chosen = np.take_along_axis(logits, text[:, ids.shape[1] :, None], axis=-1)[..., 0]
    allowed = 2 * BOUND[dtype] * ROUNDOFF[dtype] * np.linalg.norm(logits, axis=-1)
    assert (logits.max(-1) - chosen <= allowed).all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_the_trainer_lowers_the_loss(device):
    """In bfloat16 under autocast, by a padded batch."""
    model = load_backend("torch").random_model(CONFIG).to(device)
    trainer = Trainer(model, TrainingRecipe(learning_rate=0.01, warmup_steps=0, total_steps=20))
    ids, mask = token_ids(CONFIG), mask_named("left")
    batch = dict(input_ids=ids, attention_mask=mask, labels=np.where(mask == 1, ids, -100))
    with torch.autocast(device, torch.bfloat16):
        losses = [trainer.step(batch) for _ in range(10)]
    assert losses[-1] < losses[0] - 0.5


# -- kernels ----------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("gradient", [False, True], ids=["no gradient", "gradient"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", HEAD_SIZES)
def test_sdpa_runs_a_fused_kernel(dtype, H, gradient):
    q = torch.zeros(B, N, 192, H, dtype=getattr(torch, dtype), device="cuda", requires_grad=gradient)
    with sdpa.kernels(q, q, q):
        chosen = torch._fused_sdp_choice(q, q, q, None, 0.0, True, scale=1.0)
    fused = ("efficient",) if dtype == "float32" else ("cudnn", "flash")
    assert chosen in [sdpa.KERNELS[kernel].value for kernel in fused]


@GPU
@pytest.mark.parametrize(
    ("kernel", "dtype"), [("efficient", "float32"), *((k, d) for k in ("cudnn", "flash", "efficient") for d in HALF)]
)
@pytest.mark.parametrize("H", HEAD_SIZES)
@pytest.mark.parametrize("T", [192, 517])
def test_each_kernel_is_within_the_bound_and_twice_the_error_of_eager(monkeypatch, kernel, dtype, H, T):
    monkeypatch.setattr(sdpa, "_order_asked_for", kernel)
    inputs = attention_inputs(dtype, B, N, T, H)
    got, eager = (
        attended(lambda *qkv, name=name: attend(name, *qkv), "cuda", dtype, inputs) for name in ("sdpa", "eager")
    )
    truth = check_bound(got, inputs, dtype)
    assert not beyond_twice(eager, got, truth, slack("cuda", dtype))


@pytest.mark.parametrize(("device", "name"), where("eager", "sdpa", "flash_attention_2"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_deterministic_algorithms_give_the_same_gradients_twice(device, name, dtype):
    """FlashAttention 2 adds up the gradients of queries in no fixed order unless it is told to."""
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    inputs = attention_inputs(dtype, B, N, 517, 64)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (attended(lambda *qkv: attend(name, *qkv), device, dtype, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y)


@GPU
@pytest.mark.parametrize("dtype", DTYPES)
def test_documents_compile_into_one_graph_on_a_gpu(dtype):
    inputs = attention_inputs(dtype, B, N, 67, 64)
    qkv = tensors("cuda", dtype, *inputs[:3])
    first_BT = np.zeros((B, 67), int)
    first_BT[0, 20:] = 20
    compiled = torch.compile(causal_attention, backend="eager", fullgraph=True)
    got = Attended(compiled(*qkv, 0.0, torch.as_tensor(first_BT, device="cuda")).double().cpu().numpy())
    check_bound(got, inputs, dtype, first_BT)
