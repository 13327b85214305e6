"""A model of another shape, TensorFlow: more or fewer tokens or positions, heads taken out."""

from collections.abc import Iterable, Mapping

import keras
import tensorflow as tf

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.errors import InputError
from opt_core.schema import kept_by_pruning, published_name, weights
from opt_tf.layers import Embedding, Linear
from opt_tf.loading import owner_of
from opt_tf.sharding import check_on_no_mesh


class SurgeryMixin:
    """What changes the shapes of a model's parameters, and its config with them."""

    def resize_token_embeddings(self, new_num_tokens: int, pad_to_multiple_of: int | None = None) -> Embedding:
        """Keeps the first rows of the word embeddings (and of an untied head); new rows start as in a new model.

        A compiled optimizer keeps slots of the old shape: call `compile` again.
        """
        check_on_no_mesh(self, "resize_token_embeddings")
        if pad_to_multiple_of:
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        config = self.config.replace(vocab_size=new_num_tokens)
        init = dict(init_std=config.init_std, dtype=self.dtype_policy)
        new = Embedding(new_num_tokens, config.word_embed_proj_dim, **init)
        self.set_input_embeddings(_with_rows_of(self.get_input_embeddings(), new))
        head = self.get_output_embeddings()
        if head is not None and not config.tie_word_embeddings:
            new = Linear(config.word_embed_proj_dim, new_num_tokens, bias=False, **init)
            replace_layer(self, "lm_head", _with_rows_of(head, new))
        self._set_config(config)
        self.name_weights()
        return self.get_input_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Makes room for sequences of so many tokens; keeps the first rows, new ones start as in a new model.

        A compiled optimizer keeps slots of the old shape: call `compile` again.
        """
        check_on_no_mesh(self, "resize_position_embeddings")
        config = self.config.replace(max_position_embeddings=new_num_position_embeddings)
        init = dict(init_std=config.init_std, dtype=self.dtype_policy)
        new = Embedding(new_num_position_embeddings + POSITION_OFFSET, config.hidden_size, **init)
        decoder = self.base_model.decoder
        replace_layer(decoder, "embed_positions", _with_rows_of(decoder.embed_positions, new))
        self._set_config(config)
        self.name_weights()
        self.forget_compiled()

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Takes heads out of layers for good: {layer: heads}, numbered as before any was pruned.

        The config, which is then the model's own, keeps them as `pruned_heads`, files as well. Heads that are gone
        already may be named again. A compiled optimizer keeps slots of the old shape: call `compile` again.

        Raises:
            ConfigError: lists every layer or head that there is not, and every layer that would have no head left.
            InputError: the model has adapters.
        """
        check_on_no_mesh(self, "prune_heads")
        if self.lora is not None:
            raise InputError("prune_heads", ["model: expected one without adapters; merge_lora makes it one"])
        before, after = self.config, self.config.without_heads(heads_to_prune)
        for weight in weights(before, self.task):
            place = kept_by_pruning(weight, before, after)
            if place is not None:
                self._keep(weight.name, *place)
        for layer, attention in enumerate(layer.self_attn for layer in self.base_model.decoder.layers):
            attention.num_heads = after.heads_of(layer)
        self._set_config(after)
        self.name_weights()
        self.forget_compiled()

    def _keep(self, name: str, axis: int, index: list[int]) -> None:
        """Shortens a parameter to some indices along one axis."""
        owner, attribute = owner_of(self, published_name(name, self.task))
        old = getattr(owner, attribute)
        owner._untrack_variable(old)
        kept = tf.gather(old.value, index, axis=axis)
        new = owner.add_parameter(attribute, *kept.shape)
        new.assign(kept)
        new.trainable = old.trainable
        setattr(owner, attribute, new)

    def _set_config(self, config: OPTConfig) -> None:
        """From here on this is the config, and the one that the model was made with stays as it is."""
        for owner in (self, self.base_model, self.base_model.decoder):
            owner.config = config


def replace_layer(owner: keras.layers.Layer, name: str, layer: keras.layers.Layer) -> None:
    owner._tracker.untrack(getattr(owner, name))  # Keras 3.15 keeps the weights of a replaced layer
    setattr(owner, name, layer)


def _with_rows_of(old: Linear | Embedding, new: Linear | Embedding) -> Linear | Embedding:
    rows = min(old.weight.shape[0], new.weight.shape[0])
    new.weight.assign(tf.concat([old.weight[:rows], new.weight[rows:]], axis=0))
    new.trainable = old.trainable
    return new
