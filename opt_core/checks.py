"""Checks of what a user passes to a model, written once so that the three backends say the same words.

Backends pass shapes always, and values (NumPy arrays) where they are known: eagerly they are, under jit, XLA or
`torch.compile` they are not. `model.check_inputs(...)` runs the same checks outside the compiled function.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opt_core.config import OPTConfig
from opt_core.errors import InputError, raise_if

# What every backend has on every device: step by step, and the fused path of the framework. A backend may have more.
ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


class Known(NamedTuple):
    """An argument: its shape, and its values where they are known outside a compiled function."""

    shape: tuple[Any, ...]  # integers; None where a traced function does not know a size
    dtype: str  # NumPy's name, "int64"
    values: Any = None  # a NumPy array, or None


class KnownCache(NamedTuple):
    """A cache: rows, capacity (None: it grows), and the real tokens of each row where they are known."""

    batch_size: int | None
    capacity: int | None
    lengths: np.ndarray | None = None
    layers: tuple[tuple[int | None, int | None], ...] | None = None  # heads and head size of each layer


def check_inputs(
    config: OPTConfig,
    *,
    input_ids: Known | None = None,
    attention_mask: Known | None = None,
    position_ids: Known | None = None,
    inputs_embeds: Known | None = None,
    cache: KnownCache | None = None,
    logits_to_keep: int = 0,
    segment_ids: Known | None = None,
    use_cache: bool | None = None,
    head_mask: Known | None = None,
) -> None:
    """Raises one InputError that lists everything wrong with the arguments of a call."""
    problems = _source_problems(config, input_ids, inputs_embeds)
    source = input_ids if input_ids is not None else inputs_embeds
    if not problems and source is not None:
        batch, length = source.shape[:2]
        problems += _mask_problems(attention_mask, batch, length, cache)
        problems += _cache_problems(config, cache, batch)
        problems += _segment_problems(segment_ids, batch, length, cache, use_cache)
        real = None if problems else _real_tokens(attention_mask, source)
        problems += [] if problems else _length_problems(config, real, length, attention_mask, cache, segment_ids)
        problems += _position_problems(config, position_ids, batch, length, real)
        problems += _token_problems(config, input_ids, real)
    problems += _head_mask_problems(head_mask, config)
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, (int, np.integer)) or logits_to_keep < 0:
        problems.append(f"logits_to_keep: expected an integer of at least 0 (0: all), got {logits_to_keep!r}")
    raise_if(InputError, "invalid arguments", problems)


def _source_problems(config: OPTConfig, input_ids: Known | None, inputs_embeds: Known | None) -> list[str]:
    if (input_ids is None) == (inputs_embeds is None):
        got = "neither" if input_ids is None else "both"
        return [f"input_ids, inputs_embeds: expected exactly one of them, got {got}"]
    if inputs_embeds is not None:
        width = config.word_embed_proj_dim
        if len(inputs_embeds.shape) != 3 or inputs_embeds.shape[2] != width or inputs_embeds.shape[1] == 0:
            return [
                f"inputs_embeds: expected shape (batch, tokens, {width}) with at least one token, "
                f"got {inputs_embeds.shape}"
            ]
        return []
    assert input_ids is not None
    if not _is_integer(input_ids.dtype):
        return [f"input_ids: expected an integer dtype, got {input_ids.dtype}"]
    if len(input_ids.shape) != 2 or input_ids.shape[1] == 0:
        return [f"input_ids: expected shape (batch, tokens) with at least one token, got {input_ids.shape}"]
    return []


def _mask_problems(mask: Known | None, batch, length, cache: KnownCache | None) -> list[str]:
    if mask is None:
        return []
    if len(mask.shape) != 2 or _differ(mask.shape[0], batch) or not _mask_length_fits(mask.shape[1], length, cache):
        or_longer = "" if cache is None else f", or with the columns already cached before these {length}"
        return [f"attention_mask: expected shape ({batch}, {length}){or_longer}, got {mask.shape}"]
    if mask.values is None:
        return []
    if not np.isin(mask.values, (0, 1)).all():
        wrong = mask.values[~np.isin(mask.values, (0, 1))].flat[0]
        return [f"attention_mask: expected 1 for real tokens and 0 for padding, got {wrong}"]
    if cache is not None and cache.lengths is not None and mask.shape[1] > length:
        cached_B = mask.values[:, : mask.shape[1] - length].sum(1).astype(int)
        if (cached_B != cache.lengths).any():
            return [
                f"attention_mask: its columns before the last {length} hold {cached_B.tolist()} real tokens, "
                f"the cache holds {cache.lengths.tolist()}"
            ]
    return []


def _mask_length_fits(mask_length, length, cache: KnownCache | None) -> bool:
    if mask_length is None or length is None:
        return True
    return mask_length == length or (cache is not None and mask_length > length)


def _cache_problems(config: OPTConfig, cache: KnownCache | None, batch) -> list[str]:
    problems = []
    if cache is not None and _differ(cache.batch_size, batch):
        problems.append(f"past_key_values: expected a cache of {batch} rows, got {cache.batch_size}")
    if cache is None or cache.layers is None:
        return problems
    layers, size = config.num_hidden_layers, config.head_size
    if len(cache.layers) != layers:
        problems.append(f"past_key_values: expected a cache of {layers} layers, got {len(cache.layers)}")
    for layer, got in enumerate(cache.layers):
        heads = config.heads_of(layer)
        if _differ(got[0], heads) or _differ(got[1], size):
            where = "" if config.has_all_heads else f" in layer {layer}"
            got_text = f"{got[0]} of size {got[1]}"
            problems.append(f"past_key_values: expected a cache of {heads} heads of size {size}{where}, got {got_text}")
            break
    return problems


def check_head_mask(head_mask: Known, config: OPTConfig) -> None:
    """Raises unless `head_mask` has one number for each head as the config numbers them: [L, N], or [N] for all layers.

    Heads that are pruned keep their column, which nothing looks at.
    """
    raise_if(InputError, "invalid arguments", _head_mask_problems(head_mask, config))


def _head_mask_problems(head_mask: Known | None, config: OPTConfig) -> list[str]:
    if head_mask is None:
        return []
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shape = head_mask.shape
    if len(shape) not in (1, 2) or any(map(_differ, shape, (layers, heads)[-len(shape) :])):
        return [f"head_mask: expected shape ({layers}, {heads}), or ({heads},) for all layers, got {shape}"]
    if not _is_integer(head_mask.dtype) and not head_mask.dtype.startswith(("float", "bfloat")):
        return [f"head_mask: expected numbers, got {head_mask.dtype}"]
    if head_mask.values is not None:
        masks_LN = np.broadcast_to(np.asarray(head_mask.values, np.float64), (layers, heads))
        for layer, mask_N in enumerate(masks_LN):
            if not np.isfinite(remaining := mask_N[config.remaining_heads(layer)]).all():
                wrong = remaining[~np.isfinite(remaining)][0]
                return [f"head_mask: expected finite numbers, got {wrong} in layer {layer}"]
    return []


def _real_tokens(mask: Known | None, source: Known) -> np.ndarray | None:
    """True where a token of this call is real; None where that is not known."""
    batch, length = source.shape[:2]
    if batch is None or length is None or (mask is not None and mask.values is None):
        return None
    if mask is None:
        return np.ones((batch, length), bool)
    return mask.values[:, mask.shape[1] - length :] != 0


def _segment_problems(segments: Known | None, batch, length, cache: KnownCache | None, use_cache) -> list[str]:
    if segments is None:
        return []
    problems = []
    if not _is_integer(segments.dtype):
        problems.append(f"segment_ids: expected an integer dtype, got {segments.dtype}")
    shape = segments.shape
    if len(shape) != 2 or _differ(shape[0], batch) or _differ(shape[1], length):
        problems.append(f"segment_ids: expected shape ({batch}, {length}), got {shape}")
    if cache is not None:
        problems.append("segment_ids: expected no past_key_values beside it, a cache has one document a row; got both")
    if use_cache:
        problems.append("segment_ids: expected use_cache=False beside it, a cache has one document a row; got True")
    return problems


def _length_problems(config: OPTConfig, real, length, mask, cache: KnownCache | None, segments) -> list[str]:
    if segments is not None:
        return _document_problems(config, real, segments)
    if mask is None and cache is None:
        too_long = length is not None and length > config.max_position_embeddings
        return [_too_long(config, length)] if too_long else []
    cached_B = np.zeros(1, int) if cache is None else cache.lengths
    if cached_B is None or real is None:
        return []
    longest = int(np.max(cached_B + real.sum(1), initial=0))
    if longest > config.max_position_embeddings:
        return [_too_long(config, longest)]
    needed = int(np.max(cached_B, initial=0)) + length  # padding columns take a slot until the next call reuses it
    if cache is not None and cache.capacity is not None and needed > cache.capacity:
        return [f"past_key_values: its capacity is {cache.capacity} tokens a row, this call needs {needed}"]
    return []


def _document_problems(config: OPTConfig, real, segments: Known) -> list[str]:
    if real is None or segments.values is None:
        return []
    ids = [ids_T[real_T] for ids_T, real_T in zip(segments.values, real, strict=True)]
    ends = [np.flatnonzero(np.diff(ids_T, append=ids_T[-1:] + 1)) for ids_T in ids]
    longest = max((int(np.diff(ends_T, prepend=-1).max(initial=0)) for ends_T in ends), default=0)
    return [_too_long(config, longest, "document")] if longest > config.max_position_embeddings else []


def _too_long(config: OPTConfig, length: int, unit: str = "row") -> str:
    return (
        f"sequence: expected at most max_position_embeddings = {config.max_position_embeddings} real tokens a {unit}, "
        f"got {length}"
    )


def _position_problems(config: OPTConfig, positions: Known | None, batch, length, real) -> list[str]:
    if positions is None:
        return []
    if not _is_integer(positions.dtype):
        return [f"position_ids: expected an integer dtype, got {positions.dtype}"]
    shape = positions.shape
    if len(shape) != 2 or (shape[0] != 1 and _differ(shape[0], batch)) or _differ(shape[1], length):
        return [f"position_ids: expected shape ({batch}, {length}) or (1, {length}), got {shape}"]
    if positions.values is None or real is None:
        return []
    values = np.broadcast_to(positions.values, real.shape)
    return _range_problems("position_ids", values, real, config.max_position_embeddings, "max_position_embeddings")


def _token_problems(config: OPTConfig, ids: Known | None, real) -> list[str]:
    """Padding ids are looked up too, so they must be in range as well."""
    if ids is None or ids.values is None:
        return []
    return _range_problems("input_ids", ids.values, np.ones(ids.shape, bool), config.vocab_size, "vocab_size")


def _range_problems(name: str, values: np.ndarray, counted: np.ndarray, bound: int, bound_name: str) -> list[str]:
    wrong = counted & ((values < 0) | (values >= bound))
    if not wrong.any():
        return []
    row, column = np.argwhere(wrong)[0]
    count = int(wrong.sum())
    more = "" if count == 1 else f", the first of {count}"
    return [
        f"{name}: expected 0 to {bound - 1} ({bound_name} = {bound}), "
        f"got {values[row, column]} at row {row}, column {column}{more}"
    ]


def check_labels(name: str, labels: Known, shape: Sequence[int | None], classes: int | None) -> None:
    """Labels of class indices: the shape, an integer dtype, and each from 0 to `classes` - 1 or -100."""
    problems = []
    if len(labels.shape) != len(shape) or any(
        _differ(got, want) for got, want in zip(labels.shape, shape, strict=True)
    ):
        problems.append(f"{name}: expected shape {tuple(shape)}, got {labels.shape}")
    if classes is not None and not _is_integer(labels.dtype):
        problems.append(f"{name}: expected an integer dtype, got {labels.dtype}")
    elif classes is not None and labels.values is not None:
        wrong = (labels.values != -100) & ((labels.values < 0) | (labels.values >= classes))
        if wrong.any():
            got = labels.values[wrong].flat[0]
            problems.append(f"{name}: expected 0 to {classes - 1}, or -100 to ignore, got {got}")
    raise_if(InputError, "invalid arguments", problems)


def check_label_values(config: OPTConfig, task: str, given: Mapping[str, Known]) -> None:
    """The labels of a batch, before a compiled function that cannot see them; their shapes it checks itself."""
    classes = {"causal-lm": config.vocab_size, "sequence-classification": config.num_labels}.get(task, 2**63 - 1)
    for name in ("labels", "start_positions", "end_positions"):
        if (labels := given.get(name)) is None:
            continue
        if task != "sequence-classification" or config.problem_type_of(labels.dtype) == "single_label_classification":
            check_labels(name, labels, labels.shape, classes)


def check_has_loss(out) -> None:
    """Raises an InputError for the outputs of a call that had no labels."""
    if getattr(out, "loss", None) is None:
        names = "start_positions, end_positions" if hasattr(out, "start_logits") else "labels"
        raise InputError("batch", [f"{names}: missing, of which the loss is made"])


def check_accumulate(accumulate: int) -> None:
    """Raises an InputError unless a batch can be cut into so many parts."""
    if not isinstance(accumulate, int) or isinstance(accumulate, bool) or accumulate < 1:
        raise InputError("Trainer", [f"accumulate: expected an integer of at least 1, got {accumulate!r}"])


def check_config(config) -> None:
    """Raises unless `config` is an `OPTConfig` with nothing wrong in it."""
    if isinstance(config, OPTConfig):
        config.check()
        return
    got = f"{type(config).__module__}.{type(config).__qualname__}".removeprefix("builtins.")
    raise InputError("invalid arguments", [f"config: expected an opt_core.OPTConfig, got {got}"])


def check_cache(cache, kind: type) -> None:
    """Raises unless `cache` is of the `kind` that the backend makes."""
    if not isinstance(cache, kind):
        problem = f"past_key_values: expected what an earlier call or init_cache returned, got {type(cache).__name__}"
        raise InputError("invalid arguments", [problem])


def array_of(x) -> np.ndarray:
    """A NumPy array of numbers, in the byte order of this machine, from one or from nested lists."""
    try:
        array = np.asarray(x)
    except ValueError:  # rows of different lengths
        array = np.asarray(None)
    if array.dtype.kind in "OSU":
        got = " ".join(repr(x).split())
        problem = f"expected numbers, in an array or in nested lists of equal length, got {got[:60]}"
        problem += "; pass what a tokenizer returned as **inputs" if isinstance(x, Mapping) else ""
        raise InputError("invalid arguments", [problem])
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_choice(name: str, value, choices: Iterable) -> None:
    """Raises an InputError when `value` is none of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise InputError(
            "invalid arguments", [f"{name}: expected one of {', '.join(map(str, choices))}, got {value!r}"]
        )


def _differ(got, want) -> bool:
    """Two sizes disagree; a size unknown in a traced function agrees with all."""
    return got is not None and want is not None and got != want


def _is_integer(dtype: str) -> bool:
    return dtype.startswith(("int", "uint", "bool"))
