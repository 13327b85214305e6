"""Other programs that run OPT, asked for the same work: greedy tokens after the same prompt, and no end of the text.

Each is used as its documentation advises for speed: PyTorch's `generate`, TensorFlow's compiled by XLA, Flax's under
`jax.jit` with the weights as an argument, CTranslate2 with a thread for each processor. Checkpoints are in the layout
of each, in the dtype that is measured. transformers 5 has PyTorch alone; what is not there raises NotRunError.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from opt_zoo.bench.ceilings import available_processors
from opt_zoo.bench.contestant import Contestant, NotRunError, check_device


class TransformersTorch(Contestant):
    framework = "torch"

    def start(self) -> None:
        self._class = _published_class("OPTForCausalLM", "torch", "torch")
        self._torch = importlib.import_module("torch")
        check_device("torch", self.device)

    def load(self) -> None:
        self._model = self._class.from_pretrained(self.folder, dtype=self.dtype).to(self.device).eval()
        _set_end(self._model, None)

    def generate(self, ids_BT: np.ndarray, new_tokens: int) -> np.ndarray:
        ids = self._torch.from_numpy(ids_BT).to(self.device)
        mask = self._torch.ones_like(ids)
        tokens = self._model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return tokens[:, ids_BT.shape[1] :].cpu().numpy()


class TransformersTF(Contestant):
    framework, format = "tf", "tf-safetensors"
    fewest_tokens = 2  # transformers 4.57.6: XLA refuses the loop of one, of a negative length

    def start(self) -> None:
        os.environ["TF_USE_LEGACY_KERAS"] = "1"  # read when TensorFlow is imported
        _need("tensorflow", "tf_keras")
        self._class = _published_class("TFOPTForCausalLM", "tensorflow", "TensorFlow")
        self._tf = importlib.import_module("tensorflow")
        check_device("tf", self.device)
        importlib.import_module("tf_keras").mixed_precision.set_global_policy(self.dtype)

    def load(self) -> None:
        self._model = self._class.from_pretrained(self.folder)
        _set_end(self._model, None)
        self._compiled = self._tf.function(self._model.generate, jit_compile=True)

    def generate(self, ids_BT: np.ndarray, new_tokens: int) -> np.ndarray:
        ids = self._tf.constant(ids_BT, self._tf.int32)
        mask = self._tf.ones_like(ids)
        tokens = self._compiled(ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
        return tokens.numpy()[:, ids_BT.shape[1] :]


class TransformersFlax(Contestant):
    framework, format = "flax", "flax-msgpack"

    def start(self) -> None:
        _need("jax", "flax")
        self._class = _published_class("FlaxOPTForCausalLM", "flax", "Flax")
        self._jax = importlib.import_module("jax")
        check_device("flax", self.device)

    def load(self) -> None:
        self._model = self._class.from_pretrained(self.folder, dtype=getattr(self._jax.numpy, self.dtype))
        _set_end(self._model, self._model.config.vocab_size)  # None is refused; this one never comes
        self._compiled = self._jax.jit(self._generate, static_argnames="new_tokens")

    def _generate(self, params: Any, ids_BT: Any, mask_BT: Any, new_tokens: int) -> Any:
        options = dict(params=params, max_new_tokens=new_tokens, do_sample=False)
        return self._model.generate(ids_BT, attention_mask=mask_BT, **options).sequences

    def generate(self, ids_BT: np.ndarray, new_tokens: int) -> np.ndarray:
        tokens = self._compiled(self._model.params, ids_BT, np.ones_like(ids_BT), new_tokens=new_tokens)
        return np.asarray(tokens)[:, ids_BT.shape[1] :]


class CTranslate2(Contestant):
    """Its converter runs once, in a process of its own, and leaves a folder beside the checkpoint."""

    framework = "ctranslate2"

    def start(self) -> None:
        _need("ctranslate2", "transformers", "torch")  # the latter two for its converter
        self._package = importlib.import_module("ctranslate2")
        check_device("ctranslate2", self.device)
        if self.dtype not in self._package.get_supported_compute_types(self.device):
            raise NotRunError(f"CTranslate2 {self._package.__version__} computes no {self.dtype} on this {self.device}")
        if not Path(converted_folder(self.folder)).exists():
            convert_for_ctranslate2(self.folder)

    def load(self) -> None:
        self._model = self._package.Generator(
            converted_folder(self.folder),
            device=self.device,
            compute_type=self.dtype,
            inter_threads=1,
            intra_threads=available_processors(),
        )

    def generate(self, ids_BT: np.ndarray, new_tokens: int) -> np.ndarray:
        prompts = [[_token(i) for i in ids] for ids in ids_BT.tolist()]
        options = dict(max_length=new_tokens, min_length=new_tokens, beam_size=1, include_prompt_in_result=False)
        results = self._model.generate_batch(prompts, sampling_topk=1, **options)
        return np.array([result.sequences_ids[0] for result in results])


PEERS: dict[str, dict[str, type[Contestant]]] = {  # by the framework they run in, where there are several
    "transformers": {"torch": TransformersTorch, "tf": TransformersTF, "flax": TransformersFlax},
    "ctranslate2": {"": CTranslate2},
}


def convert_for_ctranslate2(folder: str) -> None:
    """Runs its converter. The vocabulary is one of numbers, because no text is ever made."""
    config = json.loads((Path(folder) / "config.json").read_text())
    vocabulary = {_token(i): i for i in range(config["vocab_size"])}
    roles = dict(tokenizer_class="GPT2Tokenizer", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), _token(2)))
    (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary))
    (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
    (Path(folder) / "tokenizer_config.json").write_text(json.dumps({**roles, "pad_token": _token(1)}))
    command = "from ctranslate2.converters.transformers import main; main()"
    arguments = ["--model", folder, "--output_dir", converted_folder(folder), "--force"]
    done = subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"CTranslate2's converter: {done.stderr.strip().splitlines()[-1:]}")


def converted_folder(folder: str) -> str:
    return f"{folder}-ctranslate2"


def _token(token_id: int) -> str:
    return f"<{token_id}>"


def _published_class(name: str, framework: str, title: str) -> Any:
    _need("transformers", framework)
    version = importlib.metadata.version("transformers")
    if title in ("TensorFlow", "Flax") and int(version.partition(".")[0]) >= 5:
        raise NotRunError(f"transformers {version} has no {title} classes")
    return getattr(importlib.import_module("transformers"), name)


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise NotRunError(f"{' and '.join(missing)} not installed")


def _set_end(model: Any, eos_token_id: int | None) -> None:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos_token_id, 1
