"""Programs of one process are found by the next."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opt_flax.compilation_cache import default_folder

ROOT = Path(__file__).parents[2]

# How often a process asked the cache in vain, which kept something elsewhere first, and its text.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
import opt_flax
from opt_core import OPTConfig
opt_flax.use_compilation_cache({elsewhere!r})
jax.jit(lambda x: x + 1)(jnp.ones(3))
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
opt_flax.use_compilation_cache({folder})
config = OPTConfig(vocab_size=97, hidden_size=22, ffn_dim=29, num_attention_heads=2, num_hidden_layers=1)
model = opt_flax.FlaxOPTForCausalLM(config)
text = np.asarray(model.generate(np.array([[5, 7, 11]]), max_new_tokens=3)).tolist()
print(sum(event.endswith('/cache_misses') for event in events), text)
"""


def run(home: Path, folder: str) -> tuple[int, str]:
    """How many programs were compiled anew, and the text."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(home)}
    program = PROGRAM.format(folder=folder, elsewhere=str(home / "elsewhere"))
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    missed, text = out.stdout.split(maxsplit=1)
    return int(missed), text


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    """The first keeps its programs in the folder by default, which the second names."""
    missed, text = run(tmp_path, "")
    assert missed > 0
    assert run(tmp_path, repr(str(tmp_path / "opt-zoo" / "compilation" / "jax"))) == (0, text)


@pytest.mark.parametrize(
    ("environment", "expected"), [({"XDG_CACHE_HOME": "/x"}, "/x"), ({"XDG_CACHE_HOME": ""}, "/home/y/.cache")]
)
def test_the_folder_is_where_a_user_keeps_caches(monkeypatch, environment, expected):
    monkeypatch.setenv("HOME", "/home/y")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected, "opt-zoo", "compilation", "jax")
