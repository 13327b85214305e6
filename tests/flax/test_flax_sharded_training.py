"""Training of a model on a mesh: the numbers of one device, on any mesh and over processes; killed, and resumed."""

import time
from pathlib import Path

import numpy as np
import pytest
from harness import backends_asked_for, save_random
from processes import module_of, run_processes, started_processes

from opt_zoo.training_log import LOG

WORKERS = Path(__file__).parent / "workers"

trains = module_of(WORKERS / "train_on_mesh.py")
ON_DEVICES = ["tensor=2 pre_norm", "fsdp=2,tensor=2 style_of_350m", "tensor=2 resumed", "fsdp=4 shares"]
IN_PROCESSES = ["fsdp=2 pre_norm", "fsdp=2 resumed", "fsdp=2 refused"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request) -> Path:
    """With models, and two steps of a run on one device, in JAX and where it is tested in PyTorch."""
    folder = tmp_path_factory.mktemp("mesh")
    for variant, config in trains.CONFIGS.items():
        save_random(folder / "models" / variant, config)
    trainer = trains.Trainer(trains.model_of(folder), trains.RECIPE, seed=5)
    trains.steps_of(trainer, 0, 2)
    trainer.save(folder / "single")
    if "torch" in backends_asked_for(request.config):
        from opt_torch import OPTForCausalLM
        from opt_torch.training import Trainer

        model = OPTForCausalLM.from_pretrained(folder / "models" / "pre-norm")
        trainer = Trainer(model, trains.RECIPE, seed=5)
        trains.steps_of(trainer, 0, 2)
        trainer.save(folder / "torch")
    return folder


@pytest.fixture(scope="module")
def singles(folder):
    """What a case finds on one device, computed once."""
    known: dict[str, dict[str, np.ndarray]] = {}
    return lambda case: known.get(case) or known.setdefault(case, getattr(trains, case)(folder))


@pytest.fixture(scope="module")
def on_devices(folder) -> dict[str, np.ndarray]:
    run_processes(WORKERS / "train_on_mesh.py", 1, folder, *ON_DEVICES, timeout=400)
    return dict(np.load(folder / "rank0 of 1.npz"))


@pytest.fixture(scope="module")
def of_ranks(folder) -> list[dict[str, np.ndarray]]:
    return two_processes(folder, *IN_PROCESSES)


@pytest.fixture(scope="module")
def in_processes(of_ranks) -> dict[str, np.ndarray]:
    return of_ranks[0]


def two_processes(folder: Path, *cases: str) -> list[dict[str, np.ndarray]]:
    """What each of them found."""
    run_processes(WORKERS / "train_on_mesh.py", 2, folder, *cases, timeout=400)
    return [dict(np.load(folder / f"rank{rank} of 2.npz")) for rank in range(2)]


