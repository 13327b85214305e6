"""What a worker asks of a contestant, ours or a peer: import, load, generate greedily, all with NumPy at its border."""

import abc
import importlib

import numpy as np

from opt_core.errors import MissingFrameworkError
from opt_zoo.backends import load_backend


class NotRunError(Exception):
    """Why a contestant has no figure here: not installed, or it does not do this. No failure."""


class Contestant(abc.ABC):
    """One that generates, from a checkpoint in its `format`, on a device, in a dtype."""

    framework: str  # "torch", "tf", "flax" or "ctranslate2"
    format = "safetensors"  # a key of `conversion.formats.FORMATS`
    fewest_tokens = 1  # that it can be asked for

    def __init__(self, folder: str, device: str, dtype: str):
        self.folder, self.device, self.dtype = folder, device, dtype

    @abc.abstractmethod
    def start(self) -> None:
        """Imports all that is needed; raises NotRunError."""

    @abc.abstractmethod
    def load(self) -> None:
        """Makes the model, ready for `generate`."""

    @abc.abstractmethod
    def generate(self, ids_BT: np.ndarray, new_tokens: int) -> np.ndarray:
        """The new tokens [B, n], when the host knows them; there is no token that ends a text."""


class Ours(Contestant):
    """A backend of this project."""

    def __init__(self, framework: str, folder: str, device: str, dtype: str):
        super().__init__(folder, device, dtype)
        self.framework = framework

    def start(self) -> None:
        try:
            self._backend = load_backend(self.framework)
        except MissingFrameworkError as error:
            raise NotRunError(str(error)) from None
        check_device(self.framework, self.device)

    def load(self) -> None:
        options = {"device": self.device} if self.framework == "torch" else {}
        self._model = self._backend.load(self.folder, dtype=self.dtype, **options).model

    def generate(self, ids_BT: np.ndarray, new_tokens: int) -> np.ndarray:
        mask_BT = np.ones_like(ids_BT)
        tokens = self._model.generate(ids_BT, attention_mask=mask_BT, max_new_tokens=new_tokens, eos_token_id=())
        return self._backend.to_numpy(tokens)[:, ids_BT.shape[1] :]


def check_device(framework: str, device: str) -> None:
    """Raises NotRunError where a GPU is to be measured and the framework sees none."""
    if device == "cpu":
        return
    if framework == "torch":
        found = importlib.import_module("torch").cuda.is_available()
    elif framework == "tf":
        found = bool(importlib.import_module("tensorflow").config.list_physical_devices("GPU"))
    elif framework == "flax":
        found = importlib.import_module("jax").default_backend() == "gpu"
    else:
        found = importlib.import_module("ctranslate2").get_cuda_device_count() > 0
    if not found:
        raise NotRunError(f"{framework} sees no GPU")
