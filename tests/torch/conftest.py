"""Float32 is float32 in every test of PyTorch, also where a machine's environment allows TF32."""

import pytest
import torch


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
