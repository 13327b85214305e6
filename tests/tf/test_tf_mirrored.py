"""Data parallel under a MirroredStrategy: the numbers of one device with the same batches, in `fit` and the Trainer."""

from pathlib import Path

import numpy as np
import pytest
from harness import save_random
from processes import module_of, run_processes

WORKER = Path(__file__).parent / "workers" / "train_mirrored.py"

trains = module_of(WORKER)


SLOW = ("trainer", "trainer in parts", "other heads", "other losses", "callbacks")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mirrored")
    save_random(folder / "model", trains.CONFIG)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, np.ndarray]:
    """What two devices got."""
    return on_two_devices(folder, *(name for name in trains.CASES if name not in SLOW))


@pytest.fixture(scope="module")
def found_slowly(folder) -> dict[str, np.ndarray]:
    return on_two_devices(folder, *SLOW)


def on_two_devices(folder: Path, *cases: str) -> dict[str, np.ndarray]:
    run_processes(WORKER, 1, folder, *cases, timeout=300)
    return dict(np.load(folder / "mirrored.npz"))


def of_case(found: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{case}/"): x for name, x in found.items() if name.startswith(f"{case}/")}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in trains.ALIKE]
)
def test_two_devices_get_the_numbers_of_one(case, folder, request, tmp_path):
    """Losses, norms, weights, predictions, tokens: rows have unequal numbers of targets, and replicas unequal rows."""
    (tmp_path / "model").symlink_to(folder / "model")
    got = of_case(request.getfixturevalue("found_slowly" if case in SLOW else "found"), case)
    want = trains.CASES[case](trains.Run(tmp_path))
    assert got.keys() == want.keys()
    for name, x in want.items():
        atol = 2e-3 if "float16" in name else 1e-5
        np.testing.assert_allclose(got[name], np.asarray(x), rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_callbacks_keep_models_for_one_device_and_an_interrupted_fit_goes_on(found_slowly):
    kept = of_case(found_slowly, "callbacks")
    assert kept["weights equal"].all()
    assert kept["model equal"].all()
    np.testing.assert_allclose(kept["resumed"], kept["whole"][-len(kept["resumed"]) :], rtol=0, atol=1e-5)
    assert 0 < len(kept["resumed"]) < trains.STEPS


def test_every_replica_drops_other_values_at_every_call(found):
    first, second = found["replicas/dropped"]
    assert np.abs(first[0] - first[1]).max() > 1e-4
    assert np.abs(first - second).max(axis=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("of_workers", "Trainer: strategy: expected one of a single process, such as MirroredStrategy"),
        ("of_fitted_workers", "fit, evaluate: strategy: expected one of a single process"),
        ("of_outside", "expected one made in the scope of the strategy"),
        ("of_plain", "expected one made in the scope of the strategy"),
        ("of_accumulation", "gradient_accumulation_steps: expected None"),
        ("of_xla", "jit_compile: expected False or 'auto'"),
        ("of_rows", "(accumulate) x 2 (replicas) equal parts, got 3"),
    ],
)
def test_what_replicas_cannot_do_is_refused(case, words, found):
    assert words in str(found[f"refused/{case}"])
