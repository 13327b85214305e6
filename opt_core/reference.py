"""OPT in float64 NumPy: the truth that every backend is measured against. Read this file first.

It computes what the definition says, one line per step, with an explicit mask and no cache, and is not made to be fast.
Sources: Zhang et al., arXiv:2205.01068, section 2; positions, order of operations and the 350m variant follow metaseq.

Padding: the position of a real token is the number of real tokens before it. Nothing attends to padding, and the rows
of padding tokens are zero in every output. Several documents in a row do not see each other, and each counts from 0.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from opt_core.config import LAYER_NORM_EPS, POSITION_OFFSET, OPTConfig

IGNORED_LABEL = -100

Array = np.ndarray

_erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATION_FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))),
    "gelu_new": lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


class ReferenceOutput(NamedTuple):
    last_hidden_state: Array  # [B, T, E]
    hidden_states: tuple[Array, ...]  # L + 1 entries: the input of each layer, then last_hidden_state
    attentions: tuple[Array, ...]  # L entries [B, N, T, T]


class Reference:
    """The base model on `weights`: canonical name (`decoder.layers.0.fc1.weight`) to array of any float dtype."""

    def __init__(self, config: OPTConfig, weights: Mapping[str, Array]):
        self.config = config
        self.weights = {name: np.asarray(weight).astype(np.float64) for name, weight in weights.items()}
        activation = config.activation_function
        self.activation = activation if callable(activation) else ACTIVATION_FUNCTIONS[activation]

    def __call__(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        segment_ids=None,
        head_mask=None,
    ) -> ReferenceOutput:
        """Runs [B, T] tokens, or [B, T, E] embeddings, through the decoder.

        `head_mask`, [L, N] or [N] for all layers, scales the output of each head, which is the same as scaling its
        attention weights after the softmax; the weights returned are those before.
        """
        x_BTE = self.weights["decoder.embed_tokens.weight"][input_ids] if inputs_embeds is None else inputs_embeds
        real_BT = np.ones(x_BTE.shape[:2], bool) if attention_mask is None else np.asarray(attention_mask) != 0
        causal_TT = np.tri(x_BTE.shape[1], dtype=bool)
        attend_BTT = causal_TT & real_BT[:, None, :] & real_BT[:, :, None]
        if segment_ids is not None:
            documents_BT = number_documents(segment_ids, real_BT)
            attend_BTT &= documents_BT[:, None, :] == documents_BT[:, :, None]
        if position_ids is None:
            position_ids = attend_BTT.sum(2) - 1
        position_ids = np.where(real_BT, position_ids, 0)

        x_BTD = self.linear("decoder.project_in", x_BTE)
        x_BTD = x_BTD + self.weights["decoder.embed_positions.weight"][position_ids + POSITION_OFFSET]
        config = self.config
        head_mask_LN = np.broadcast_to(
            1.0 if head_mask is None else head_mask, (config.num_hidden_layers, config.num_attention_heads)
        )
        inputs, attentions = [], []
        for layer in range(config.num_hidden_layers):
            inputs.append(x_BTD)
            head_mask_N = head_mask_LN[layer, config.remaining_heads(layer)]
            x_BTD, weights_BNTT = self.layer(f"decoder.layers.{layer}", x_BTD, attend_BTT, head_mask_N)
            attentions.append(weights_BNTT)
        if config.has_final_layer_norm:
            x_BTD = self.layer_norm("decoder.final_layer_norm", x_BTD)
        x_BTE = self.linear("decoder.project_out", x_BTD)
        states = [np.where(real_BT[..., None], x, 0) for x in (*inputs, x_BTE)]
        return ReferenceOutput(states[-1], tuple(states), tuple(attentions))

    def layer(self, name: str, x_BTD: Array, attend_BTT: Array, head_mask_N: Array) -> tuple[Array, Array]:
        pre_norm = self.config.do_layer_norm_before
        residual = x_BTD
        if pre_norm:
            x_BTD = self.layer_norm(f"{name}.self_attn_layer_norm", x_BTD)
        x_BTD, weights_BNTT = self.attention(f"{name}.self_attn", x_BTD, attend_BTT, head_mask_N)
        x_BTD = residual + x_BTD
        if not pre_norm:
            x_BTD = self.layer_norm(f"{name}.self_attn_layer_norm", x_BTD)

        residual = x_BTD
        if pre_norm:
            x_BTD = self.layer_norm(f"{name}.final_layer_norm", x_BTD)
        x_BTD = self.linear(f"{name}.fc2", self.activation(self.linear(f"{name}.fc1", x_BTD)))
        x_BTD = residual + x_BTD
        if not pre_norm:
            x_BTD = self.layer_norm(f"{name}.final_layer_norm", x_BTD)
        return x_BTD, weights_BNTT

    def attention(self, name: str, x_BTD: Array, attend_BTT: Array, head_mask_N: Array) -> tuple[Array, Array]:
        q_BNTH = self.heads(self.linear(f"{name}.q_proj", x_BTD) * self.config.head_size**-0.5)
        k_BNTH = self.heads(self.linear(f"{name}.k_proj", x_BTD))
        v_BNTH = self.heads(self.linear(f"{name}.v_proj", x_BTD))
        weights_BNTT = masked_softmax(q_BNTH @ k_BNTH.swapaxes(-1, -2), attend_BTT[:, None])
        x_BNTH = weights_BNTT @ v_BNTH * head_mask_N[:, None, None]
        x_BTA = x_BNTH.swapaxes(1, 2).reshape(*x_BTD.shape[:2], -1)
        return self.linear(f"{name}.out_proj", x_BTA), weights_BNTT

    def heads(self, x_BTA: Array) -> Array:
        """The heads that the layer has, which may be fewer than those of the config."""
        return x_BTA.reshape(*x_BTA.shape[:2], -1, self.config.head_size).swapaxes(1, 2)

    def linear(self, name: str, x: Array) -> Array:
        """x W^T + b; the identity where the model has no such weight (projections), no bias where it has none."""
        if f"{name}.weight" not in self.weights:
            return x
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def layer_norm(self, name: str, x: Array) -> Array:
        mean = x.mean(-1, keepdims=True)
        variance = ((x - mean) ** 2).mean(-1, keepdims=True)
        x = (x - mean) / np.sqrt(variance + LAYER_NORM_EPS)
        return x * self.weights.get(f"{name}.weight", 1) + self.weights.get(f"{name}.bias", 0)

    # -- heads --------------------------------------------------------------------------------------------------------

    def logits(self, hidden_BTE: Array) -> Array:
        """Next-token logits [B, T, V]: the word embeddings again, or `lm_head`; no bias."""
        head = "decoder.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self.linear(head, hidden_BTE)

    def classify(self, hidden_BTE: Array, attention_mask=None) -> Array:
        """Label logits [B, K] at the last real token of each row; zero for a row without one."""
        real_BT = np.ones(hidden_BTE.shape[:2], bool) if attention_mask is None else np.asarray(attention_mask) != 0
        last_B = hidden_BTE.shape[1] - 1 - real_BT[:, ::-1].argmax(1)
        pooled_BE = np.where(real_BT.any(1, keepdims=True), hidden_BTE[np.arange(len(last_B)), last_B], 0)
        return self.linear("score", pooled_BE)

    def answer_spans(self, hidden_BTE: Array, attention_mask=None) -> tuple[Array, Array]:
        """Start and end logits [B, T] each; zero at padding."""
        real_BT = np.ones(hidden_BTE.shape[:2], bool) if attention_mask is None else np.asarray(attention_mask) != 0
        logits_BT2 = np.where(real_BT[..., None], self.linear("qa_outputs", hidden_BTE), 0)
        return logits_BT2[..., 0], logits_BT2[..., 1]


def number_documents(segment_ids: Array, real_BT: Array) -> Array:
    """The number of each token's document in its row [B, T]: a new one begins where a real token has another id than
    the real token before it."""
    documents_BT = np.zeros(real_BT.shape, int)
    for row, ids_T, real_T in zip(documents_BT, np.asarray(segment_ids), real_BT, strict=True):
        row[real_T] = np.cumsum(np.diff(ids_T[real_T], prepend=ids_T[real_T][:1]) != 0)
    return documents_BT


def masked_softmax(scores: Array, attend: Array) -> Array:
    """Softmax over the last axis where `attend` is True; a row that may attend to nothing is all zero."""
    scores = np.where(attend, scores, -np.inf)
    exponentials = np.exp(scores - np.where(attend.any(-1, keepdims=True), scores.max(-1, keepdims=True), 0))
    return exponentials / np.maximum(exponentials.sum(-1, keepdims=True), np.finfo(np.float64).tiny)


def cross_entropy(logits: Array, labels: Array, counted: Array) -> float:
    """The mean of -log softmax(logits)[label] over the places where `counted`; 0 where there are none."""
    logits, labels = logits[counted], np.asarray(labels)[counted]
    if not len(labels):
        return 0.0
    shifted = logits - logits.max(-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def causal_lm_loss(logits_BTV: Array, labels_BT: Array, attention_mask=None, segment_ids=None) -> float:
    """Token t predicts label t + 1. Not counted: labels of -100, predictions at padding, or of another document."""
    counted = np.asarray(labels_BT)[:, 1:] != IGNORED_LABEL
    if attention_mask is not None:
        counted = counted & (np.asarray(attention_mask)[:, :-1] != 0)
    if segment_ids is not None:
        counted = counted & (np.asarray(segment_ids)[:, 1:] == np.asarray(segment_ids)[:, :-1])
    return cross_entropy(logits_BTV[:, :-1], np.asarray(labels_BT)[:, 1:], counted)


def question_answering_loss(start_BT: Array, end_BT: Array, starts_B, ends_B, attention_mask=None) -> float:
    """The mean of the losses of start and end, each a softmax over the real positions of its row.

    A position of -100, one at padding, or one beyond the sequence (a truncated answer) is not counted.
    """
    real_BT = np.ones(start_BT.shape, bool) if attention_mask is None else np.asarray(attention_mask) != 0
    start_BT, end_BT = (np.where(real_BT, x, -1e300) for x in (start_BT, end_BT))
    losses = []
    for logits_BT, positions_B in ((start_BT, np.asarray(starts_B)), (end_BT, np.asarray(ends_B))):
        counted = (real_BT & (positions_B[:, None] == np.arange(start_BT.shape[1]))).any(1)
        losses.append(cross_entropy(logits_BT, positions_B, counted))
    return sum(losses) / 2


def classification_loss(logits_BK: Array, labels: Array, problem_type: str) -> float:
    """Cross entropy, mean squared error, or binary cross entropy with logits, by `problem_type`."""
    labels = np.asarray(labels)
    if problem_type == "single_label_classification":
        return cross_entropy(logits_BK, labels.reshape(-1), labels.reshape(-1) != IGNORED_LABEL)
    if problem_type == "regression":
        return float(((logits_BK.reshape(-1) - labels.reshape(-1)) ** 2).mean())
    return float((np.logaddexp(0, logits_BK) - logits_BK * labels).mean())
