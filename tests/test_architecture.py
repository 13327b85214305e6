"""The shape of the project: imports point one way, an import stays light, the three backends define the same things."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BACKENDS = ("opt_torch", "opt_tf", "opt_flax")
FRAMEWORKS = ("torch", "tensorflow", "keras", "jax", "flax")
MAY_IMPORT = {
    "opt_core": {"opt_core"},
    "conversion": {"opt_core", "conversion"},
    **{backend: {"opt_core", "conversion", backend} for backend in BACKENDS},
    "opt_zoo": {"opt_core", "conversion", "opt_zoo", *BACKENDS},
}
OWN_FRAMEWORK = {
    "opt_torch": {"torch"},
    "opt_tf": {"tensorflow", "keras"},
    "opt_flax": {"jax", "flax"},
    "opt_core": set(),
    "conversion": set(),
    "opt_zoo": set(),
}
# Functions that hand out arrays of a framework that the caller named import it there, and nowhere else.
LAZY_IMPORTS = {"opt_core/batch_encoding.py", "opt_zoo/backends.py"}
# What a framework needs and the others do not: attention with O(S) memory, which PyTorch has built in; kernels of
# PyTorch and around it; kernels of JAX and cuDNN; TensorFlow's own format of a program with its weights; a model cut
# over devices, or with a copy on each; layers that wait in other memories, through PyTorch's accelerate; a
# switch for a framework's own cache of programs.
ONLY_SOME_HAVE = {
    "blockwise.py",
    "rowwise.py",
    *("flash.py", "flex.py", "sdpa.py", "segments.py", "triton_decode.py"),
    *("cudnn.py", "pallas_attention.py"),
    "saved_model.py",
    "sharding.py",
    "offloading.py",
    "processes.py",
    "replicas.py",
    "distributed_checkpoint.py",
    *("agreement.py", "tensor_parallel.py"),
    "cuda_graph.py",
    "compilation_cache.py",
}


def python_files(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, package
    return files


def imports_of(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package):
    for path in python_files(package):
        ours = imports_of(path) & MAY_IMPORT.keys()
        assert ours <= MAY_IMPORT[package], path


@pytest.mark.parametrize("package", OWN_FRAMEWORK)
def test_a_package_imports_no_framework_but_its_own(package):
    for path in python_files(package):
        if str(path.relative_to(ROOT)) in LAZY_IMPORTS:
            continue
        foreign = imports_of(path) & set(FRAMEWORKS) - OWN_FRAMEWORK[package]
        assert not foreign, path


LOADED = "import sys; print(' '.join(sorted(m for m in {frameworks} if m in sys.modules)))"


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import opt_core, opt_core.reference, opt_core.schema, opt_core.generation", set()),
        ("from opt_core import OPTConfig, OPTTokenizer", set()),
        ("import conversion", set()),
        ("import opt_zoo.main", set()),
        ("import opt_torch", {"torch"}),
        ("import opt_tf", {"tensorflow", "keras", "jax"}),  # TensorFlow 2.21 loads jax itself where it finds it
        ("import opt_flax", {"jax", "flax"}),
    ],
)
def test_importing_a_package_loads_no_framework_but_its_own(statement, allowed, request):
    from harness import backends_asked_for

    backend = statement.removeprefix("import opt_")
    if backend in ("torch", "tf", "flax") and backend not in backends_asked_for(request.config):
        pytest.skip(f"{backend} is not among --backends")
    code = f"{statement}\n{LOADED.format(frameworks=FRAMEWORKS)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= allowed


def test_importing_the_core_takes_well_under_a_second():
    code = "import time; t = time.perf_counter(); import opt_core; print(time.perf_counter() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.5


@pytest.mark.parametrize("package", BACKENDS)
def test_a_missing_framework_says_what_to_install(package):
    """The framework is hidden from the import; the message names the extra."""
    frameworks = OWN_FRAMEWORK[package]
    code = f"import sys; sys.modules.update(dict.fromkeys({frameworks}))\nimport {package}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert f"pip install opt-zoo[{package.removeprefix('opt_')}]" in last
    assert "MissingFrameworkError" in last


def outline(path: Path) -> list[str]:
    """The public classes, functions and methods of a file in their order, without the prefixes of class names."""
    lines = []
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        lines.append(_neutral(node.name))
        if isinstance(node, ast.ClassDef):
            methods = (item for item in node.body if isinstance(item, ast.FunctionDef))
            public = (m.name for m in methods if not m.name.startswith("_") or m.name in SAME_METHOD)
            lines += [f"{_neutral(node.name)}.{name}" for name in public]
    return lines


def _neutral(name: str) -> str:
    return name.removeprefix("TF").removeprefix("Flax")


# The name by which a framework calls a module, and what only one framework needs: in PyTorch, what a compiler would
# find to be the same in all layers; an adapter, which in Keras belongs to the layer itself (`enable_lora`); what PEFT
# asks for.
SAME_METHOD = {"call": "forward", "__call__": "forward"}
FRAMEWORK_ONLY = {
    "opt_torch": {
        "accept_published_names",
        "check_implementation",
        "Linear.reset_parameters",
        "Embedding.reset_parameters",
        "Slots",
        "slots_behind",
        "GenerationMixin.prepare_inputs_for_generation",
        "GenerationMixin.feed",
        "OPTPreTrainedModel.check_whole",
        *("Part", "Part.total"),
        *("LoraLinear", "LoraLinear.forward", "LoraLinear.merged"),
        *("Trainer.moments", "Trainer.go_on_at"),
    },
    "opt_tf": set(),
    "opt_flax": set(),
}


@pytest.mark.parametrize("other", ["opt_tf", "opt_flax"])
def test_the_backends_have_the_same_files(other):
    files = {path.name for path in python_files("opt_torch")} | ONLY_SOME_HAVE
    assert {path.name for path in python_files(other)} <= files
    assert {path.name for path in python_files(other)} >= files - ONLY_SOME_HAVE


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((ROOT / "opt_torch").glob("*.py")) if path.name not in ONLY_SOME_HAVE],
    ids=lambda path: path.name,
)
@pytest.mark.parametrize("other", ["opt_tf", "opt_flax"])
def test_the_backends_define_the_same_things_in_the_same_order(path, other):
    mine = comparable_outline(path, "opt_torch")
    theirs = comparable_outline(ROOT / other / path.name, other)
    shared = set(mine) & set(theirs)
    assert [name for name in mine if name not in shared] == []
    assert [name for name in theirs if name in shared] == mine


def comparable_outline(path: Path, package: str) -> list[str]:
    lines = []
    for line in outline(path):
        owner, dot, method = line.rpartition(".")
        lines.append(owner + dot + SAME_METHOD.get(method, method))
    return [line for line in lines if line not in FRAMEWORK_ONLY[package]]


def test_no_file_is_named_for_nothing():
    vague = {"utils", "util", "common", "helpers", "misc"}
    packages = [*MAY_IMPORT, "tests", "examples", "benchmarks"]
    names = {path.stem for package in packages for path in (ROOT / package).rglob("*.py")}
    assert not names & vague


def test_the_tree_in_the_readme_names_every_file():
    """Under a line for each folder; one line may stand for several that have the same files."""
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    listed, folders = set(), []
    for line in tree.splitlines():
        if found := re.match(r"((?:[\w/]+/ )*[\w/]+/)  ", line):
            folders = found[1].split()
        elif found := re.match(r"  (\w+\.py)  ", line):
            listed |= {f"{folder}{found[1]}" for folder in folders}
    files = {str(path.relative_to(ROOT)) for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")}
    files = {name for name in files if not Path(name).name.startswith("__")}
    only_some = {name for name in listed if Path(name).name in ONLY_SOME_HAVE}
    assert listed - only_some == files - only_some
    assert {Path(name).name for name in only_some} == ONLY_SOME_HAVE
