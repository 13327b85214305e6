"""Bytes that each process reads, and the memory it takes, when a model is loaded over a mesh of devices.

    python benchmarks/sharded_loading.py --output sharded_loading.json

The checkpoint has the published layout and the shape of opt-1.3b, bfloat16 in several shards; its files are sparse, all
zeros, since sizes are what is measured. Each row of the table is one load: a process for each device on torchrun's
variables, or for JAX also one process with eight devices of the host. Of each process:

- what it counted itself, `bytes_read` of `output_loading_info`, against its share as `opt_core.sharding` plans it;
- what the system counted: `rchar` of /proc/self/io, the bytes of read calls, and the growth of RssFile, the mapped
  pages that it has touched, once every weight has been;
- the peak: VmHWM from the moment before the load, when everything is imported and the processes know each other, beyond
  what was in memory then.

What the system counts has the imports of the load in it, some MB. Files are in the page cache. Linux alone. The last
line is one JSON document.
"""

import argparse
import importlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from conversion.safetensors_file import PlannedTensor, write_file  # noqa: E402
from conversion.stored import DTYPES  # noqa: E402
from opt_core import OPTConfig  # noqa: E402
from opt_core.schema import published_name, shapes  # noqa: E402
from opt_core.sharding import Mesh, shard_bytes  # noqa: E402
from opt_zoo.backends import BACKENDS  # noqa: E402
from opt_zoo.environment import commit, describe_environment, processor_model  # noqa: E402

STORED = "bfloat16"
SHARD_BYTES = 1 << 30
TOLERANCE = 0.05  # of the share that is read
OTHER_BYTES = 500_000_000  # at the peak, beyond the share
SETTINGS = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
MESHES = ("tensor=1", "tensor=2", "tensor=4", "fsdp=2", "fsdp=4", "fsdp=2,tensor=2")


class Case(NamedTuple):
    """One load. `dtype` is that of the parameters."""

    backend: str
    mesh: str
    processes: int
    dtype: str

    @property
    def share(self) -> float:
        """Of a process, the parts of its devices together: devices for each process."""
        return Mesh.parse(self.mesh).devices / self.processes


