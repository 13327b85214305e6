"""A model of another shape, Flax NNX: more or fewer tokens or positions, heads taken out."""

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
from flax import nnx

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.errors import InputError
from opt_core.schema import kept_by_pruning, published_name, weights
from opt_core.sharding import partition
from opt_flax.decoder import StaticConfig
from opt_flax.layers import Embedding, Linear
from opt_flax.loading import owner_of
from opt_flax.sharding import place


class SurgeryMixin:
    """What changes the shapes of a model's parameters, and its config with them."""

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None, rngs: nnx.Rngs | None = None
    ) -> Embedding:
        """Keeps the first rows of the word embeddings (and of an untied head); new rows start as in a new model."""
        if pad_to_multiple_of:
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        config = self.config.replace(vocab_size=new_num_tokens)
        self._check_partition(config)
        rngs = rngs or nnx.Rngs(0)
        old = self.get_input_embeddings()
        start = dict(init_std=config.init_std, rngs=rngs, dtype=self.dtype)
        new = Embedding(new_num_tokens, config.word_embed_proj_dim, **start)
        self.base_model.decoder.embed_tokens = _with_rows_of(old, new)
        head = self.get_output_embeddings()
        if head is not None and not config.tie_word_embeddings:
            self.lm_head = _with_rows_of(head, Linear(config.word_embed_proj_dim, new_num_tokens, bias=False, **start))
        self._set_config(config)
        self.tie_weights()
        place(self)
        return self.get_input_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int, rngs: nnx.Rngs | None = None) -> None:
        """Makes room for sequences of so many tokens; keeps the first rows, new ones start as in a new model."""
        config = self.config.replace(max_position_embeddings=new_num_position_embeddings)
        start = dict(init_std=config.init_std, rngs=rngs or nnx.Rngs(0), dtype=self.dtype)
        new = Embedding(new_num_position_embeddings + POSITION_OFFSET, config.hidden_size, **start)
        decoder = self.base_model.decoder
        decoder.embed_positions = _with_rows_of(decoder.embed_positions, new)
        self._set_config(config)
        place(self)

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Takes heads out of layers for good: {layer: heads}, numbered as before any was pruned.

        The config, which is then the model's own, keeps them as `pruned_heads`, files as well. Heads that are gone
        already may be named again. An optimizer keeps moments of the old shape: make a new one.

        Raises:
            ConfigError: lists every layer or head that there is not, and every layer that would have no head left.
            InputError: the model has adapters.
        """
        if self.lora is not None:
            raise InputError("prune_heads", ["model: expected one without adapters; merge_lora makes it one"])
        before, after = self.config, self.config.without_heads(heads_to_prune)
        self._check_partition(after)
        for weight in weights(before, self.task):
            kept = kept_by_pruning(weight, before, after)
            if kept is not None:
                self._keep(weight.name, *kept)
        for i, layer in enumerate(self.base_model.decoder.layers):
            layer.self_attn.num_heads = after.heads_of(i)
        self._set_config(after)
        place(self)

    def _keep(self, name: str, axis: int, index: list[int]) -> None:
        """Shortens a parameter to some indices along one axis."""
        owner, attribute = owner_of(self, published_name(name, self.task))
        kept = jnp.take(getattr(owner, attribute).get_value(), jnp.array(index), axis=axis)
        setattr(owner, attribute, nnx.Param(kept))

    def _check_partition(self, config: OPTConfig) -> None:
        """Raises an InputError where the model's mesh does not divide what would become of the model."""
        if self.placement is not None:
            partition(config, self.mesh, self.placement.rules, self.task)

    def _set_config(self, config: OPTConfig) -> None:
        for owner in (self, self.base_model, self.base_model.decoder):
            owner.static_config = StaticConfig(config)


def _with_rows_of(old: Embedding | Linear, new: Embedding | Linear) -> Embedding | Linear:
    rows = min(old.weight.shape[0], new.weight.shape[0])
    new.weight = nnx.Param(new.weight.get_value().at[:rows].set(old.weight.get_value()[:rows]))
    return new
