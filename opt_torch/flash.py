"""FlashAttention in PyTorch: "flash_attention_2" and "flash_attention_3", for float16 and bfloat16 on CUDA.

The kernels are those of Dao's packages where they are installed: `flash_attn` (arXiv:2307.08691), and for Hopper alone
`flash_attn_interface` (arXiv:2407.08608). Without the first, "flash_attention_2" runs its copy inside PyTorch: batches
without padding through `scaled_dot_product_attention`, all others through `varlen_attn` of PyTorch 2.11.
Other dtypes and devices are an error, never another kernel. Behind a cache, where without a package there is none of
them, and with a gradient or dropout neither, what "sdpa" runs serves.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from opt_core.errors import InputError, raise_if
from opt_torch.sdpa import HALF, KERNELS, check_order
from opt_torch.segments import Segments, attention_by_segment

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
DEVICE = "cuda"
LARGEST_HEAD = 256
OLDEST = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}  # compute capability


def flash_attention(
    q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, name: str, segments: Segments | None = None, dropout: float = 0.0
) -> Tensor:
    """Causal attention of T tokens among themselves, or within `segments`; the query is scaled already."""
    check_call(name, q_BNTH, segments is not None, dropout)
    if segments is None:
        return _dense(name, q_BNTH, k_BNTH, v_BNTH, dropout)
    kernel = functools.partial(_of_runs, name, dropout)
    return attention_by_segment(kernel, q_BNTH, k_BNTH, v_BNTH, segments)


def flash_cached_attention(q_BNTH: Tensor, k_BNSH: Tensor, v_BNSH: Tensor, lengths_B: Tensor, name: str) -> Tensor:
    """Attention of T tokens that follow `lengths_B` cached ones; needs the package. No gradient, no dropout."""
    filled_B = (lengths_B + q_BNTH.shape[2]).to(torch.int32)  # the last query sees them all, and so on backwards
    q_BTNH, k_BSNH, v_BSNH = (x.transpose(1, 2) for x in (q_BNTH, k_BNSH, v_BNSH))
    kernel = package(name).flash_attn_with_kvcache
    out = kernel(q_BTNH, k_BSNH, v_BSNH, cache_seqlens=filled_B, softmax_scale=1.0, causal=True)
    return _output(out).transpose(1, 2)


def package(name: str) -> ModuleType | None:
    """The installed package of an implementation, imported when first asked for; None where there is none."""
    module = PACKAGES[name]
    if module in sys.modules:
        return sys.modules[module]
    return importlib.import_module(module) if _is_installed(module) else None


@functools.cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def installation_problems(name: str, head_size: int) -> list[str]:
    """What is wrong for an implementation whatever the input will be."""
    problems = []
    if package(name) is None and (
        name == "flash_attention_3" or not torch.backends.cuda.is_flash_attention_available()
    ):
        or_cuda = ", or PyTorch built for CUDA" if name == "flash_attention_2" else ""
        problems.append(
            f"attn_implementation: {name} expects the package {PACKAGES[name]}{or_cuda}, got an environment without"
        )
    if head_size % 8 or head_size > LARGEST_HEAD:
        problems.append(
            f"attn_implementation: {name} expects a head size that is a multiple of 8 up to {LARGEST_HEAD}, "
            f"got {head_size}"
        )
    return problems


def check_call(name: str, q_BNTH: Tensor, in_segments: bool, dropout: float) -> None:
    """Raises an InputError that lists what these kernels cannot do."""
    problems = []
    if q_BNTH.dtype not in HALF:
        problems.append(f"attn_implementation: {name} expects float16 or bfloat16, got {_short(q_BNTH.dtype)}")
    if q_BNTH.device.type != DEVICE:
        problems.append(f"attn_implementation: {name} expects a {DEVICE} device, got {q_BNTH.device.type}")
    elif q_BNTH.is_cuda and (capability := _capability(q_BNTH.device)) < OLDEST[name]:
        oldest, this = (".".join(map(str, numbers)) for numbers in (OLDEST[name], capability))
        problems.append(f"attn_implementation: {name} expects a GPU of compute capability {oldest}, got {this}")
    if in_segments and package(name) is None and runs_inside_pytorch() is None:
        problems.append(f"attn_implementation: {name} expects PyTorch 2.11 for a padded batch, got {torch.__version__}")
    if dropout and (name == "flash_attention_3" or (in_segments and package(name) is None)):
        problems.append(f"attn_implementation: {name} expects attention_dropout 0 in training here, got {dropout}")
    raise_if(InputError, "invalid arguments", problems)


def _dense(name: str, q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor, dropout: float) -> Tensor:
    if package(name) is None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True, scale=1.0, dropout_p=dropout)
    q_BTNH, k_BTNH, v_BTNH = (x.transpose(1, 2) for x in (q_BNTH, k_BNTH, v_BNTH))
    return _output(package(name).flash_attn_func(q_BTNH, k_BTNH, v_BTNH, **_options(dropout))).transpose(1, 2)


def _of_runs(
    name: str, dropout: float, q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor, starts: Tensor, longest: int
) -> Tensor:
    runs = (q_RNH, k_RNH, v_RNH, starts, starts, longest, longest)
    if package(name) is None:
        return runs_inside_pytorch()(*runs[:4], longest)
    return _output(package(name).flash_attn_varlen_func(*runs, **_options(dropout)))


def _options(dropout: float) -> dict:
    options = dict(softmax_scale=1.0, causal=True, deterministic=torch.are_deterministic_algorithms_enabled())
    return options | (dict(dropout_p=dropout) if dropout else {})


def _output(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # early releases of flash_attn_interface return the sums


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def may_run_inside_pytorch(q_BNTH: Tensor) -> bool:
    """Whether PyTorch's kernel for runs takes these queries, and the order of kernels has it."""
    H = q_BNTH.shape[-1]
    takes = q_BNTH.is_cuda and q_BNTH.dtype in HALF and H % 8 == 0 and H <= LARGEST_HEAD
    in_order = "flash" in (check_order() or KERNELS)
    return takes and in_order and _capability(q_BNTH.device) >= OLDEST["flash_attention_2"]


@functools.cache
def runs_inside_pytorch() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
    """PyTorch's own kernel for runs of tokens, as `attention_by_segment` calls it; None before PyTorch 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if "window_size" not in inspect.signature(varlen_attn).parameters:  # 2.10, which has no scale either
        return None

    def attention(q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor, starts: Tensor, longest: int) -> Tensor:
        causal = (-1, 0)
        return varlen_attn(q_RNH, k_RNH, v_RNH, starts, starts, longest, longest, scale=1.0, window_size=causal)

    return attention


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
