"""Training of a model that is cut over processes: the numbers of one process, on any mesh; killed, and resumed."""

import time
from pathlib import Path

import numpy as np
import pytest
from harness import BOUND, ROUNDOFF, save_random
from processes import module_of, run_processes, started_processes

from opt_torch.distributed_checkpoint import restore_distributed, save_distributed
from opt_zoo.training_log import LOG

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

WORKERS = Path(__file__).parent / "workers"

trains = module_of(WORKERS / "train_sharded.py")
MESHES = ("fsdp=2", "tensor=2")
OF_FOUR = ("fsdp=2,tensor=2", "data=2,fsdp=2", "data=2,tensor=2", "data=4")
FLOAT32 = BOUND["float32"] * ROUNDOFF["float32"]


def trained_over(folder: Path, meshes: tuple[str, ...], processes: int) -> Path:
    """Makes models and a run of one process, and has several leave what they get."""
    for variant, config in trains.CONFIGS.items():
        save_random(folder / "models" / variant, config)
    trainer = trains.Trainer(trains.model_of(folder, double=False), trains.RECIPE, seed=3)
    trains.steps_of(trainer, 0, 2)
    trainer.save(folder / "single")
    save_distributed(trainer, folder / "parts" / "single")
    run_processes(WORKERS / "train_sharded.py", processes, folder, *meshes, timeout=300)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return trained_over(tmp_path_factory.mktemp("two"), MESHES, 2)


@pytest.fixture(scope="module")
def found(folder) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "rank0.npz"))


