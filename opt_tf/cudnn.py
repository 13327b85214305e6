"""Causal attention by cuDNN's fused kernels, in half precision on NVIDIA GPUs, in TensorFlow.

TensorFlow has no operation for them, but the XLA inside it runs the calls by which JAX reaches them
(`jax/_src/cudnn/fused_attention_stablehlo.py`, 0.10). Each is written here as a StableHLO program of that one call,
and run by `XlaCallModule`: eagerly, in graphs and under jit_compile; JAX is not needed. Not done: dropout, documents
within a row, and a cache.
"""

import json

import tensorflow as tf
from tensorflow import Tensor
from tensorflow.compiler.tf2xla.python import xla

from opt_core.errors import InputError, raise_if

ELEMENTS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}  # as StableHLO names them
HALF = ("float16", "bfloat16")
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
VERSION = 9  # of the calling convention of XlaCallModule, TensorFlow 2.18 to 2.21 at least
# The products of each pass, [B, N] outside: their contracted dimensions on the left and on the right.
PRODUCTS = {
    FORWARD: {"bmm1": (3, 3), "bmm2": (3, 2)},
    BACKWARD: {
        "bmm1_grad_gemm1": (2, 2),
        "bmm1_grad_gemm2": (3, 2),
        "bmm2_grad_gemm1": (2, 2),
        "bmm2_grad_gemm2": (3, 3),
    },
}


def cudnn_problems(dtype: str, head_size: int) -> list[str]:
    """Why cuDNN cannot run for a model of this compute dtype on this machine."""
    problems = []
    gpus = tf.config.list_physical_devices("GPU")
    capability = tf.config.experimental.get_device_details(gpus[0]).get("compute_capability") if gpus else None
    if capability is None or capability < (8, 0):
        got = "no GPU" if not gpus else f"{gpus[0].name} of {capability}"
        problems.append(f"expects an NVIDIA GPU of compute capability 8.0 or newer, got {got}")
    if dtype not in HALF:
        problems.append(f"expects float16 or bfloat16, got {dtype}")
    largest = 128 if capability is None or capability < (9, 0) else 256
    if head_size % 8 or head_size > largest:
        problems.append(f"expects a head size that is a multiple of 8 up to {largest}, got {head_size}")
    return problems


@tf.autograph.experimental.do_not_convert  # which would make errors of another class
def cudnn_attention(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor) -> Tensor:
    """Attention of T tokens among themselves; the query is scaled already. All sizes must be known when traced.

    An odd T is filled up, with a token that no other sees: cuDNN has not always taken one token alone
    (https://github.com/pytorch/pytorch/pull/138531), and JAX gives it an even number.

    Raises:
        InputError: where a traced function does not know the batch or the length.
    """
    shape = q_BNTH.shape
    problem = f"attn_implementation: cudnn expects sizes known to a traced function, got queries of shape {shape}"
    raise_if(InputError, "invalid arguments", [] if shape.is_fully_defined() else [problem])
    T = shape[2]
    if T % 2 == 0:
        return _attend(q_BNTH, k_BNTH, v_BNTH)
    filled = (tf.pad(x_BNTH, [[0, 0], [0, 0], [0, 1], [0, 0]]) for x_BNTH in (q_BNTH, k_BNTH, v_BNTH))
    return _attend(*filled)[:, :, :T]


@tf.custom_gradient
def _attend(q_BNTH: Tensor, k_BNTH: Tensor, v_BNTH: Tensor):
    shape, saved = q_BNTH.shape, (q_BNTH, k_BNTH, v_BNTH)
    out_BNTH, log_sum_BNT = _run(FORWARD, saved, [(shape, q_BNTH.dtype), (shape[:3], tf.float32)])

    def gradient(d_out_BNTH: Tensor) -> list[Tensor]:
        return _run(BACKWARD, (*saved, log_sum_BNT, d_out_BNTH, out_BNTH), [(shape, q_BNTH.dtype)] * 3)

    return out_BNTH, gradient


def _run(target: str, operands: tuple[Tensor, ...], results: list[tuple]) -> list[Tensor]:
    given = [_type(x.shape, x.dtype) for x in operands]
    made = [_type(*result) for result in results]
    module = _module(target, given, made, _backend_config(target, operands[0]))
    shapes, dtypes = zip(*results, strict=True)
    return xla.call_module(operands, version=VERSION, module=module, Tout=dtypes, Sout=shapes, platforms=["CUDA"])


def _module(target: str, given: list[str], made: list[str], config: str) -> str:
    """One custom call; behind its results it returns the workspace, whose size XLA finds."""
    names = [f"%x{i}" for i in range(len(given))]
    outs = ", ".join(f"%y#{i}" for i in range(len(made)))
    returned = [*made, "tensor<0xui8>"]
    layouts, returned_layouts = (", ".join(map(_layout, types)) for types in (given, returned))
    return f"""
module @attention {{
  func.func public @main({", ".join(map("{}: {}".format, names, given))}) -> ({", ".join(made)}) {{
    %y:{len(returned)} = stablehlo.custom_call @{target}({", ".join(names)}) {{
      api_version = 2 : i32, backend_config = {json.dumps(config)},
      operand_layouts = [{layouts}], result_layouts = [{returned_layouts}]
    }} : ({", ".join(given)}) -> ({", ".join(returned)})
    return {outs} : {", ".join(made)}
  }}
}}
"""


def _type(shape, dtype: tf.DType) -> str:
    return f"tensor<{'x'.join(map(str, shape))}x{ELEMENTS[dtype.name]}>"


def _layout(tensor_type: str) -> str:
    """Row-major, of a StableHLO type."""
    rank = tensor_type.count("x")
    order = list(range(rank))[::-1]
    return f"dense<{order if rank > 1 else 0}> : tensor<{rank}xindex>"


def _backend_config(target: str, q_BNTH: Tensor) -> str:
    """What JAX 0.10 sends with the call: a causal mask, no scale, no dropout."""
    B, N, T, _ = q_BNTH.shape
    config = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": 1.0,
        "intermediate_tensor_shape": {
            "element_type": ELEMENTS[q_BNTH.dtype.name].upper(),
            "dimensions": [str(size) for size in (B, N, T, T)],
            "layout": {"minor_to_major": ["3", "2", "1", "0"]},
            "is_dynamic_dimension": [False] * 4,
        },
        "is_flash_attention": True,
        "mask_type": "CAUSAL",
        **{f"{name}_dot_dimension_numbers": _dimensions(*pair) for name, pair in PRODUCTS[target].items()},
        "dropout_rate": 0.0,
        "seed": 42,
        "sliding_window_length": 0,
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    }
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": config})


def _dimensions(left: int, right: int) -> dict[str, list[str]]:
    batch = ["0", "1"]
    return {
        "lhs_contracting_dimensions": [str(left)],
        "rhs_contracting_dimensions": [str(right)],
        "lhs_batch_dimensions": batch,
        "rhs_batch_dimensions": batch,
    }