def of_case(found: dict[str, np.ndarray], case: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{case}/"): x for name, x in found.items() if name.startswith(f"{case}/")}


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Float32 that was added up in another order, for five steps."""
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("case", ON_DEVICES[:2])
def test_steps_on_several_devices_are_those_of_one(on_devices, singles, case):
    """Losses, norms, an evaluation, the logits of a prediction, every weight after five steps; with dropout."""
    compare(of_case(on_devices, case), singles(case.split()[1]))


def test_steps_of_two_processes_are_those_of_one(in_processes, singles):
    compare(of_case(in_processes, "fsdp=2 pre_norm"), singles("pre_norm"))


@pytest.mark.slow
def test_steps_of_adapters_over_two_processes_are_those_of_one(folder, singles):
    """Also after they were saved and restored."""
    for found in two_processes(folder, "fsdp=2 adapters"):
        compare(of_case(found, "fsdp=2 adapters"), singles("adapters"))


def test_both_processes_have_the_same_numbers(of_ranks):
    first, other = of_ranks
    assert other.keys() == first.keys()
    for name, x in first.items():
        if "a file in the way" not in name:
            np.testing.assert_array_equal(other[name], x, err_msg=name)


@pytest.mark.parametrize(("found", "mesh"), [("on_devices", "tensor=2"), ("in_processes", "fsdp=2")])
def test_moments_lie_as_their_weights_do_and_a_step_is_compiled_once(found, mesh, request):
    case = of_case(request.getfixturevalue(found), f"{mesh} pre_norm")
    assert case["misplaced"].tolist() == []
    assert case["programs"].tolist() == [1, 1]


def test_devices_share_weights_gradients_and_moments_and_gather_a_layer_at_a_time(on_devices):
    """A device of four is given a quarter of the weights, and leaves a quarter of the gradients and moments."""
    found = of_case(on_devices, "fsdp=4 shares")
    for name in ("given", "gradients", "written"):
        assert 0.24 < found[name] < 0.27, name
    assert found["beside_it"] < 0.1
    assert found["a layer more"] < 0.3  # 2, where all are gathered and all gradients are whole


@pytest.mark.parametrize(("found", "mesh"), [("on_devices", "tensor=2"), ("in_processes", "fsdp=2")])
def test_a_run_goes_on_on_a_mesh_and_back_on_one_device(folder, singles, found, mesh, request):
    """Weights, moments, step and seed."""
    got, want = of_case(request.getfixturevalue(found), f"{mesh} resumed"), singles("resumed")
    compare(got, want)
    assert got["single state"].tolist() == [4, 5]
    assert got["misplaced"].tolist() == []
    trainer = trains.Trainer(trains.model_of(folder), trains.RECIPE)
    trainer.restore(folder / f"from {mesh.removesuffix('=2')}")
    np.testing.assert_allclose(trains.steps_of(trainer, 4, 1), got["after"], rtol=2e-5)


def test_what_is_wrong_is_an_error_on_every_process(of_ranks):
    got, other = (of_case(found, "fsdp=2 refused") for found in of_ranks)
    for name in ("rows", "evaluated rows"):
        assert "batch: expected a multiple of 2 rows, got 3" in str(got[name])
    assert "step 0: expected finite numbers, got a loss of nan" in str(got["not finite"])
    assert "a file" in str(got["a file in the way"])
    assert str(other["a file in the way"]).startswith("TrainingError: process 0: ")
    assert got["unchanged"]
    assert got["steps done"] == 0
    assert other["agreed"] == 0


# -- a process that is gone -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(folder):
    """The run on one device that nobody kills."""
    return module_of(WORKERS / "train_until_killed.py").run(folder, folder / "unbroken")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_when_a_process_is_killed_the_other_stops_and_the_run_goes_on_elsewhere(folder, unbroken, victim):
    """On two devices of one process, or on one device; with the losses of an unbroken run of one."""
    killed, script = module_of(WORKERS / "train_until_killed.py"), WORKERS / "train_until_killed.py"
    target = folder / f"killed {victim}"
    with started_processes(script, 2, folder, target, "fsdp=2") as job:
        wait_for_lines(target / LOG, 5)
        job.kill(victim)
        start = time.monotonic()
        left = job.wait(timeout=60)[1 - victim]
        assert time.monotonic() - start < 10
    assert left.returncode == 1 or victim == 0
    assert left.returncode != 0
    said = "another process is gone; started again, with any number of processes, a run resumes from its last"
    # Of process 0, JAX's own service is gone too, for which JAX ends the other process, mostly a moment later.
    assert said in left.stderr or (victim == 0 and "another task died" in left.stderr), left.stderr
    if victim:
        run_processes(script, 1, folder, target, "fsdp=2", timeout=300)
    result = killed.run(folder, target)  # all of it, or what the devices have left: nothing
    assert result.resumed_from == (killed.STEPS if victim else 4)
    assert len(result.losses) == killed.STEPS
    np.testing.assert_allclose(result.losses, unbroken.losses, rtol=2e-5)


def wait_for_lines(path: Path, count: int, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end, f"{path} has no {count} lines"
        time.sleep(0.05)