def of_case(found: dict[str, np.ndarray], mesh: str, case: str) -> dict[str, np.ndarray]:
    prefix = f"{mesh}/{case}/"
    return {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("case", [*trains.CONFIGS, "in parts"])
def test_steps_over_two_processes_are_those_of_one(folder, found, mesh, case):
    check_steps(folder, found, mesh, case)


def check_steps(folder, found, mesh, case):
    """In float64: losses and norms, an evaluation, the logits of a prediction, and every weight after five steps."""
    variant, accumulate = ("pre-norm", 2) if case == "in parts" else (case, 1)
    got, want = of_case(found, mesh, case), trains.training(folder, variant, accumulate=accumulate)
    assert got.keys() == want.keys()
    for name, x in want.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding alone, which Adam makes a step of
            np.testing.assert_allclose(got[name], x, rtol=1e-7 if "loss" in name else 1e-9, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("mesh", MESHES)
def test_other_heads_are_trained_as_well(folder, found, mesh):
    got, want, in_parts = (
        of_case(found, mesh, "other heads"),
        *(trains.other_heads(folder, accumulate=accumulate) for accumulate in (1, 4)),
    )
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-7, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(in_parts[name], x, rtol=1e-7, atol=1e-9, err_msg=name)


def test_every_process_has_the_same_numbers(folder, found):
    check_same(found, np.load(folder / "rank1.npz"))


def check_same(found, other):
    assert other.keys() == found.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(other[name], x, err_msg=name)


def test_processes_with_the_same_rows_drop_the_same_values_and_others_do_not(folder, found):
    single = trains.dropping(folder)
    along_tensor, along_fsdp = (of_case(found, mesh, "dropout") for mesh in ("tensor=2", "fsdp=2"))
    np.testing.assert_allclose(along_tensor["steps"], single["steps"], rtol=1e-9)
    half = single["steps"][0, 0]  # what a second process with the same masks would find for the same rows
    assert abs(along_fsdp["doubled"] - half) > 0.01


def test_axes_have_the_names_that_the_rules_give_them(folder, found):
    got = of_case(found, "fsdp=2", "other rules")
    trainer = trains.Trainer(trains.model_of(folder, double=False), trains.RECIPE)
    assert got["parts"] == 2
    np.testing.assert_allclose(got["steps"], trains.steps_of(trainer, 0, 2), rtol=FLOAT32)
    assert got["evaluated"] == pytest.approx(trainer.evaluate(trains.batch_of(trains.STEPS)), rel=FLOAT32)


@pytest.mark.parametrize("mesh", MESHES)
def test_a_run_goes_on_with_another_number_of_processes(folder, found, mesh):
    """From two to one, and from one to two: weights, moments, step and seed."""
    check_resumed(folder, found, mesh)


def check_resumed(folder, found, mesh):
    trainer = trains.Trainer(trains.model_of(folder, double=False), trains.RECIPE)
    saved = of_case(found, mesh, "saved")
    for checkpoint, got in ((mesh, saved["own"]), ("single", saved["single"])):
        trainer.restore(folder / checkpoint)
        np.testing.assert_allclose(got, trains.steps_of(trainer, 2, 2), rtol=FLOAT32, err_msg=checkpoint)
        assert saved["state"].tolist() == [trainer.step_count, trainer.seed] == [4, 3]


@pytest.mark.parametrize("mesh", MESHES)
def test_checkpoints_of_parts_are_read_on_any_mesh(folder, found, mesh):
    """Of one process, of two along `fsdp` and of two along `tensor`: each is read by the others."""
    check_parts(folder, found, mesh, MESHES[0])
    shards = [path.stat().st_size for path in (folder / "parts" / mesh).glob("*.safetensors")]
    assert len(shards) == 2
    assert max(shards) < 1.25 * min(shards)


def check_parts(folder, found, mesh, first):
    got = of_case(found, mesh, "distributed")
    trainer = trains.Trainer(trains.model_of(folder, double=False), trains.RECIPE)
    restore_distributed(trainer, folder / "parts" / mesh)
    want = trains.steps_of(trainer, 2, 2)
    for source in ("own", "single", first):
        np.testing.assert_allclose(got[source], want, rtol=FLOAT32, err_msg=source)
    assert got["state"].tolist() == [trainer.step_count, trainer.seed] == [4, 3]


def test_what_is_wrong_on_one_process_is_an_error_on_all(found):
    refused = of_case(found, "fsdp=2", "refused")
    assert "expected rows in 2 equal parts (accumulate x 2 processes), got 7" in str(refused["rows"])
    assert "step 0: expected finite numbers, got a loss of nan" in str(refused["not finite"])
    assert "expected a folder, got a file" in str(refused["a file in the way"])
    assert refused["unchanged"]
    assert refused["steps done"] == 0


@pytest.mark.slow
def test_all_this_holds_for_four_processes_along_two_axes(tmp_path):
    folder = trained_over(tmp_path, OF_FOUR, 4)
    found = dict(np.load(folder / "rank0.npz"))
    for rank in (1, 2, 3):
        check_same(found, np.load(folder / f"rank{rank}.npz"))
    for mesh in OF_FOUR:
        for case in [*trains.CONFIGS, "in parts"]:
            check_steps(folder, found, mesh, case)
        check_resumed(folder, found, mesh)
        check_parts(folder, found, mesh, OF_FOUR[0])


# -- killed -----------------------------------------------------------------------------------------------------------

killed = module_of(WORKERS / "train_until_killed.py")


@pytest.fixture(scope="module")
def unbroken(folder):
    """The run of one process that nobody kills."""
    return killed.run(folder, folder / "unbroken")


def kill(folder: Path, target: Path, mesh: str, rank: int) -> str:
    """Starts a run over two processes, kills one amidst it, and returns what the other says before it stops."""
    with started_processes(WORKERS / "train_until_killed.py", 2, folder, target, mesh) as job:
        while steps_in(target) < 5 and None in [process.poll() for process in job.processes]:
            time.sleep(0.02)
        job.kill(rank)
        begin = time.monotonic()
        left = job.wait(timeout=60)[1 - rank]
        assert left.returncode == killed.LOST, job.report()
        assert time.monotonic() - begin < 20
    return left.stderr


def steps_in(target: Path) -> int:
    log = target / LOG
    return log.read_text().count("gradient_norm") if log.exists() else 0


def check_same_run(got, want):
    """All losses and validations, before and after the kill."""
    np.testing.assert_allclose(got.losses, want.losses, rtol=FLOAT32)
    assert [steps for steps, _ in got.validations] == [steps for steps, _ in want.validations]
    for (_, mine), (_, theirs) in zip(got.validations, want.validations, strict=True):
        assert mine == pytest.approx(theirs, rel=FLOAT32)


def test_a_process_that_is_killed_stops_the_other_and_one_alone_goes_on(folder, unbroken, tmp_path):
    said = kill(folder, tmp_path / "run", "fsdp=2", rank=1)
    assert "another process is gone; started again, with any number of processes, a run resumes" in said
    resumed = killed.run(folder, tmp_path / "run")
    assert resumed.resumed_from in (4, 6)
    check_same_run(resumed, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "rank", "then"), [("fsdp=2", 0, "tensor=2"), ("tensor=2", 1, "fsdp=2")])
def test_a_killed_run_goes_on_with_processes_along_another_axis(folder, unbroken, tmp_path, mesh, rank, then):
    kill(folder, tmp_path / "run", mesh, rank)
    done = run_processes(WORKERS / "train_until_killed.py", 2, folder, tmp_path / "run", then)
    assert "going on after step" in done[0].stderr
    assert done[1].stderr == ""
    check_same_run(killed.run(folder, tmp_path / "run"), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed while it writes", "TrainingError: step 0: another process is gone"),
        ("killed before the name is given", "TrainingError: step 0: another process is gone"),
        ("a full disk", "process 1: disk full"),
    ],
)
def test_parts_that_were_not_all_saved_have_no_name(folder, tmp_path, how, said):
    with started_processes(WORKERS / "save_until_killed.py", 2, folder, tmp_path / "saved", how) as job:
        done = job.wait()
    assert {process.returncode for process in done} == ({0} if how == "a full disk" else {0, -9}), job.processes
    for process in done:
        assert process.returncode != 0 or said in process.stdout
    assert not (tmp_path / "saved").exists()
