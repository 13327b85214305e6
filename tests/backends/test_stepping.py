"""A backend's stepper does what the protocol says: the logits of the reference, through every change of the rows."""

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, config_of, reference_of, worst_row
from reference_stepper import ReferenceStepper

PROMPT = np.array([[1, 1, 5, 9, 23, 4], [7, 3, 8, 21, 2, 11], [1, 6, 1, 17, 1, 40]])
REAL = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1]], bool)


def steppers(backend, config):
    stepping = __import__(f"opt_{backend.name}.stepping", fromlist=["ModelStepper"])
    model = backend.random_model(config)
    if hasattr(model, "eval"):
        model.eval()
    return stepping.ModelStepper(model), ReferenceStepper(config, reference=reference_of(config))


def assert_same(got, want) -> None:
    bound = BOUND["float32"] * ROUNDOFF["float32"]
    assert got.logits.dtype == np.float32
    assert got.logits.shape == want.logits.shape
    assert worst_row(got.logits.astype(np.float64), want.logits.astype(np.float64)) < bound
    assert (got.hidden is None) == (want.hidden is None)
    if want.hidden is not None:
        assert got.hidden.shape == want.hidden.shape
        assert worst_row(got.hidden.astype(np.float64), want.hidden) < bound


@pytest.mark.parametrize("variant", ["pre-norm", pytest.param("350m style", marks=pytest.mark.slow)])
def test_a_search_of_every_kind_of_step_meets_the_reference(backend, variant):
    config = config_of(variant)
    both = steppers(backend, config)

    def same(call) -> None:
        assert_same(*(call(stepper) for stepper in both))

    same(lambda s: s.prefill(PROMPT, REAL, 20, output_hidden=True))
    same(lambda s: s.step(np.array([[3], [4], [5]])))
    same(lambda s: s.step(np.array([[6, 7, 8], [9, 10, 11], [12, 13, 14]]), output_hidden=True))
    for stepper in both:
        stepper.truncate(np.array([6, 10, 4]))
    same(lambda s: s.step(np.array([[15, 16], [17, 18], [19, 20]])))
    for stepper in both:
        stepper.reorder(np.array([2, 2, 0, 1, 1]))
    same(lambda s: s.step(np.array([[1], [2], [3], [4], [5]])))
    for stepper in both:
        stepper.reorder(np.array([3]))
    same(lambda s: s.step(np.array([[30, 31, 32, 33, 34]])))
    same(lambda s: s.prefill(PROMPT[1:], REAL[1:], 9))


def test_a_step_up_to_the_last_position_leaves_no_trace_beyond_it(backend):
    """Steps are filled up to few widths; near the end there is no room for that, and rows differ in length."""
    config = config_of()
    both = steppers(backend, config)
    room = config.max_position_embeddings - PROMPT.shape[1]
    for stepper in both:
        stepper.prefill(PROMPT, REAL, config.max_position_embeddings)
    tokens = np.arange(3 * room).reshape(3, room) % config.vocab_size
    assert_same(*(stepper.step(tokens[:, : room - 3]) for stepper in both))
    assert_same(*(stepper.step(tokens[:, room - 3 :]) for stepper in both))
    for stepper in both:
        stepper.truncate(np.array([2, 3, 1]))
    assert_same(*(stepper.step(tokens[:, :1]) for stepper in both))
