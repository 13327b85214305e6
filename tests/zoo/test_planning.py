"""Plans: laws of their formulas, published figures, the command line, and the measured memory of small runs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import PRUNED_HEADS, backends_asked_for, config_of, save_random
from processes import run_processes

from conversion import write_checkpoint
from opt_core import OPTConfig
from opt_core.errors import InputError
from opt_core.presets import PRESETS
from opt_core.schema import parameter_count
from opt_core.sharding import Mesh
from opt_core.synthetic import random_tensors
from opt_zoo.bench.memory import PeakMemory
from opt_zoo.bench.work import ITEM_BYTES
from opt_zoo.devices import DEVICES
from opt_zoo.planning import Job, Part, fewest_devices, memory_of, plan, plans, seconds_of, training_flops

A100 = DEVICES["a100-80gb"]
ALONE = Mesh((), ())
OPT_175B = OPTConfig.preset("opt-175b")


def tensor(devices: int) -> Mesh:
    return Mesh(("tensor",), (devices,))


def fsdp(devices: int) -> Mesh:
    return Mesh(("fsdp",), (devices,))


# -- formulas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 2, 8])
def test_a_layer_saves_what_is_published_less_the_arrays_of_attention(cut):
    """Korthikanti et al., arXiv:2205.05198, equation 2: s b h (10 + 24 / t) bytes for GELU with dropout in half
    precision, and 5 a s / (h t) more for arrays of T x T."""
    config = OPT_175B.replace(activation_function="gelu", dropout=0.1)
    part = Part(config, cut, tokens=3 * 2048, item=2, computed=2)
    statistics = 4 * (4 + 96 / cut)  # of two norms, and of the softmax of each head
    assert part.saved_bytes(96 / cut) == 3 * 2048 * (12288 * (10 + 24 / cut) + statistics)


def test_relu_needs_no_second_array_of_the_feed_forward():
    job = Job(OPT_175B, "training", "bfloat16")
    more = memory_of(job._replace(config=OPT_175B.replace(activation_function="silu")), ALONE)
    assert more.activations - memory_of(job, ALONE).activations == 96 * 2048 * 2 * 4 * 12288


def test_operations_of_a_training_step_are_the_published_ones_with_half_the_square_of_attention():
    """Narayanan et al., arXiv:2104.04473, section 5.1: 72 B s l h^2 (1 + s / 6h + V / 12lh) without recomputation."""
    B, T, L, D, V = 3, 2048, 96, 12288, 50272
    expected = 72 * B * T * L * D**2 * (1 + T / (12 * D) + V / (12 * L * D))
    assert training_flops(OPT_175B, "bfloat16", B, T) == pytest.approx(expected, rel=1e-12)


def test_a_step_reads_weights_and_cache_once():
    job = Job(OPT_175B, "inference", "float16", batch=4)
    memory = memory_of(job, tensor(8))
    positions = 2 * 2050 * 12288 / 8  # of which a step reads a row
    assert seconds_of(job, tensor(8), A100)["step"] == pytest.approx(
        (2 * parameter_count(OPT_175B) / 8 - positions + memory.cache) / 2039e9
    )


def test_what_is_cut_over_all_devices_adds_up_to_the_whole():
    job = Job(OPT_175B, "training", "bfloat16", batch=8)
    memory = memory_of(job, fsdp(8))
    bytes_ = 2 * parameter_count(OPT_175B)
    assert (8 * memory.weights, 8 * memory.gradients, 8 * memory.optimizer) == (bytes_, bytes_, 2 * bytes_)


def test_a_cache_is_cut_by_heads_and_by_rows():
    job = Job(OPT_175B, "inference", "float16", batch=8)
    whole = 2 * 96 * 8 * 2048 * 12288 * 2
    for mesh in (tensor(8), fsdp(8), Mesh(("fsdp", "tensor"), (4, 2)), Mesh(("data", "tensor"), (2, 4))):
        assert memory_of(job, mesh).cache * 8 == whole


def test_a_cache_has_the_heads_that_layers_have_left():
    job = Job(config_of(), "inference", "float32", batch=2, length=11)
    pruned = job._replace(config=config_of(pruned_heads=PRUNED_HEADS))
    assert memory_of(job, ALONE).cache == 2 * 11 * 2 * 4 * 35 * 3
    assert memory_of(pruned, ALONE).cache == 2 * 11 * 2 * 4 * (35 * 3 - 5 * 7)


def test_data_parallel_cuts_rows_alone():
    job = Job(OPTConfig.preset("125m"), "training", batch=8)
    alone, four = memory_of(job._replace(batch=2), ALONE), memory_of(job, Mesh(("data",), (4,)))
    assert alone == four


def test_parts_of_a_batch_and_recomputation_take_less_for_activations():
    job = Job(OPTConfig.preset("1.3b"), "training", batch=8)
    memory = memory_of(job, ALONE)
    in_parts, again = (memory_of(job._replace(**how), ALONE) for how in (dict(accumulate=4), dict(recompute=True)))
    assert in_parts.activations < memory.activations / 3
    assert again.activations < memory.activations / 3
    assert in_parts.total == sum(in_parts[:-1])
    assert memory.total < sum(memory[:-1])  # activations go as gradients come


def test_mixed_precision_keeps_float32_for_weights_and_moments_and_copies_what_products_take():
    job = Job(OPTConfig.preset("1.3b"), "training", "float32", batch=8)
    mixed, alone, half = job._replace(compute_dtype="bfloat16"), memory_of(job, ALONE), job._replace(dtype="bfloat16")
    memory = memory_of(mixed, ALONE)
    assert memory[:3] == alone[:3]
    assert memory_of(half, ALONE).activations < memory.activations < alone.activations
    assert memory.gathered == 2 * parameter_count(job.config)
    a_layer = (Part(job.config, 1, 1, item, computed=2).saved_bytes(heads=32) for item in (4, 2))
    assert next(a_layer) - next(a_layer) == 2 * 2 * 2048  # the inputs of both norms
    assert memory_of(mixed, fsdp(8)).gathered == memory_of(job, fsdp(8)).gathered / 2 < memory.gathered
    assert seconds_of(mixed, ALONE, A100) == seconds_of(half, ALONE, A100)
    with pytest.raises(InputError, match="compute_dtype: expected float32, the dtype, in inference, got bfloat16"):
        mixed._replace(mode="inference").check()


def test_weights_that_are_gathered_are_less_than_all_and_more_than_a_layer():
    job = Job(OPT_175B, "inference", "bfloat16", batch=8)
    gathered, layer = memory_of(job, fsdp(8)).gathered, 2 * 12 * 12288**2
    assert 2 * layer < gathered < 4 * layer
    assert memory_of(job, Mesh(("fsdp", "tensor"), (4, 2))).gathered < gathered * 0.51
    assert memory_of(job._replace(mode="training"), fsdp(8)).gathered > 1.4 * gathered
    assert memory_of(job, tensor(8)).gathered == 0


# -- which fit --------------------------------------------------------------------------------------------------------


def test_a_plan_fits_from_its_total_on():
    found = plan(Job(OPT_175B, dtype="bfloat16", batch=4), "tensor", tensor(8), A100)
    assert found.fits(found.memory.total)
    assert not found.fits(found.memory.total - 1)


@pytest.mark.parametrize(
    ("name", "device", "devices"),
    [("opt-13b", "a100-40gb", 1), ("opt-66b", "a100-40gb", 4), ("opt-175b", "a100-80gb", 8)],
)
def test_a_size_needs_as_many_devices_as_it_was_served_on(name, device, devices):
    """Kwon et al., arXiv:2309.06180, table 1."""
    job = Job(OPTConfig.preset(name), "inference", "float16")
    assert fewest_devices(job, DEVICES[device], "tensor").mesh.devices == devices


def test_with_half_of_the_fewest_devices_nothing_fits():
    job = Job(OPTConfig.preset("30b"), "training", "float32", batch=4, recompute=True)
    for layout in ("tensor", "fsdp", "tensor+fsdp"):
        found = fewest_devices(job, A100, layout)
        assert found.fits(A100.memory)
        less = plans(job, found.mesh.devices // 2, A100, (layout,))
        assert not any(plan.fits(A100.memory) for plan in less)
    assert fewest_devices(job, A100, "data") is None


def test_a_mesh_that_cannot_run_says_why_and_the_others_are_planned():
    found = list(plans(Job(OPTConfig.preset("125m"), batch=6), 9, A100))
    reasons = {str(plan.mesh): plan.problems for plan in found}
    assert reasons["tensor 9"] == (
        "vocab_size: expected a multiple of 9, the devices along 'tensor', got 50272; "
        "resize_token_embeddings(..., pad_to_multiple_of=9) would make it 50274",
        "num_attention_heads: expected a multiple of 9, the devices along 'tensor', got 12",
        "ffn_dim: expected a multiple of 9, the devices along 'tensor', got 3072",
    )
    assert reasons["data 9"] == ("batch: expected a multiple of 9 rows, got 6",)
    assert [plan.memory for plan in found] == [None] * 4


def test_numbers_out_of_range_come_in_one_error():
    with pytest.raises(InputError) as caught:
        list(plans(Job(OPT_175B, batch=0, length=4096, accumulate=-1), 8, A100))
    assert caught.value.problems == (
        "batch: expected at least 1, got 0",
        "accumulate: expected at least 1, got -1",
        "length: expected at most 2048, got 4096",
    )
    (found,) = plans(Job(OPT_175B, "training", batch=4, accumulate=3), 1, A100, ("tensor",))
    assert found.problems == ("accumulate: expected a divisor of 4 rows, got 3",)


def test_without_a_rate_for_the_dtype_there_is_no_time():
    assert seconds_of(Job(OPT_175B, dtype="float32"), ALONE, DEVICES["tpu-v5e"]) is None
    assert seconds_of(Job(OPT_175B, dtype="bfloat16"), ALONE, DEVICES["tpu-v5e"])["step"] > 0


def test_every_published_size_is_planned_in_seconds_and_without_memory_for_weights():
    peak, start = PeakMemory(), time.process_time()
    for name in PRESETS:
        found = list(plans(Job(OPTConfig.preset(name), "training", "bfloat16", batch=8), 8, A100))
        assert len(found) == 5
        assert sum(plan.memory is not None for plan in found) >= 3
    assert time.process_time() - start < 10
    assert peak.growth is None or peak.growth < 50e6


# -- the command ------------------------------------------------------------------------------------------------------

COMMAND = ["inspect", "opt-175b", "--devices", "8", "--memory", "80GB", "--dtype", "bf16"]
COMMAND += ["--batch", "4", "--length", "2048"]


def test_a_table_has_a_row_for_each_layout_and_says_what_cannot_run(opt_zoo):
    code, out, _ = opt_zoo(*COMMAND)
    assert code == 0
    assert "opt-175b, inference in bfloat16: 4 x 2048 tokens; 8 devices of 80 GB each (a100-80gb, 2,039 GB/s" in out
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "│" in line}
    assert list(rows) == ["tensor 8", "fsdp 8", "fsdp 4 x tensor 2", "fsdp 2 x tensor 4", "data 8"]
    assert "yes" in rows["tensor 8"]
    assert "cannot run" in rows["fsdp 8"]
    assert "fsdp 8: batch: expected a multiple of 8 rows, got 4" in out
    assert "fewest devices, tensor: 8 (tensor 8," in out
    assert "fewest devices, data: none found" in out


def test_json_has_the_same_in_bytes_and_seconds(opt_zoo):
    code, out, _ = opt_zoo(*COMMAND, "--json", "--layout", "tensor,data")
    document = json.loads(out)
    found = plan(Job(OPT_175B, "inference", "bfloat16", 4, 2048), "tensor", tensor(8), A100)
    assert code == 0
    assert document["plans"][0]["bytes"] == found.memory._asdict()
    assert document["plans"][0]["seconds"] == found.seconds
    assert [row["fits"] for row in document["plans"]] == [True, False]
    assert document["fewest_devices"]["data"] is None
    assert document["fewest_devices"]["tensor"]["mesh"] == {"tensor": 8}


@pytest.mark.parametrize("dtypes", [("float32", None), ("bfloat16", None), ("float32", "float16")])
def test_figures_given_by_hand_take_the_place_of_published_ones(opt_zoo, dtypes):
    given = ["--bandwidth", "1TB", "--flops", "1e14", "--memory", "2GB", "--mode", "training", "--dtype", dtypes[0]]
    given += [] if dtypes[1] is None else ["--compute-dtype", dtypes[1]]
    _, out, _ = opt_zoo("inspect", "opt-125m", "--json", "--layout", "tensor", *given)
    document = json.loads(out)
    job = Job(OPTConfig.preset("125m"), "training", dtypes[0], compute_dtype=dtypes[1])
    assert document["device"]["memory"] == 2 * 10**9
    assert document["plans"][0]["bytes"] == memory_of(job, ALONE)._asdict()
    assert document["plans"][0]["seconds"]["step"] == training_flops(job.config, "float32", 1, 2048) / 1e14
    assert document["plans"][0]["fits"] is (document["plans"][0]["bytes"]["total"] <= 2e9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_is_planned_by_its_config_and_in_the_dtype_of_its_weights(opt_zoo, tmp_path, dtype):
    folder = save_random(tmp_path, config_of(), dtype=dtype)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "torch_dtype": None}))
    _, out, _ = opt_zoo("inspect", folder, "--devices", "1", "--json")
    document = json.loads(out)
    assert document["job"]["length"] == 41
    assert document["job"]["dtype"] == dtype
    assert document["plans"][0]["bytes"]["weights"] == ITEM_BYTES[dtype] * parameter_count(config_of())
    assert json.loads(opt_zoo("inspect", "opt-125m", "--json")[1])["job"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tensors",), "--tensors: not of a plan"),
        (("--memory", "much"), "expected a size such as 80GB, got 'much'"),
        (("--layout", "pipeline"), "expected some of tensor,fsdp,tensor+fsdp,data, got 'pipeline'"),
        (("--length", "4096"), "length: expected at most 2048, got 4096"),
        (("--devices", "0"), "devices: expected at least 1, got 0"),
    ],
)
def test_options_that_cannot_be_are_refused(opt_zoo, options, words):
    code, _, err = opt_zoo("inspect", "opt-125m", *options)
    assert code == 2
    assert words in " ".join(err.split())


# -- measured ---------------------------------------------------------------------------------------------------------

MEASURED = dict(vocab_size=8192, hidden_size=768, num_hidden_layers=4, ffn_dim=3072, num_attention_heads=12)
MEASURED |= dict(dropout=0.0)  # a CPU keeps float masks; plans count a byte
SMALL = MEASURED | dict(vocab_size=98, hidden_size=32, num_attention_heads=2, ffn_dim=42, num_hidden_layers=1)


@pytest.mark.parametrize(
    "job",
    [
        dict(mode="inference", batch=4, length=512),
        pytest.param(dict(mode="inference", batch=2, length=2048, dtype="bfloat16"), marks=pytest.mark.slow),
        pytest.param(dict(mode="training", batch=4, length=256), marks=pytest.mark.slow),
        pytest.param(dict(mode="training", batch=1, length=2048), marks=pytest.mark.slow),
        pytest.param(dict(mode="training", batch=4, length=512, accumulate=2), marks=pytest.mark.slow),
        pytest.param(dict(mode="training", batch=4, length=512, recompute=True), marks=pytest.mark.slow),
        pytest.param(dict(mode="training", batch=4, length=512, compute_dtype="bfloat16"), marks=pytest.mark.slow),
    ],
    ids=lambda job: " ".join(map(str, job.values())),
)
def test_the_measured_peak_is_within_a_tenth_of_the_plan(job, request):
    if "torch" not in backends_asked_for(request.config):
        pytest.skip("torch is not among --backends")
    job = {"dtype": "float32", **job}
    measured = measured_bytes(dict(job, config=MEASURED, small=SMALL))
    if measured is None:
        pytest.skip("needs /proc")
    planned = memory_of(Job(OPTConfig(**MEASURED), **job), ALONE).total
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "fsdp=2", "fsdp=2,tensor=2"])
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_the_measured_peak_of_each_process_is_within_a_tenth_of_the_plan(mesh, mode, tmp_path, request):
    if "torch" not in backends_asked_for(request.config):
        pytest.skip("torch is not among --backends")
    job, on = dict(mode=mode, batch=4, length=512, dtype="float32"), Mesh.parse(mesh)
    given = dict(job, mesh=mesh)
    for name, fields in (("config", MEASURED), ("small", SMALL)):
        config, given[name] = OPTConfig(**fields), str(tmp_path / name)
        write_checkpoint(given[name], config, dict(random_tensors(config)))
    script = Path(__file__).with_name("measured_memory.py")
    done = run_processes(script, on.devices, json.dumps(given), env=GIVES_BACK)
    measured = [json.loads(process.stdout.splitlines()[-1]) for process in done]
    if None in measured:
        pytest.skip("needs /proc")
    if mode == "inference":  # `generate` computes all rows in every process
        job["batch"] *= on.size("fsdp")
    planned = memory_of(Job(OPTConfig(**MEASURED), **job), on).total
    assert [planned / x for x in measured] == pytest.approx([1] * on.devices, rel=0.1)


# An allocator that gives back what is freed: what it keeps is neither the model's nor the plan's.
GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def measured_bytes(job: dict) -> int | None:
    script = Path(__file__).with_name("measured_memory.py")
    command, environment = [sys.executable, str(script), json.dumps(job)], {**os.environ, **GIVES_BACK}
    done = subprocess.run(command, env=environment, cwd=script.parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
