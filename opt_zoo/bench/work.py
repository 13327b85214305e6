"""What a generation has to do at least, counted from the config: bytes to read for a step, operations of a prompt.

Counted is what no implementation can avoid: each weight is read once a step, the filled part of the cache once; of the
tables of tokens and positions a step reads single rows, which are left out; the head looks at the last position alone;
causal attention does half of its square. Sums of a product count as two operations. Norms, activations and softmax are
left out: below one percent from opt-125m on.
"""

import math
from typing import NamedTuple

from opt_core.config import OPTConfig
from opt_core.schema import weights

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Work(NamedTuple):
    """Of one step for each row, in the middle of the new tokens, and of one prompt."""

    step_bytes: float
    step_flops: float
    prefill_bytes: float  # weights once, and the cache written
    prefill_flops: float


def work_of(config: OPTConfig, dtype: str, batch: int, prompt_tokens: int, new_tokens: int) -> Work:
    """The least work of generating `new_tokens` after prompts of `prompt_tokens` without padding."""
    all_positions, last_position = _matrix_sizes(config)
    width = config.num_hidden_layers * config.hidden_size
    slots = prompt_tokens + new_tokens / 2
    weight_bytes = parameters_read(config) * ITEM_BYTES[dtype]
    slot_bytes = 2 * width * batch * ITEM_BYTES[dtype]  # a key and a value
    return Work(
        step_bytes=weight_bytes + slot_bytes * slots,
        step_flops=batch * (2 * (all_positions + last_position) + 4 * width * slots),
        prefill_bytes=weight_bytes + slot_bytes * prompt_tokens,
        prefill_flops=batch * (2 * all_positions * prompt_tokens + 2 * last_position + 2 * width * prompt_tokens**2),
    )


def parameters_read(config: OPTConfig) -> int:
    """All but the tables of which a step reads rows; a table that is the head as well is read."""
    tables = {"decoder.embed_positions.weight"}
    if not config.tie_word_embeddings:
        tables.add("decoder.embed_tokens.weight")
    return sum(math.prod(weight.shape(config)) for weight in weights(config) if weight.name not in tables)


def _matrix_sizes(config: OPTConfig) -> tuple[int, int]:
    """Parameters of the matrices that every position passes, and of those that the last one does."""
    sizes = {weight.name: math.prod(weight.shape(config)) for weight in weights(config) if weight.kind == "linear"}
    sizes.pop("lm_head.weight", None)  # it may be tied, and then it is not stored
    last = sizes.pop("decoder.project_out.weight", 0) + config.vocab_size * config.word_embed_proj_dim
    return sum(sizes.values()), last
