"""The generation scripts of `examples/`: one per backend, the same but for names, with the same text as the result."""

import runpy
from functools import lru_cache
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@lru_cache
def published_text() -> str:
    """What transformers generates greedily for the prompt of the scripts."""
    import torch
    from transformers import GPT2Tokenizer, OPTForCausalLM

    from opt_zoo.embedded import embedded_folder

    folder = embedded_folder("opt-tiny")
    tokenizer = GPT2Tokenizer.from_pretrained(folder)
    model = OPTForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer("ROMEO:\nWhat light is that?", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_the_script_prints_the_published_continuation(backend, capsys):
    runpy.run_path(str(EXAMPLES / f"generate_{backend.name}.py"), run_name="__main__")
    assert capsys.readouterr().out == published_text() + "\n"


@pytest.mark.parametrize(("name", "prefix", "title"), [("tf", "TF", "TensorFlow"), ("flax", "Flax", "JAX")])
def test_the_scripts_differ_in_names_only(name, prefix, title):
    torch_script = (EXAMPLES / "generate_torch.py").read_text()
    expected = torch_script.replace("opt_torch", f"opt_{name}").replace("OPTForCausalLM", f"{prefix}OPTForCausalLM")
    assert (EXAMPLES / f"generate_{name}.py").read_text() == expected.replace("PyTorch", title)
