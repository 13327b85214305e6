"""What a decode step does in PyTorch on a CPU: products of few rows, and no mask for rows of one length."""

import numpy as np
import pytest
import torch
from harness import ROUNDOFF, config_of, load_backend, token_ids

from opt_torch import attention, layers
from opt_torch.cache import init_cache
from opt_torch.layers import FEW_ROWS, linear

ROWS = [(1,), (1, 1), (2, 1), (3,), (4,), (8, 1), (2, 3), (FEW_ROWS,), (FEW_ROWS + 1,)]
IN, OUT = 67, 113


def operands(rows: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (*rows, IN), (OUT, IN), (OUT,)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
def test_a_product_of_few_rows_is_the_product(rows, dtype, has_bias):
    x, weight, bias = operands(rows, getattr(torch, dtype))
    bias = bias if has_bias else None
    with torch.no_grad():
        y = linear(x, weight, bias)
    truth = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    u, summed = ROUNDOFF.get(dtype, 2.0**-53), ROUNDOFF["float32"] if dtype != "float64" else 2.0**-53
    size = x.double().abs() @ weight.double().abs().T + (bias.double().abs() if has_bias else 0)
    assert y.dtype == x.dtype
    assert y.shape == (*rows, OUT)
    assert ((y.double() - truth).abs() <= 2 * u * truth.abs() + 2 * IN * summed * size).all()


@pytest.mark.parametrize("rows", [(1, 1), (8, 1)], ids=str)
def test_a_product_of_few_rows_has_gradients(rows):
    x, weight, bias = (t.requires_grad_() for t in operands(rows, torch.float64))
    assert torch.autograd.gradcheck(linear, (x, weight, bias))


@pytest.mark.parametrize("rows", [(1, 1), (8, 1)], ids=str)
def test_autocast_decides_the_dtype_of_a_product_of_few_rows(rows):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(*operands(rows, torch.float32)).dtype == torch.bfloat16


def test_few_rows_are_found_by_their_number():
    with torch.no_grad():
        few = [rows for rows in ROWS if layers._is_one_decode_step(*operands(rows, torch.float32)[:2])]
    assert few == ROWS[:-1]


def decode(model, prompt_BT: np.ndarray, mask_BT: np.ndarray | None, masks: list) -> torch.Tensor:
    cache = init_cache(model.config, len(prompt_BT), 29, dtype=model.dtype)
    with torch.no_grad():
        out = model(prompt_BT[:, :-1], mask_BT, past_key_values=cache)
        masks.clear()
        return model(prompt_BT[:, -1:], past_key_values=out.past_key_values).logits


@pytest.fixture
def masks(monkeypatch) -> list:
    """The sizes of the masks that are made."""
    made, real = [], attention.attend_mask
    monkeypatch.setattr(attention, "attend_mask", lambda T, S, *rest: made.append((T, S)) or real(T, S, *rest))
    return made


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_of_rows_of_one_length_makes_no_mask(dtype, masks):
    config = config_of()
    model = load_backend("torch").random_model(config, dtype=dtype)
    logits = decode(model, token_ids(config), None, masks)
    assert masks == []
    model.set_attn_implementation("eager")
    want = decode(model, token_ids(config), None, masks)
    assert masks
    torch.testing.assert_close(logits, want, rtol=0, atol=float(want.abs().max()) * 40 * ROUNDOFF[dtype])


def test_a_step_of_ragged_rows_reads_the_longest_and_no_further(masks):
    config = config_of()
    ids_BT = token_ids(config)
    mask_BT = np.ones((ids_BT.shape[0], ids_BT.shape[1] - 1), int)
    mask_BT[0, :5] = 0
    decode(load_backend("torch").random_model(config), ids_BT, mask_BT, masks)
    assert set(masks) == {(1, ids_BT.shape[1])}
