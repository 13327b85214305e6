"""`fit`, `evaluate`, `predict` and `keras.saving` for the published classes: what Keras asks of a model."""

import keras

from opt_core.config import OPTConfig


class TrainingMixin:
    """Lets the model's own loss train it: `compile(optimizer)` without a loss, and labels among the inputs.

    With `compile(optimizer, loss)` the loss and the metrics see the logits, as those of any Keras model.
    """

    def forget_compiled(self) -> None:
        """Drops the traced functions, which hold the variables and switches of when they were traced."""
        self.compiled_search = self.train_function = self.test_function = self.predict_function = None

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The model's own loss where it computed one, else that of `compile`."""
        if getattr(y_pred, "loss", None) is None:
            return super().compute_loss(x, y, predictions(y_pred), sample_weight, training)
        return y_pred.loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None) -> dict:
        return super().compute_metrics(x, y, predictions(y_pred), sample_weight)

    def predict_step(self, data) -> dict:
        """What `predict` gathers over batches: the fields of the output by name, without caches and losses."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        out = self(x, training=False, use_cache=False)
        return {name: value for name, value in out._asdict().items() if name != "loss" and value is not None}

    def get_config(self) -> dict:
        return {
            "config": self.config.to_dict(),
            "attn_implementation": self.attn_implementation,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
        }

    @classmethod
    def from_config(cls, config: dict):
        """Makes the model that `get_config` described, with new weights."""
        config = dict(config, dtype=keras.dtype_policies.deserialize(config["dtype"]))
        return cls(OPTConfig.from_dict(config.pop("config")), **config)


def predictions(out):
    """The tensors that a Keras loss or metric compares with its targets."""
    if hasattr(out, "start_logits"):
        return out.start_logits, out.end_logits
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
