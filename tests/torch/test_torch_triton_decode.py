"""The Triton kernels of decoding: in Triton's interpreter on a CPU, and compiled for a GPU that need not be there.

What the interpreter runs has to be known before Triton is imported, so it has a process of its own.
"""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_truth import DTYPES, Attended, attention_inputs, attention_truth, error_bound, worst_share

if find_spec("triton") is None:
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


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def shares(request) -> dict[str, float]:
    if request.param == "cuda":
        return measure("cuda")
    root = Path(__file__).parents[2]
    paths = [str(root), str(root / "tests"), str(Path(__file__).parent), *sys.path]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    code = f"import json, {Path(__file__).stem} as t; print(json.dumps(t.measure('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H", HEAD_SIZES)
def test_the_kernels_compile_for_hopper(monkeypatch, tmp_path, dtype, H):
    """On any machine; keys and values are loaded 16 bytes at once."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opt_torch import triton_decode

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    block_H = triton.next_power_of_2(H)
    sizes = dict(H=H, SPLITS=8, BLOCK_H=block_H)
    for kernel, constants in (
        (triton_decode.partial_attention, sizes | dict(BLOCK_S=triton_decode.TILE // block_H)),
        (triton_decode.merge_partials, sizes),
    ):
        types, aligned = parameters(kernel, dtype, **constants)
        source = ASTSource(kernel, types, constants, aligned)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
        assert ".target sm_90" in ptx
    assert "ld.global" in ptx


def test_splits_fill_the_device_and_are_not_too_small():
    from opt_torch.triton_decode import number_of_splits

    assert number_of_splits(rows=12, capacity=2048, processors=132) == 16  # 2048 / 128
    assert number_of_splits(rows=12, capacity=64, processors=132) == 1
    assert number_of_splits(rows=12 * 64, capacity=2048, processors=132) == 1
    assert number_of_splits(rows=100, capacity=2048, processors=132) == 8  # 6 would do
