"""PyTorch's `scaled_dot_product_attention`: which of its kernels may run, and in which order.

On a CPU it has one fused kernel, which takes the causal flag. On CUDA it has four:

- cudnn: float16, bfloat16; the fastest on H100. Its backward is trusted after a trial (`cudnn_backward_is_right`).
- flash: float16, bfloat16; FlashAttention 2.
- efficient: the memory-efficient kernel, the only fused one for float32.
- math: the plain formula.

cuDNN plans anew for each length that it meets, for half a second; without a gradient it gets whole multiples of 128.

The environment variable OPT_TORCH_SDPA_ORDER names those that may run, in their order: "cudnn,flash,efficient,math".
With a mask, efficient and math are all that may run, whatever it names.
"""

import contextlib
import functools
import os

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from opt_core.errors import InputError, raise_if

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
ORDER_VARIABLE = "OPT_TORCH_SDPA_ORDER"
WITH_MASK = ("efficient", "math")  # cuDNN with masks is wrong in some releases: pytorch issues 196678, 191612
WITHOUT_CUDNN = ("flash", "efficient", "math")
HALF = (torch.float16, torch.bfloat16)
PLAN_TOKENS = 128

_order_asked_for = os.environ.get(ORDER_VARIABLE, "")
_cudnn_trials: dict[tuple[int | None, torch.dtype], bool] = {}  # by the index of the device, and dtype


def fused_attention(
    q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, *, mask=None, causal: bool = True, dropout: float = 0.0
) -> Tensor:
    """Causal where no `mask` is given, unless told otherwise; the query is scaled already."""
    qkv, causal, T = (q_BNTH, k_BNSH, v_BNSH), causal and mask is None, q_BNTH.shape[2]
    with kernels(*qkv, masked=mask is not None):
        fill = -T % PLAN_TOKENS if causal and _plans_each_length(*qkv, dropout) else 0
        if fill:  # behind all tokens, where none of them looks
            qkv = tuple(F.pad(x_BNTH, (0, 0, 0, fill)) for x_BNTH in qkv)
        out_BNTH = F.scaled_dot_product_attention(*qkv, mask, dropout, causal, scale=1.0)
    return out_BNTH[:, :, :T] if fill else out_BNTH


def kernels(*qkv: Tensor, masked: bool = False) -> contextlib.AbstractContextManager:
    """Restricts and orders the kernels for these tensors; on a CPU, or with PyTorch's own order, does nothing."""
    x = qkv[0]
    if not x.is_cuda:
        return contextlib.nullcontext()
    asked_for = order = check_order()
    if masked:
        order = tuple(name for name in order if name in WITH_MASK) or WITH_MASK
    elif not order and x.dtype in HALF and needs_gradient(*qkv) and not cudnn_backward_is_right(x.device, x.dtype):
        order = WITHOUT_CUDNN
    if not order:
        return contextlib.nullcontext()
    if asked_for:
        _let_pytorch_order_first(x.device)
    return sdpa_kernel([KERNELS[name] for name in order], set_priority=bool(asked_for))


@functools.cache
def _let_pytorch_order_first(device: torch.device) -> None:
    """PyTorch finds its own order, cuDNN first on Hopper, at its first choice: made later it would replace ours."""
    if not torch.compiler.is_compiling():
        q = torch.empty(1, 1, 2, 64, dtype=torch.float16, device=device)
        torch._fused_sdp_choice(q, q, q, None, 0.0, True, scale=1.0)


def _plans_each_length(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float) -> bool:
    """Whether cuDNN is what PyTorch will choose, and no gradient is wanted, which would be of the filling, too.

    A new length took 0.44 s on B200 with PyTorch 2.11 (https://github.com/modelscope/FunASR/issues/3704).
    """
    if not q_BNTH.is_cuda or q_BNTH.dtype not in HALF or torch.compiler.is_compiling():
        return False
    if needs_gradient(q_BNTH, k_BNTH, v_BNTH):
        return False
    chosen = torch._fused_sdp_choice(q_BNTH, k_BNTH, v_BNTH, None, dropout, True, scale=1.0)  # 2.6 to 2.13 at least
    return chosen == KERNELS["cudnn"].value


def check_order() -> tuple[str, ...]:
    """The names in OPT_TORCH_SDPA_ORDER as it was at import; none if it was not set. Raises InputError."""
    names = tuple(name.strip() for name in _order_asked_for.split(",") if name.strip())
    unknown = [name for name in names if name not in KERNELS]
    problems = [f"{ORDER_VARIABLE}: expected names among {', '.join(KERNELS)}, got {name!r}" for name in unknown]
    raise_if(InputError, "invalid environment", problems)
    return names


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """For products that are in float32 on purpose: autocast would round their factors to half precision again."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def cudnn_backward_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Runs the trial once a process, device and dtype; False where it cannot run, in a graph that is being made."""
    case = device.index, dtype
    if case not in _cudnn_trials:
        if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return False
        _cudnn_trials[case] = gradients_are_right(device, dtype, [KERNELS["cudnn"]])
    return _cudnn_trials[case]


@torch.enable_grad()
def gradients_are_right(device, dtype: torch.dtype, backends: list) -> bool:
    """The case of https://github.com/pytorch/pytorch/issues/196678, without a mask, as we call the kernel.

    There cuDNN's backward gave NaN for queries when the number of tokens was 64 modulo 128 and the weights of a row
    summed to less than the exponential of -88.7 before scaling.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # named, as all here: torch.set_default_device may say another
    q, k, v, d_out = (torch.randn(1, 1, 192, 64, generator=generator, device="cpu") for _ in range(4))
    q, k = 0.1 * q, 0.1 * k
    q[..., 0], k[..., 0] = 1.0, -120.0  # every score is about -120
    want = _gradients(q.to(dtype).double(), k.to(dtype).double(), v.to(dtype).double(), d_out.to(dtype).double())
    try:
        with sdpa_kernel(backends), without_autocast(torch.device(device)):
            got = _gradients(*(x.to(device, dtype) for x in (q, k, v, d_out)))
    except RuntimeError:  # the kernel is not for this device
        return False
    # The first feature is left out: there the gradient of the queries is -120 times a sum that is 0 but for rounding.
    return all(_close(x.double().cpu()[..., 1:], y[..., 1:]) for x, y in zip(got, want, strict=True))


def _gradients(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=1.0)
    return torch.autograd.grad(out, inputs, d_out)


def _close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).norm() <= 0.02 * want.norm())  # bfloat16 errs by 0.004; False for NaN
