"""Every way to attend in PyTorch against float64: output and gradients, documents, caches, and what is refused.

The same tests run on a GPU with more implementations (`-m gpu`).
"""

import numpy as np
import pytest
import torch
from attention_truth import DTYPES, Attended, attention_inputs, beyond_twice, check_bound, far_below_zero
from harness import ROUNDOFF
from torch.nn.attention import SDPBackend

from opt_torch import attention, sdpa
from opt_torch.attention import cached_attention, causal_attention, eager_attention
from opt_torch.cache import slots_behind

B, N = 2, 3
HEAD_SIZES = (64, 80, 128)
GPU = pytest.mark.gpu
ON_GPU = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def where(*on_gpu: str) -> list:
    """Eager and sdpa on a CPU, and implementations on a GPU."""
    return [("cpu", "eager"), ("cpu", "sdpa"), *(pytest.param("cuda", name, marks=GPU) for name in on_gpu)]


WHERE = where(*ON_GPU)


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


def slack(device: str, dtype: str) -> float:
    """On CUDA the fused kernel for float32 multiplies in three parts of TF32, which costs a few units of roundoff."""
    return 4 * ROUNDOFF[dtype] if (device, dtype) == ("cuda", "float32") else 0.0


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
    truth = check_bound(got, inputs, dtype, first_BT)
    eager = attended(lambda *qkv: attend("eager", *qkv, first), device, dtype, inputs)
    assert not beyond_twice(eager, got, truth, slack(device, dtype))


@pytest.mark.parametrize(("device", "name"), where(*ON_GPU[:3])[1:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", HEAD_SIZES)
@pytest.mark.parametrize("T", [67, 131])
def test_outputs_without_a_gradient_are_within_the_bound(device, name, dtype, H, T):
    """Other kernels than with one: on a GPU cuDNN, for tokens filled up to a multiple of 128."""
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    inputs = attention_inputs(dtype, B, N, T, H)[:3]
    with torch.no_grad():
        got, eager = (attend(x, *tensors(device, dtype, *inputs)).double().cpu().numpy() for x in (name, "eager"))
    truth = check_bound(Attended(got), inputs, dtype)
    assert not beyond_twice(Attended(eager), Attended(got), truth, slack(device, dtype))


@pytest.mark.parametrize(("device", "name"), WHERE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_softmax_that_nearly_chooses_is_within_the_bound(device, name, dtype):
    """Large scores, whose exponentials underflow."""
    if name == "flash_attention_2" and dtype == "float32":
        pytest.skip("refused: test_torch_flash.py")
    inputs = attention_inputs(dtype, B, N, 131, 64, size=4)
    got = attended(lambda *qkv: attend(name, *qkv), device, dtype, inputs)
    check_bound(got, inputs, dtype)


@pytest.mark.parametrize(("device", "name"), where(*ON_GPU[:3]))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("T", [67, 192, 704])
def test_scores_may_lie_far_below_zero(device, name, dtype, T):
    inputs = far_below_zero(dtype, B, N, T, 64)
    got = attended(lambda *qkv: attend(name, *qkv), device, dtype, inputs)
    check_bound(got, inputs, dtype)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(("device", "name"), where("eager", "sdpa"))
def test_autocast_leaves_scores_and_sums_in_float32(device, name, packed):
    """It would round the factors of every product again, those of float32 as well."""
    inputs, first_BT = attention_inputs("bfloat16", B, N, 131, 64, size=4), documents(131) if packed else None
    first = on_device(first_BT, device)
    with torch.autocast(device, torch.bfloat16):
        got = attended(lambda *qkv: attend(name, *qkv, first), device, "bfloat16", inputs)
    check_bound(got, inputs, "bfloat16", first_BT)


@pytest.mark.parametrize(("device", "name"), where("eager", "sdpa", "flash_attention_2"))
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
    lengths = torch.as_tensor(lengths_B, device=device)
    with torch.no_grad():
        eager = eager_attention(inputs[0], *(x.nan_to_num() for x in inputs[1:]), lengths)[0]
        out = eager if name == "eager" else cached_attention(*inputs, slots_behind(lengths, T), 0.0, name)
    got, eager = (Attended(x.double().cpu().numpy()) for x in (out, eager))
    truth = check_bound(got, (q, k, v), dtype, None, lengths_B)
    assert not beyond_twice(eager, got, truth, slack(device, dtype))


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


def test_kernels_are_chosen_without_an_order_that_nobody_asked_for(monkeypatch):
    """To leave it would restore the order from before PyTorch had put cuDNN first, at its first call."""
    asked = []
    monkeypatch.setattr(sdpa, "sdpa_kernel", lambda names, set_priority: asked.append(set_priority))
    monkeypatch.setattr(sdpa, "_cudnn_trials", {(0, torch.float16): False})
    sdpa.kernels(CudaTensor(torch.float16, False), masked=True)
    sdpa.kernels(CudaTensor(torch.float16, True))
    assert asked == [False, False]


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("training", [True, False])
def test_cudnn_trains_once_its_trial_has_passed(monkeypatch, trusted, dtype, training):
    monkeypatch.setattr(sdpa, "_cudnn_trials", {(0, dtype): trusted})
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
    first = []
    monkeypatch.setattr(sdpa, "_order_asked_for", "math, cudnn")
    monkeypatch.setattr(sdpa, "_let_pytorch_order_first", first.append)
    got = kernels_in_order(CudaTensor(torch.float16, True))
    assert got == [SDPBackend.MATH, SDPBackend.CUDNN_ATTENTION]
    assert first == [CudaTensor.device]


@pytest.mark.parametrize(
    ("asked", "given"), [("cudnn, math,efficient", ["math", "efficient"]), ("flash", sdpa.WITH_MASK)]
)
def test_the_order_of_the_environment_gives_no_mask_to_a_kernel_that_errs_with_it(monkeypatch, asked, given):
    monkeypatch.setattr(sdpa, "_order_asked_for", asked)
    monkeypatch.setattr(sdpa, "_let_pytorch_order_first", lambda device: None)
    got = kernels_in_order(CudaTensor(torch.float16, False), masked=True)
    assert got == [sdpa.KERNELS[name] for name in given]


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
