"""What the published classes share, TensorFlow: the checked call, Keras training, embeddings, cache, loading."""

from collections.abc import Mapping
from typing import ClassVar

import keras
import numpy as np
import tensorflow as tf
from tensorflow import Tensor
from tensorflow.experimental import dtensor

from opt_core.checks import check_config, check_inputs
from opt_core.config import OPTConfig
from opt_core.errors import InputError, ProblemsError
from opt_core.keywords import CALLING, arguments_of, check_keywords
from opt_core.lora import LoraConfig
from opt_core.outputs import BaseModelOutput
from opt_core.sharding import Mesh
from opt_tf.attention import FUSED, check_implementation
from opt_tf.cache import Cache, init_cache
from opt_tf.decoder import Decoder
from opt_tf.inputs import as_index, as_tensor, known, known_cache
from opt_tf.layers import Embedding, Linear
from opt_tf.loading import LoadingMixin, name_of
from opt_tf.lora import add_lora
from opt_tf.losses import counted_targets, part_of_loss
from opt_tf.replicas import check_strategy, replicas, seed_of_replica, share_loss, shares_of_replica
from opt_tf.sharding import Placement, call_on_mesh, check_on_no_mesh
from opt_tf.surgery import SurgeryMixin, replace_layer


class TFOPTPreTrainedModel(SurgeryMixin, LoadingMixin, keras.Model):
    """What the four classes share. `task` is the name that the weight schema gives to the class.

    Args:
        dtype: a dtype, its name, or a Keras policy such as "mixed_bfloat16"; by default Keras's global policy.
    """

    task: ClassVar[str]

    def __init__(self, config: OPTConfig, *, attn_implementation: str = "sdpa", dtype=None):
        super().__init__(dtype=name_of(dtype), autocast=False)
        check_config(config)
        check_implementation(attn_implementation, config, self.compute_dtype)
        self.config = config
        self.attn_implementation = attn_implementation
        self.lora: LoraConfig | None = None
        self.placement: Placement | None = None
        self.seed_generator = keras.random.SeedGenerator()  # of what is dropped in training; no weight
        self.built = True  # the subclasses make every weight in their constructor
        self.forget_compiled()

    def __dir__(self) -> list[str]:
        """Without `base_model`: Keras saves and loads what it finds here, and would not see the end of it."""
        return [name for name in super().__dir__() if name != "base_model"]

    @property
    def base_model(self) -> "TFOPTPreTrainedModel":
        return self.model

    @property
    def dtype(self) -> str:
        """The name of the parameters' dtype, as of every Keras layer; that of the computation is `compute_dtype`."""
        return self.variable_dtype

    @property
    def device(self) -> str:
        """Of the word embeddings; of a model on a mesh, the first one of that."""
        value = self.get_input_embeddings().weight.value
        return value.device if self.device_mesh is None else self.device_mesh.local_devices()[0]

    @property
    def device_mesh(self) -> dtensor.Mesh | None:
        """The mesh over whose devices the model is cut (`opt_tf.sharding`); None of a model on one device."""
        return None if self.placement is None else self.placement.device_mesh

    @property
    def mesh(self) -> Mesh | None:
        """The names and sizes of the axes of `device_mesh`."""
        return None if self.placement is None else self.placement.mesh

    def set_attn_implementation(self, attn_implementation: str) -> None:
        check_implementation(attn_implementation, self.config, self.compute_dtype)
        if attn_implementation in FUSED:
            check_on_no_mesh(self, attn_implementation)
        self.attn_implementation = attn_implementation
        for layer in self.base_model.decoder.layers:
            layer.self_attn.attn_implementation = attn_implementation
        self.forget_compiled()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping | None = None) -> None:
        """From here on, training keeps the inputs of layers alone, and computes the rest again for the gradients.

        The options are those of other frameworks; TensorFlow has none.
        """
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.decoder.gradient_checkpointing

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        self.base_model.decoder.gradient_checkpointing = enabled
        self.forget_compiled()

    def num_parameters(self, only_trainable: bool = False) -> int:
        """The number of parameters, a tied head counted once."""
        return sum(p.shape.num_elements() for p in (self.trainable_weights if only_trainable else self.weights))

    def init_cache(self, batch_size: int, capacity: int) -> Cache:
        """An empty cache for `past_key_values`, for `batch_size` rows of up to `capacity` tokens."""
        return init_cache(self.config, batch_size, capacity, dtype=self.compute_dtype, device=self.device)

    # -- embeddings ---------------------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> Embedding:
        return self.base_model.decoder.embed_tokens

    def set_input_embeddings(self, embeddings: Embedding) -> None:
        replace_layer(self.base_model.decoder, "embed_tokens", embeddings)
        self.name_weights()
        self.forget_compiled()

    def get_output_embeddings(self) -> Linear | Embedding | None:
        return None

    def get_decoder(self) -> Decoder:
        return self.base_model.decoder

    def tie_weights(self) -> None:
        """Makes the head share the word embeddings again; nothing to do for a class without one."""

    # -- the call -----------------------------------------------------------------------------------------------------

    @tf.autograph.experimental.do_not_convert
    def __call__(self, input_ids=None, *args, training: bool | None = None, **arguments):
        """Takes the arguments of `call` by position, by keyword, or as one dict of them, as Keras passes a batch."""
        names = arguments_of(self.call)
        if isinstance(input_ids, Mapping):
            arguments = {**input_ids, **arguments}
        elif input_ids is not None:
            args = (input_ids, *args)
        arguments.update(zip(names, args, strict=False))
        unknown = {name: arguments.pop(name) for name in arguments.keys() - set(names)}
        check_keywords(unknown, names, CALLING)
        for name in arguments.keys() - _NOT_TENSORS:
            arguments[name] = as_tensor(arguments[name])
        for name in arguments.keys() & _NOT_TENSORS:
            if isinstance(arguments[name], np.generic):  # Keras would make a tensor of it
                arguments[name] = arguments[name].item()
        if self.placement is not None:
            return call_on_mesh(self, {**arguments, "training": training})
        if training is not None:  # None would hide the value that an outer model passes down
            arguments["training"] = training
        try:
            return super().__call__(**arguments)
        except RuntimeError as error:  # Keras 3.15 rewrites an error that it cannot make from one string
            raise error.__context__ if isinstance(error.__context__, ProblemsError) else error from None

    def check_inputs(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        past_key_values: Cache | None = None,
        logits_to_keep: int = 0,
        segment_ids=None,
        use_cache: bool | None = None,
        head_mask=None,
    ) -> None:
        """Raises one InputError with everything wrong; to call before a compiled function, which sees no values.

        Inside a `tf.function` shapes are checked and values are not. There an id or a position out of range gives NaN
        on devices and under XLA, where it would be clamped, and an error of `tf.gather` on a CPU without XLA.
        """
        check_inputs(
            self.config,
            input_ids=known(as_index(input_ids)),
            attention_mask=known(as_tensor(attention_mask)),
            position_ids=known(as_index(position_ids)),
            inputs_embeds=known(as_tensor(inputs_embeds), values=False),
            cache=known_cache(past_key_values),
            logits_to_keep=logits_to_keep,
            segment_ids=known(as_index(segment_ids)),
            use_cache=use_cache,
            head_mask=known(as_tensor(head_mask)),
        )

    def decode(
        self,
        input_ids,
        attention_mask,
        position_ids,
        inputs_embeds,
        past_key_values: Cache | None,
        use_cache: bool | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        training: bool | None,
        unknown: Mapping[str, object],
        logits_to_keep: int = 0,
        segment_ids=None,
        head_mask=None,
    ) -> BaseModelOutput:
        """Takes defaults from the config, checks everything, and runs the decoder."""
        config = self.config
        check_keywords(unknown, arguments_of(self.call), CALLING)
        given = (input_ids, attention_mask, position_ids, inputs_embeds, past_key_values, logits_to_keep)
        self.check_inputs(*given, segment_ids, use_cache, head_mask)
        attention_mask = as_tensor(attention_mask)
        if attention_mask is not None and tf.executing_eagerly() and tf.reduce_all(tf.cast(attention_mask, tf.bool)):
            attention_mask = None  # nothing to pack, and no mask where none is needed
        return self.base_model.decoder(
            as_index(input_ids),
            attention_mask,
            as_index(position_ids),
            as_tensor(inputs_embeds, self.compute_dtype),
            past_key_values,
            config.use_cache and not training and segment_ids is None if use_cache is None else use_cache,
            config.output_attentions if output_attentions is None else output_attentions,
            config.output_hidden_states if output_hidden_states is None else output_hidden_states,
            as_index(segment_ids),
            as_tensor(head_mask, self.compute_dtype),
            self.next_seed() if training else None,
        )

    def next_seed(self) -> Tensor:
        """Another seed [2] int32 with each call; `seed_generator.state` [2] decides which, and counts the calls."""
        return seed_of_replica(tf.cast(self.seed_generator.next() % tf.int32.max, tf.int32))

    def current_mask(self, attention_mask, tokens: int | Tensor) -> Tensor | None:
        """The columns of a mask that belong to the tokens of this call."""
        attention_mask = as_tensor(attention_mask)
        return None if attention_mask is None else attention_mask[:, -tokens:]

    # -- Keras --------------------------------------------------------------------------------------------------------

    def forget_compiled(self) -> None:
        """Drops the traced functions, which hold the variables and switches of when they were traced."""
        self.compiled_search = self.compiled_steps = self.compiled_call = None
        self.train_function = self.test_function = self.predict_function = None

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Before Keras trains or evaluates: under a strategy it makes what metrics need, by the shapes of a batch."""
        check_on_no_mesh(self, "fit, evaluate")
        check_strategy(self, "fit, evaluate")
        strategy = self.distribute_strategy
        if strategy.num_replicas_in_sync == 1:
            return super()._maybe_symbolic_build(iterator, data_batch)
        if self.jit_compile:
            text = "expected False or 'auto' under a strategy of several replicas, which XLA does not reach"
            raise InputError("compile", [f"jit_compile: {text}"])
        if iterator is not None:  # Keras 3.15 would average the batches of all replicas, which may differ in rows
            _, _, batches = next(iter(iterator))
            data_batch = tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], next(batches))
        with strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The model's own loss where it computed one, over the rows of all replicas, else that of `compile`."""
        if getattr(y_pred, "loss", None) is None:
            return super().compute_loss(x, y, _predictions(y_pred), sample_weight, training)
        if replicas() == 1:
            return y_pred.loss
        return share_loss(part_of_loss(y_pred, x, shares_of_replica(counted_targets(x, self.task, self.config))))

    def compute_metrics(self, x, y, y_pred, sample_weight=None) -> dict:
        return super().compute_metrics(x, y, _predictions(y_pred), sample_weight)

    def predict_step(self, data) -> dict:
        """What `predict` gathers over batches: the fields of the output by name, without caches and losses."""
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        out = self(x, training=False, use_cache=False)
        return {name: value for name, value in out._asdict().items() if name != "loss" and value is not None}

    def export(self, filepath, format: str = "tf_saved_model", *, overwrite: bool = False) -> None:
        """Writes a SavedModel to be served without this package; see `opt_tf.saved_model.save_saved_model`."""
        from opt_tf.saved_model import save_saved_model

        if format != "tf_saved_model":
            raise InputError("export", [f"format: expected tf_saved_model, got {format!r}"])
        save_saved_model(self, filepath, overwrite=overwrite)

    def get_config(self) -> dict:
        return {
            "config": self.config.to_dict(),
            "attn_implementation": self.attn_implementation,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "lora": None if self.lora is None else self.lora.to_dict(),
        }

    @classmethod
    def from_config(cls, config: dict):
        """Makes the model that `get_config` described, with new weights."""
        config = dict(config, dtype=keras.dtype_policies.deserialize(config["dtype"]))
        lora = config.pop("lora", None)
        model = cls(OPTConfig.from_dict(config.pop("config")), **config)
        if lora is not None:
            add_lora(model, LoraConfig.from_dict(lora))
        return model


# Arguments of the four classes that are not one tensor each.
_NOT_TENSORS = {
    "past_key_values",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "logits_to_keep",
    "training",
}


def _predictions(out):
    """The tensors that a Keras loss or metric compares with its targets."""
    if hasattr(out, "start_logits"):
        return out.start_logits, out.end_logits
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