def main() -> None:
    options = parse_options()
    config = OPTConfig.preset(options.size)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_sparse(Path(folder), config)
        for case in make_cases(options.backends):
            rows.append(summarise(case, config, measure(case, folder)))
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr)
    environment = describe_environment([BACKENDS[name] for name in options.backends])
    machine = {"cpu": processor_model(), "cores_allowed": len(os.sched_getaffinity(0)), "commit": commit()}
    document = {"benchmark": "sharded loading", "size": options.size, **environment, **machine, "results": rows}
    if options.output:
        Path(options.output).write_text(json.dumps(document, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(document))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--backends", type=names, default=["torch", "flax"], help="of torch, flax; both by default")
    parser.add_argument("--size", default="opt-1.3b", help="a preset of OPTConfig")
    parser.add_argument("--output", help="a file for the JSON document")
    return parser.parse_args()


def make_cases(backends: list[str]) -> Iterator[Case]:
    for backend in backends:
        for mesh in MESHES:
            yield Case(backend, mesh, Mesh.parse(mesh).devices, STORED)
        yield Case(backend, "fsdp=4", 4, "float32")
    if "flax" in backends:
        for mesh in ("tensor=8", "fsdp=8", "fsdp=4,tensor=2"):
            yield Case("flax", mesh, 1, STORED)


# -- the checkpoint ---------------------------------------------------------------------------------------------------


def write_sparse(folder: Path, config: OPTConfig) -> None:
    """Shards and their index, in which only the headers take room."""
    shards: list[list[PlannedTensor]] = [[]]
    for name, shape in shapes(config).items():
        tensor = PlannedTensor(published_name(name, "causal-lm"), STORED, shape)
        if sum(it.nbytes for it in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        with open(folder / name, "wb") as file:
            write_file(file, tensors, lambda file, tensor: file.seek(tensor.nbytes, os.SEEK_CUR))
            file.truncate()
    index = {"metadata": {"total_size": sum(it.nbytes for of in shards for it in of)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.replace(torch_dtype=STORED).to_json(folder / "config.json")


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(case: Case, folder: str) -> list[dict[str, float]]:
    """What each process reports."""
    job = {"WORLD_SIZE": str(case.processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    if case.processes == 1:
        job["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={Mesh.parse(case.mesh).devices}"
    command = [sys.executable, __file__, "--load-once", folder, case.backend, case.mesh, case.dtype]
    processes = []
    for rank in range(case.processes):
        variables = {**os.environ, **SETTINGS, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True))
    lines = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case}: ended with {[process.returncode for process in processes]}")
    return [json.loads(line.splitlines()[-1]) for line in lines]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def load_once(folder: str, backend: str, mesh: str, dtype: str) -> None:
    """One process; its last line says what it has read and taken."""
    package, class_name = f"opt_{backend}", BACKENDS[backend].causal_lm
    model_class = getattr(importlib.import_module(package), class_name)
    device_mesh = importlib.import_module(f"{package}.sharding").init_mesh(mesh)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, read, start = memory(), read_bytes(), time.perf_counter()
    model, info = model_class.from_pretrained(folder, dtype=dtype, device_mesh=device_mesh, output_loading_info=True)
    seconds = time.perf_counter() - start
    (touch_torch if backend == "torch" else touch_flax)(model)
    after = memory()
    seen = {
        "bytes_read": info["bytes_read"],
        "rchar": read_bytes() - read,
        "rss_file": after["RssFile"] - before["RssFile"],
        "rss_anon": after["RssAnon"] - before["RssAnon"],
        "peak": after["VmHWM"] - before["RssFile"] - before["RssAnon"],
        "seconds": round(seconds, 2),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(seen), flush=True)


def memory() -> dict[str, int]:
    lines = (line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(text.split()[0]) * 1024 for name, text in lines if name in ("VmHWM", "RssAnon", "RssFile")}


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def touch_torch(model) -> None:
    """Reads every number, so that mapped pages are in memory."""
    torch = importlib.import_module("torch")
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        local.detach().flatten().view(torch.uint8).max()


def touch_flax(model) -> None:
    nnx, np = importlib.import_module("flax.nnx"), importlib.import_module("numpy")
    for parameter in importlib.import_module("jax").tree.leaves(nnx.state(model, nnx.Param)):
        for shard in parameter.addressable_shards:
            np.asarray(shard.data).view(np.uint8).max()


# -- report -----------------------------------------------------------------------------------------------------------


def summarise(case: Case, config: OPTConfig, seen: list[dict[str, float]]) -> dict[str, object]:
    """One row: of all processes those that read and took most."""
    mesh = Mesh.parse(case.mesh)
    planned = {
        dtype: int(case.share * shard_bytes(config, mesh, DTYPES[dtype].itemsize)) for dtype in (STORED, case.dtype)
    }
    most = {name: max(of[name] for of in seen) for name in seen[0]}
    return {
        **case._asdict(),
        "share_stored_bytes": planned[STORED],
        "share_bytes": planned[case.dtype],
        **most,
        "read_of_share": round(most["bytes_read"] / planned[STORED], 4),
        "peak_beyond_share": most["peak"] - planned[case.dtype],
        "target_met": most["bytes_read"] <= planned[STORED] * (1 + TOLERANCE)
        and most["peak"] <= planned[case.dtype] + OTHER_BYTES,
    }


def table(rows: list[dict]) -> str:
    """As markdown, in MB."""
    lines = [
        "| | mesh | processes | dtype | share, MB | read | of share | rchar | mapped | peak | beyond share | s |",
        f"|{'---|' * 12}",
    ]
    for row in rows:
        share = f"{row['share_stored_bytes'] / 1e6:.1f}"
        if row["share_bytes"] != row["share_stored_bytes"]:
            share += f", {row['share_bytes'] / 1e6:.1f} in memory"
        columns = ("rchar", "rss_file", "peak", "peak_beyond_share")
        numbers = [f"{row['bytes_read'] / 1e6:.1f}", f"{row['read_of_share']:.3f}"]
        numbers += [f"{row[name] / 1e6:.0f}" for name in columns]
        mesh = row["mesh"].replace(",", " x ").replace("=", " ")
        cells = [row["backend"], mesh, row["processes"], row["dtype"], share, *numbers, row["seconds"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--load-once"]:
        load_once(*sys.argv[2:])
    else:
        main()
