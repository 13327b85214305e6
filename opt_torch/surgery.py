"""A model of another shape, PyTorch: more or fewer tokens or positions, heads taken out."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from opt_core.config import POSITION_OFFSET, OPTConfig
from opt_core.errors import InputError
from opt_core.schema import kept_by_pruning, published_name, weights
from opt_torch.layers import Embedding, Linear
from opt_torch.loading import owner_of


class SurgeryMixin:
    """What changes the shapes of a model's parameters, and its config with them."""

    def resize_token_embeddings(self, new_num_tokens: int, pad_to_multiple_of: int | None = None) -> Embedding:
        """Keeps the first rows of the word embeddings (and of an untied head); new rows start as in a new model."""
        self.check_whole("resize_token_embeddings")
        if pad_to_multiple_of:
            new_num_tokens = -(-new_num_tokens // pad_to_multiple_of) * pad_to_multiple_of
        config = self.config.replace(vocab_size=new_num_tokens)
        old = self.get_input_embeddings()
        new = Embedding(new_num_tokens, config.word_embed_proj_dim, init_std=config.init_std)
        self.base_model.decoder.embed_tokens = _with_rows_of(old, new)
        head = self.get_output_embeddings()
        if head is not None and not config.tie_word_embeddings:
            self.lm_head = _with_rows_of(
                head, Linear(config.word_embed_proj_dim, new_num_tokens, bias=False, init_std=config.init_std)
            )
        self._set_config(config)
        self.tie_weights()
        return self.get_input_embeddings()

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Makes room for sequences of so many tokens; keeps the first rows, new ones start as in a new model.

        An optimizer made before has the old parameter: make another.
        """
        self.check_whole("resize_position_embeddings")
        config = self.config.replace(max_position_embeddings=new_num_position_embeddings)
        rows, decoder = new_num_position_embeddings + POSITION_OFFSET, self.base_model.decoder
        new = Embedding(rows, config.hidden_size, init_std=config.init_std)
        decoder.embed_positions = _with_rows_of(decoder.embed_positions, new)
        self._set_config(config)

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Takes heads out of layers for good: {layer: heads}, numbered as before any was pruned.

        The config, which is then the model's own, keeps them as `pruned_heads`, files as well. Heads that are gone
        already may be named again. An optimizer made before has the old parameters: make another.

        Raises:
            ConfigError: lists every layer or head that there is not, and every layer that would have no head left.
            InputError: the model has adapters, or is sharded.
        """
        self.check_whole("prune_heads")
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

    def _keep(self, name: str, axis: int, index: list[int]) -> None:
        """Shortens a parameter to some indices along one axis."""
        owner, attribute = owner_of(self, published_name(name, self.task))
        old = getattr(owner, attribute)
        kept = old.detach().index_select(axis, torch.tensor(index, device=old.device))
        setattr(owner, attribute, nn.Parameter(kept, requires_grad=old.requires_grad))
        owner.out_features, owner.in_features = owner.weight.shape

    def _set_config(self, config: OPTConfig) -> None:
        """From here on this is the config, and the one that the model was made with stays as it is."""
        for owner in (self, self.base_model, self.base_model.decoder):
            owner.config = config


def _with_rows_of(old: nn.Module, new: nn.Module) -> nn.Module:
    new = new.to(old.weight.device, old.weight.dtype)
    rows = min(len(old.weight), len(new.weight))
    with torch.no_grad():
        new.weight[:rows] = old.weight[:rows]
    return new.requires_grad_(old.weight.requires_grad)
