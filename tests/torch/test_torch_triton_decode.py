"""The Triton kernels of decoding: in Triton's interpreter on a CPU, and compiled for a GPU that need not be there.

Both have a process of their own: what the interpreter runs has to be known before Triton is imported, and Triton 3.7
and TensorFlow 2.21 in one process crash. So Triton is not installed beside the other packages on a machine without a
GPU, but in a folder `triton` of the environment (see the Makefile), which only those processes search.
"""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_truth import DTYPES, Attended, attention_inputs, attention_truth, error_bound, worst_share

TRITON = Path(sys.prefix) / "triton"
if find_spec("triton") is None and not TRITON.is_dir():
    pytest.skip("Triton is not installed", allow_module_level=True)

HEAD_SIZES = (64, 80, 128)
TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
# Name: dtype, head size, tokens, splits. 7 is no head size of OPT.
CASES = {
    "-".join(map(str, case)): case
    for case in [
        *itertools.product(DTYPES, (*HEAD_SIZES, 7), (1,), (4,)),
        ("float32", 16, 3, 1),
        ("bfloat16", 80, 3, 2),
    ]
}


def measure(device: str) -> dict[str, float]:
    """The largest error of each case in units of its bound."""
    from opt_torch.triton_decode import decode_attention

    shares, lengths_B, S = {}, np.array([0, 64, 131]), 139
    for name, (dtype, H, T, splits) in CASES.items():
        q, k, v, _ = attention_inputs(dtype, 3, 2, T, H, S, size=4)
        inputs = [torch.from_numpy(x.astype(np.float32)).to(device, getattr(torch, dtype)) for x in (q, k, v)]
        for row, length in enumerate(lengths_B):
            for x in inputs[1:]:
                x[row, :, length + T :] = torch.nan  # what is not filled must not be read
        out = decode_attention(*inputs, torch.as_tensor(lengths_B, device=device), splits=splits)
        truth, bound = attention_truth(q, k, v, None, lengths_B), error_bound(q, k, v, dtype, lengths_B=lengths_B)
        shares[name] = worst_share(Attended(out.double().cpu().numpy()), truth, bound)["out"]
    return shares


def run_apart(expression: str, **settings: str) -> Any:
    """The value of an expression of this module, `t`, in a process that finds Triton."""
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(Path(__file__).parent), *sys.path, str(TRITON)]
    env = os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}
    code = f"import json, {Path(__file__).stem} as t; print(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def shares(request) -> dict[str, float]:
    return measure("cuda") if request.param == "cuda" else run_apart("t.measure('cpu')", TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", CASES)
def test_decoding_is_within_the_bound(shares, case):
    assert shares[case] <= 1


def parameters(kernel, dtype: str, **constants) -> tuple[dict[str, str], dict]:
    """What Triton's compiler asks for: the type of each argument, and which pointers and strides are aligned."""
    floats = {"q_ptr", "k_ptr", "v_ptr", "out_ptr"}
    types, aligned = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            pointed = TRITON_NAMES[dtype] if name in floats else "i64" if name == "lengths_ptr" else "fp32"
            types[name], aligned[(i,)] = f"*{pointed}", [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
            if "stride" in name:
                aligned[(i,)] = [["tt.divisibility", 16]]
    return types, aligned


def compile_for_hopper() -> dict[str, list[str]]:
    """The PTX of both kernels for each dtype and head size."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opt_torch import triton_decode

    programs = {}
    for dtype, H in itertools.product(DTYPES, HEAD_SIZES):
        block_H = triton.next_power_of_2(H)
        sizes = dict(H=H, SPLITS=8, BLOCK_H=block_H)
        in_blocks = sizes | dict(BLOCK_S=triton_decode.TILE // block_H)
        kernels = (triton_decode.partial_attention, in_blocks), (triton_decode.merge_partials, sizes)
        for kernel, constants in kernels:
            types, aligned = parameters(kernel, dtype, **constants)
            source = ASTSource(kernel, types, constants, aligned)
            ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
            programs.setdefault(f"{dtype}-{H}", []).append(ptx)
    return programs


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, list[str]]:
    return run_apart("t.compile_for_hopper()", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", HEAD_SIZES)
def test_the_kernels_compile_for_hopper(programs, dtype, H):
    """On any machine."""
    for ptx in programs[f"{dtype}-{H}"]:
        assert ".target sm_90" in ptx
        assert "ld.global" in ptx


def split(cases: list[tuple[int, int, int]]) -> list[int]:
    from opt_torch.triton_decode import number_of_splits

    return [number_of_splits(*case) for case in cases]


def test_splits_fill_the_device_and_are_not_too_small():
    """Of rows, capacity and processors: at most 2048 / 128, one for a short cache or many rows, 8 where 6 would do."""
    cases = [(12, 2048, 132), (12, 64, 132), (12 * 64, 2048, 132), (100, 2048, 132)]
    assert run_apart(f"t.split({cases})") == [16, 1, 1, 8]
