"""Training of a model that is cut over processes: the numbers of one process, on any mesh; killed, and resumed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, save_random
from processes import run_processes

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

WORKERS = Path(__file__).parent / "workers"


def worker(name: str):
    """The script as a module: what it does in several processes is done here in one."""
    spec = importlib.util.spec_from_file_location(name, WORKERS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


trains = worker("train_sharded")
MESHES = trains.MESHES
FLOAT32 = BOUND["float32"] * ROUNDOFF["float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With models, a run of one process, and what two processes left."""
    folder = tmp_path_factory.mktemp("sharded")
    for variant, config in trains.CONFIGS.items():
        save_random(folder / "models" / variant, config)
    trainer = trains.Trainer(trains.model_of(folder, double=False), trains.RECIPE, seed=3)
    trains.steps_of(trainer, 0, 2)
    trainer.save(folder / "single")
    run_processes(WORKERS / "train_sharded.py", 2, folder)
    return folder


@pytest.fixture(scope="module")
def found(folder) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "rank0.npz"))


def of_case(found: dict[str, np.ndarray], mesh: str, case: str) -> dict[str, np.ndarray]:
    prefix = f"{mesh}/{case}/"
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", [*trains.CONFIGS, "in parts"])
def test_steps_over_two_processes_are_those_of_one(folder, found, mesh, case):
    """In float64: losses and norms, an evaluation, the logits of a prediction, and every weight after five steps."""
    variant, accumulate = ("pre-norm", 2) if case == "in parts" else (case, 1)
    got, want = of_case(found, mesh, case), trains.training(folder, variant, accumulate=accumulate)
    assert got.keys() == want.keys()
    for name, x in want.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding alone, which Adam makes a step of
            np.testing.assert_allclose(got[name], x, rtol=1e-7 if "loss" in name else 1e-9, atol=1e-9, err_msg=name)


def test_every_process_has_the_same_numbers(folder, found):
    other = np.load(folder / "rank1.npz")
    assert other.keys() == found.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(other[name], x, err_msg=name)


def test_processes_with_the_same_rows_drop_the_same_values_and_others_do_not(folder, found):
    single = trains.dropping(folder)
    along_tensor, along_fsdp = (of_case(found, mesh, "dropout") for mesh in ("tensor=2", "fsdp=2"))
    np.testing.assert_allclose(along_tensor["steps"], single["steps"], rtol=1e-9)
    half = single["steps"][0, 0]  # what a second process with the same masks would find for the same rows
    assert abs(along_fsdp["doubled"] - half) > 0.01


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_goes_on_with_another_number_of_processes(folder, found, mesh):
    """From two to one, and from one to two: weights, moments, step and seed."""
    trainer = trains.Trainer(trains.model_of(folder, double=False), trains.RECIPE)
    saved = of_case(found, mesh, "saved")
    for checkpoint, got in ((mesh, saved["own"]), ("single", saved["single"])):
        trainer.restore(folder / checkpoint)
        np.testing.assert_allclose(got, trains.steps_of(trainer, 2, 2), rtol=FLOAT32, err_msg=checkpoint)
        assert saved["state"].tolist() == [trainer.step_count, trainer.seed] == [4, 3]


def test_what_is_wrong_on_one_process_is_an_error_on_all(found):
    refused = of_case(found, "fsdp=2", "refused")
    assert "expected rows in 2 equal parts (accumulate x 2 processes), got 3" in str(refused["rows"])
    assert "step 0: expected finite numbers, got a loss of nan" in str(refused["not finite"])
    assert refused["unchanged"]
    assert refused["steps done"] == 0
