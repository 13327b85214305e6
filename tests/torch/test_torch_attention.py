"""Every way to attend in PyTorch against float64: output and gradients, documents, caches, and what is refused.

The same tests run on a GPU with more implementations (`-m gpu`).
"""

import numpy as np
import pytest
import torch
from attention_truth import (
    DTYPES,
    Attended,
    attention_inputs,
    attention_truth,
    error_bound,
    root_mean_square_error,
    worst_share,
)
from torch.nn.attention import SDPBackend

from opt_torch import attention, sdpa
from opt_torch.attention import cached_attention, causal_attention, eager_attention
from opt_torch.cache import slots_behind

B, N = 2, 3
HEAD_SIZES = (64, 80, 128)
GPU = pytest.mark.gpu
WHERE = [
    ("cpu", "eager"),
    ("cpu", "sdpa"),
    *(pytest.param("cuda", name, marks=GPU) for name in ("eager", "sdpa", "flash_attention_2", "flex_attention")),
]


def documents(T: int) -> np.ndarray:
    """Two rows: three documents, and one of a single token before another."""
    first_BT = np.zeros((B, T), int)
    first_BT[0, T // 3 :], first_BT[0, T // 2 :], first_BT[1, 1:] = T // 3, T // 2, 1
    return first_BT


def tensors(device: str, dtype: str, *arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(x.astype(np.float32)).to(device, getattr(torch, dtype)) for x in arrays]


def attend(name: str, q, k, v, first_BT=None) -> torch.Tensor:
    if name == "eager":
        return eager_attention(q, k, v, None, 0.0, first_BT)[0]
    return causal_attention(q, k, v, 0.0, first_BT, name)


def attended(function, device: str, dtype: str, inputs) -> Attended:
    """The output and gradients of `function(q, k, v)` as NumPy's float64."""
    *qkv, d_out = tensors(device, dtype, *inputs)
    qkv = [x.requires_grad_() for x in qkv]
    out = function(*qkv)
    parts = (out, *torch.autograd.grad(out, qkv, d_out))
    return Attended(*(x.detach().double().cpu().numpy() for x in parts))


def on_device(first_BT, device):
    return None if first_BT is None else torch.as_tensor(first_BT, device=device)


@pytest.mark.parametrize(("device", "name"), WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", HEAD_SIZES)
@pytest.mark.parametrize("T", [67, 192])  # 192: the length of cuDNN's NaN
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_outputs_and_gradients_are_within_the_bound_and_twice_the_error_of_eager(device, name, dtype, H, T, packed):
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    if name == "flex_attention" and (not packed or T == 67 or H != 80):
        pytest.skip("compiled for each shape, for seconds")
    inputs, first_BT = attention_inputs(dtype, B, N, T, H), documents(T) if packed else None
    first = on_device(first_BT, device)
    got = attended(lambda *qkv: attend(name, *qkv, first), device, dtype, inputs)
    truth = attention_truth(*inputs[:3], first_BT, d_out=inputs[3])
    shares = worst_share(got, truth, error_bound(*inputs[:3], dtype, first_BT, d_out=inputs[3]))
    assert max(shares.values()) <= 1, shares
    eager = attended(lambda *qkv: attend("eager", *qkv, first), device, dtype, inputs)
    errors, of_eager = root_mean_square_error(got, truth), root_mean_square_error(eager, truth)
    assert all(errors[part] <= 2 * of_eager[part] for part in errors), (errors, of_eager)


@pytest.mark.parametrize(("device", "name"), WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softmax_that_nearly_chooses_is_within_the_bound(device, name, dtype):
    """Large scores, whose exponentials underflow."""
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    inputs = attention_inputs(dtype, B, N, 131, 64, size=4)
    got = attended(lambda *qkv: attend(name, *qkv), device, dtype, inputs)
    truth = attention_truth(*inputs[:3], d_out=inputs[3])
    shares = worst_share(got, truth, error_bound(*inputs[:3], dtype, d_out=inputs[3]))
    assert max(shares.values()) <= 1, shares


@pytest.mark.parametrize(("device", "name"), [where for where in WHERE if where != ("cpu", "eager")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", HEAD_SIZES)
@pytest.mark.parametrize("T", [1, 5, 11], ids=lambda T: f"{T} tokens")
def test_tokens_behind_a_cache_are_within_the_bound(device, name, dtype, H, T):
    """Slots that no row has reached hold NaN, on a GPU from the end of a split on: they must not be read."""
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    S, lengths_B = 211, np.array([0, 61])
    q, k, v, _ = attention_inputs(dtype, B, N, T, H, S)
    inputs = tensors(device, dtype, q, k, v)
    if device == "cpu" or T == 1:
        for x in inputs[1:]:
            x[:, :, 61 + T if device == "cpu" else 128 :] = torch.nan
    with torch.no_grad():
        implementation = "sdpa" if name == "eager" else name
        slots = slots_behind(torch.as_tensor(lengths_B, device=device), T)
        out = cached_attention(*inputs, slots, 0.0, implementation)
    truth = attention_truth(q, k, v, None, lengths_B)
    shares = worst_share(Attended(out.double().cpu().numpy()), truth, error_bound(q, k, v, dtype, lengths_B=lengths_B))
    assert shares["out"] <= 1


def test_documents_are_computed_one_by_one_on_a_cpu(monkeypatch):
    """Without a mask, which would cost all T x T scores."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.append((q.shape[2], options.get("attn_mask")))
        return real(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    qkv = tensors("cpu", "float32", *attention_inputs("float32", B, N, 12, 8)[:3])
    causal_attention(*qkv, 0.0, torch.as_tensor(documents(12)))
    assert seen == [(4, None), (2, None), (6, None), (1, None), (11, None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_documents_compile_into_one_graph(dtype):
    qkv = tensors("cpu", dtype, *attention_inputs(dtype, B, N, 12, 8)[:3])
    first = torch.as_tensor(documents(12))
    compiled = torch.compile(causal_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv, 0.0, first), causal_attention(*qkv, 0.0, first))


# -- which kernel runs on CUDA ----------------------------------------------------------------------------------------


class CudaTensor:
    """What `sdpa.kernels` asks of a tensor."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype, requires_grad):
        self.dtype, self.requires_grad = dtype, requires_grad


def kernels_in_order(*args, **options) -> list[SDPBackend]:
    from torch.nn.attention import _cur_sdpa_kernel_backends

    with sdpa.kernels(*args, **options):
        return _cur_sdpa_kernel_backends(with_priority=True)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_cudnn_trains_once_its_trial_has_passed(monkeypatch, trusted, dtype, training):
    monkeypatch.setattr(sdpa, "_cudnn_trials", {0: trusted})
    got = kernels_in_order(CudaTensor(dtype, training))
    if training and dtype == torch.float16 and not trusted:
        assert got == [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    else:
        assert SDPBackend.CUDNN_ATTENTION in got


def spied_lengths(monkeypatch) -> list[int]:
    """The lengths that SDPA is called with."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, *args, **options):
        seen.append(q.shape[2])
        return real(q, k, v, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return seen


@pytest.mark.parametrize(("T", "filled"), [(67, 128), (128, 128), (131, 256)])
def test_where_cudnn_plans_each_length_it_gets_whole_multiples_of_128(monkeypatch, T, filled):
    seen = spied_lengths(monkeypatch)
    inputs = attention_inputs("float32", B, N, T, 16)
    qkv = tensors("cpu", "float32", *inputs[:3])
    want = sdpa.fused_attention(*qkv)
    monkeypatch.setattr(sdpa, "_plans_each_length", lambda *args: True)
    got = sdpa.fused_attention(*qkv)
    assert seen == [T, filled]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dtype", "gradient", "chosen", "fills"), [
    (torch.float16, False, SDPBackend.CUDNN_ATTENTION, True),
    (torch.float16, False, SDPBackend.FLASH_ATTENTION, False),
    (torch.float16, True, SDPBackend.CUDNN_ATTENTION, False),
    (torch.float32, False, SDPBackend.CUDNN_ATTENTION, False),
])  # fmt: skip
def test_only_for_cudnn_without_a_gradient_lengths_are_filled_up(monkeypatch, dtype, gradient, chosen, fills):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **options: chosen.value)
    assert sdpa._plans_each_length(*[CudaTensor(dtype, gradient)] * 3, 0.0) is fills


def test_pytorch_says_which_kernel_it_will_choose():
    """By a private function: on a CPU with the number of the flash kernel."""
    q = torch.zeros(1, 2, 11, 16)
    assert torch._fused_sdp_choice(q, q, q, None, 0.0, True, scale=1.0) == SDPBackend.FLASH_ATTENTION.value


def test_a_default_device_does_not_disturb_the_trial():
    with torch.device("meta"):
        assert sdpa.gradients_are_right(torch.device("cpu"), torch.bfloat16, [SDPBackend.FLASH_ATTENTION])


def test_a_mask_keeps_cudnn_out():
    got = kernels_in_order(CudaTensor(torch.float16, False), masked=True)
    assert got == [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def test_the_order_of_the_environment_is_obeyed(monkeypatch):
    monkeypatch.setattr(sdpa, "_order_asked_for", "math, cudnn")
    got = kernels_in_order(CudaTensor(torch.float16, True))
    assert got == [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]


def test_an_unknown_kernel_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setattr(sdpa, "_order_asked_for", "flash,cuddn,maths")
    with pytest.raises(ValueError, match="expected names among cudnn, flash, efficient, math, got 'cuddn'") as caught:
        attention.check_implementation("sdpa", None)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("device", "kernel"),
    [("cpu", "flash"), ("cpu", "math"), *(pytest.param("cuda", k, marks=GPU) for k in ("flash", "efficient", "math"))],
)
def test_right_gradients_pass_the_trial(device, kernel):
    assert sdpa.gradients_are_right(torch.device(device), torch.bfloat16, [sdpa.KERNELS[kernel]])


@pytest.mark.parametrize("fault", [lambda x: x * torch.nan, lambda x: x * 1.1])
def test_wrong_gradients_fail_the_trial(monkeypatch, fault):
    """As they were for the queries alone."""
    right = sdpa._gradients

    def wrong(q, k, v, d_out):
        d_q, d_k, d_v = right(q, k, v, d_out)
        return (d_q if q.dtype == torch.float64 else fault(d_q)), d_k, d_v

    monkeypatch.setattr(sdpa, "_gradients", wrong)
    assert not sdpa.gradients_are_right(torch.device("cpu"), torch.bfloat16, [SDPBackend.FLASH_ATTENTION])


def test_a_kernel_that_is_not_for_the_device_fails_the_trial():
    assert not sdpa.gradients_are_right(torch.device("cpu"), torch.bfloat16, [SDPBackend.CUDNN_ATTENTION])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cudnn_passes_its_trial(dtype):
    """Where this fails, training uses FlashAttention 2: slower, and right."""
    assert sdpa.gradients_are_right(torch.device("cuda"), dtype, [SDPBackend.CUDNN_ATTENTION])
