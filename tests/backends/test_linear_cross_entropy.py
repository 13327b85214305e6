"""The head with its loss against float64: the loss, its gradients, and the memory of both, with logits kept or not."""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import BOUND, NUMPY_DTYPES, ROUNDOFF, config_of, mask_named, token_ids

from opt_core.reference import IGNORED_LABEL, cross_entropy

ROWS, WIDTH, VOCABULARY = 29, 13, 2503
# What makes several blocks of so few rows; each backend has cuts of its own.
SMALL_BLOCKS = {
    "torch": dict(ROW_BLOCK=7 * VOCABULARY, COLUMN_BLOCK=1),
    "tf": dict(ROWS=7),
    "flax": dict(BLOCK=7 * VOCABULARY),
}


@pytest.fixture(params=["one block", "several blocks"])
def rows(request, backend, monkeypatch) -> int:
    """How many rows there are; another number for another cut, since JAX keeps what it compiled for a shape."""
    if request.param == "one block":
        return ROWS
    module = importlib.import_module(f"opt_{backend.name}.linear_cross_entropy")
    for name, value in SMALL_BLOCKS[backend.name].items():
        monkeypatch.setattr(module, name, value)
    return ROWS + 2


def inputs_of(rows: int, dtype: str, ignored: float = 0.3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states and a matrix, rounded to `dtype`, and targets, of which some do not count."""
    random = np.random.default_rng(7)
    hidden_RE = random.normal(size=(rows, WIDTH)).astype(NUMPY_DTYPES[dtype])
    weight_VE = random.normal(size=(VOCABULARY, WIDTH)).astype(NUMPY_DTYPES[dtype])
    targets_R = random.integers(0, VOCABULARY, rows)
    targets_R[:2] = VOCABULARY - 1, 0  # the ends of the blocks
    return hidden_RE, weight_VE, np.where(random.random(rows) < ignored, IGNORED_LABEL, targets_R)


def truth(hidden_RE, weight_VE, targets_R, d_loss=1.0, d_logits_RV=0.0) -> tuple[float, np.ndarray, np.ndarray]:
    """The loss and the gradients of hidden states and matrix in float64."""
    hidden_RE, weight_VE = hidden_RE.astype(np.float64), weight_VE.astype(np.float64)
    logits_RV, counted_R = hidden_RE @ weight_VE.T, targets_R != IGNORED_LABEL
    d_RV = np.exp(logits_RV - logits_RV.max(1, keepdims=True))
    d_RV /= d_RV.sum(1, keepdims=True)
    d_RV[np.arange(len(d_RV)), targets_R] -= 1
    d_RV = d_RV * counted_R[:, None] * d_loss / max(1, counted_R.sum()) + d_logits_RV
    return cross_entropy(logits_RV, targets_R, counted_R), d_RV @ weight_VE, d_RV.T @ hidden_RE


def differentiate(backend, function, *arrays) -> tuple[float, list]:
    """The value of a function of arrays, and its gradients for the first two."""
    arrays = [backend.array(x) if x.dtype.name != "bfloat16" else bfloat16(backend, x) for x in arrays]
    if backend.name == "torch":
        wanted = [x.requires_grad_() for x in arrays[:2]]
        value = function(*arrays)
        return float(value.detach()), list(backend.torch.autograd.grad(value, wanted))
    if backend.name == "tf":
        with backend.tf.GradientTape() as tape:
            tape.watch(arrays[:2])
            value = function(*arrays)
        return float(value), tape.gradient(value, arrays[:2])
    value, gradients = backend.nnx.value_and_grad(function, argnums=(0, 1))(*arrays)
    return float(value), list(gradients)


def bfloat16(backend, x: np.ndarray):
    if backend.name == "torch":
        return backend.torch.from_numpy(x.astype(np.float32)).bfloat16()
    return backend.array(x)


def linear_cross_entropy(backend, *arguments):
    module = importlib.import_module(f"opt_{backend.name}.linear_cross_entropy")
    return module.linear_cross_entropy(*arguments)


def assert_close(backend, got, want: np.ndarray, dtype: str, factor: float = 1.0) -> None:
    assert backend.dtype_of(got) == dtype
    error = np.linalg.norm(backend.numpy(got) - want)
    assert error <= factor * BOUND[dtype] * ROUNDOFF[dtype] * np.linalg.norm(want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("keep_logits", [True, False])
def test_the_loss_and_its_gradients_equal_float64_ones(backend, rows, keep_logits, dtype):
    arrays = inputs_of(rows, dtype)
    loss, d_hidden_RE, d_weight_VE = truth(*arrays, d_loss=3.0)
    value, gradients = differentiate(
        backend, lambda *xs: 3 * linear_cross_entropy(backend, *xs, keep_logits)[0], *arrays
    )
    assert value == pytest.approx(3 * loss, rel=16 * ROUNDOFF[dtype])
    assert_close(backend, gradients[0], d_hidden_RE, dtype)
    assert_close(backend, gradients[1], d_weight_VE, dtype)
    uncounted = arrays[2] == IGNORED_LABEL
    assert (backend.numpy(gradients[0])[uncounted] == 0).all()


@pytest.mark.parametrize("with_loss", [True, False], ids=["beside the loss", "alone"])
def test_a_gradient_that_arrives_at_the_logits_is_added(backend, rows, with_loss):
    arrays, c_RV = inputs_of(rows, "float32"), np.random.default_rng(2).normal(size=(rows, VOCABULARY))
    c_RV = c_RV.astype(np.float32)

    def weighed(hidden_RE, weight_VE, targets_R):
        loss, logits_RV = linear_cross_entropy(backend, hidden_RE, weight_VE, targets_R, True)
        product = logits_RV * backend.array(c_RV)
        product = backend.tf.reduce_sum(product) if backend.name == "tf" else product.sum()
        return product + 5 * loss if with_loss else product

    _, gradients = differentiate(backend, weighed, *arrays)
    _, d_hidden_RE, d_weight_VE = truth(*arrays, d_loss=5.0 * with_loss, d_logits_RV=c_RV)
    assert_close(backend, gradients[0], d_hidden_RE, "float32")
    assert_close(backend, gradients[1], d_weight_VE, "float32")


@pytest.mark.parametrize("keep_logits", [True, False])
def test_where_nothing_counts_loss_and_gradients_are_zero(backend, keep_logits):
    arrays = inputs_of(ROWS, "float32", ignored=1.0)
    value, gradients = differentiate(backend, lambda *xs: linear_cross_entropy(backend, *xs, keep_logits)[0], *arrays)
    assert value == 0
    assert all((backend.numpy(gradient) == 0).all() for gradient in gradients)


@pytest.mark.parametrize("keep_logits", [True, False])
def test_the_logits_are_those_of_the_head_or_none(backend, rows, keep_logits):
    hidden_RE, weight_VE, targets_R = map(backend.array, inputs_of(rows, "float32"))
    _, logits_RV = linear_cross_entropy(backend, hidden_RE, weight_VE, targets_R, keep_logits)
    if not keep_logits:
        assert logits_RV is None
        return
    want = backend.numpy(hidden_RE) @ backend.numpy(weight_VE).T
    assert_close(backend, logits_RV, want, "float32")


SEGMENTS = np.array([[3] * 5 + [8] * 8, [1] * 13, [2] * 12 + [3], [4, 4, 5, 5, 4, 4, 4, 6, 6, 6, 6, 6, 7]])


@pytest.mark.parametrize("variant", ["pre-norm", "350m style", "untied head"])
@pytest.mark.parametrize(
    ("mask", "segments"), [("an empty row", None), ("holes", SEGMENTS)], ids=["padding", "padding and documents"]
)
def test_a_model_learns_the_same_whether_it_keeps_its_logits_or_not(backend, variant, mask, segments):
    config = config_of(variant)
    ids, mask = token_ids(config), mask_named(mask)
    model = backend.random_model(config)
    inputs = dict(input_ids=ids, attention_mask=mask, labels=np.where(ids % 5 == 0, IGNORED_LABEL, ids))
    inputs |= {} if segments is None else dict(segment_ids=segments)
    loss, gradients = backend.loss_and_gradients(model, **inputs)
    without, others = backend.loss_and_gradients(model, **inputs, logits_to_keep=2)
    assert without == pytest.approx(loss, rel=1e-6)
    largest = max(np.linalg.norm(gradient) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert np.linalg.norm(others[name] - gradient) <= 16 * ROUNDOFF["float32"] * largest, name


@pytest.mark.parametrize("keep", [0, 1, 5, 40])
def test_the_last_logits_are_returned_beside_the_loss_of_all(backend, keep):
    config = config_of()
    model, ids = backend.random_model(config), token_ids(config)
    whole, out = model(ids, labels=ids), model(ids, labels=ids, logits_to_keep=keep)
    assert float(out.loss) == pytest.approx(float(whole.loss), rel=1e-6)
    np.testing.assert_allclose(backend.numpy(out.logits), backend.numpy(whole.logits)[:, -keep:], atol=1e-5)


# One process for each backend: the highest memory of a process only grows. 411 MB of logits.
MEMORY = """
import sys
import numpy as np
from opt_zoo.bench.memory import PeakMemory
from harness import load_backend
sys.path.insert(0, sys.argv[2])
import test_linear_cross_entropy as test
backend = load_backend(sys.argv[1])
random = np.random.default_rng(0)
rows, width, vocabulary = 2053, 3, 50021
arrays = [random.normal(size=(n, width)).astype(np.float32) for n in (rows, vocabulary)]
arrays.append(random.integers(0, vocabulary, rows))
for keep_logits in (False, True):
    peak = PeakMemory()
    def loss(*xs):
        return test.linear_cross_entropy(backend, *xs, keep_logits)[0]
    test.differentiate(backend, loss, *arrays)
    print(peak.growth / (4 * rows * vocabulary))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="/proc of Linux knows the highest memory")
def test_no_second_tensor_of_the_size_of_the_logits_exists(backend):
    here = Path(__file__).parent
    root = str(here.parent.parent)
    code = f"import sys; sys.path[:0] = [{root!r}, {str(here.parent)!r}]\n{MEMORY}"
    done = subprocess.run(
        [sys.executable, "-c", code, backend.name, str(here)], capture_output=True, text=True, check=True
    )
    dropped, kept = map(float, done.stdout.split()[-2:])
    assert dropped < 0.85
    assert 0.9 < kept < 1.6
