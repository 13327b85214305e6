"""What only PyTorch's head with its loss has to do: autocast, frozen parts, modules around the head, compilation."""

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, config_of, load_backend, token_ids

from opt_torch.linear_cross_entropy import linear_cross_entropy

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def torch_backend():
    return load_backend("torch")


def inputs():
    generator = torch.Generator().manual_seed(3)
    hidden_RE, weight_VE = (torch.randn(n, 13, generator=generator) for n in (29, 211))
    return hidden_RE.requires_grad_(), weight_VE.requires_grad_(), torch.arange(29)


@pytest.mark.parametrize("keep_logits", [True, False])
def test_autocast_rounds_the_products_and_nothing_else(keep_logits):
    hidden_RE, weight_VE, targets_R = inputs()
    want, _ = linear_cross_entropy(hidden_RE.double(), weight_VE.double(), targets_R, keep_logits)
    wanted = torch.autograd.grad(want, (hidden_RE, weight_VE))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits_RV = linear_cross_entropy(hidden_RE, weight_VE, targets_R, keep_logits)
    assert loss.dtype == torch.float32
    assert logits_RV is None or logits_RV.dtype == torch.bfloat16
    bound = BOUND["bfloat16"] * ROUNDOFF["bfloat16"]
    assert 0 < abs(loss - want) < bound * want
    for got, truth in zip(torch.autograd.grad(loss, (hidden_RE, weight_VE)), wanted, strict=True):
        assert got.dtype == torch.float32
        assert 0 < (got - truth).norm() < bound * truth.norm()


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_part_costs_no_product(keep_logits, frozen):
    tensors = list(inputs())
    both = linear_cross_entropy(*tensors, keep_logits)[0]
    with torch.profiler.profile() as profile:
        want = torch.autograd.grad(linear_cross_entropy(*tensors, keep_logits)[0], tensors[1 - frozen])
    assert count(profile) == 3
    tensors[frozen] = tensors[frozen].detach()
    with torch.profiler.profile() as profile:
        loss, _ = linear_cross_entropy(*tensors, keep_logits)
        got = torch.autograd.grad(loss, tensors[1 - frozen])
    assert count(profile) == 2
    assert loss == both
    torch.testing.assert_close(got, want)


def count(profile) -> int:
    """Matrix products in a profile."""
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.events())


@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_second_derivative_is_refused(keep_logits):
    hidden_RE, weight_VE, targets_R = inputs()
    loss, _ = linear_cross_entropy(hidden_RE, weight_VE, targets_R, keep_logits)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: expected create_graph=False"):
        torch.autograd.grad(loss, hidden_RE, create_graph=True)


@pytest.mark.parametrize("keep_logits", [True, False])
def test_a_retained_graph_gives_the_same_gradients_again(keep_logits):
    hidden_RE, weight_VE, targets_R = inputs()
    loss, _ = linear_cross_entropy(hidden_RE, weight_VE, targets_R, keep_logits)
    first, again = (torch.autograd.grad(2 * loss, (hidden_RE, weight_VE), retain_graph=True) for _ in range(2))
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_what_is_hooked_to_the_head_acts_on_the_loss(torch_backend):
    """An adapter, or offloading: the head is more than its weight."""
    model, ids = torch_backend.random_model(config_of()), token_ids(config_of())
    model.lm_head.register_forward_hook(lambda module, args, out: 0 * out)
    out = model(ids, labels=ids)
    assert out.loss.item() == pytest.approx(np.log(model.config.vocab_size), rel=1e-6)
    assert model(ids, labels=ids, logits_to_keep=1).loss == out.loss


@pytest.mark.parametrize("logits_to_keep", [0, 1])
def test_a_training_step_compiles_into_one_graph(torch_backend, logits_to_keep):
    model, ids = torch_backend.random_model(config_of()).train(), torch.as_tensor(token_ids(config_of()))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (model, compiled):
        model.zero_grad()
        call(ids, labels=ids, logits_to_keep=logits_to_keep).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)
