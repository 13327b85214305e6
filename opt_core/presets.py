"""The published sizes, as fields of `OPTConfig`.

Zhang et al., "OPT: Open Pre-trained Transformer Language Models" (arXiv:2205.01068), table 1; Taylor et al.,
"Galactica: A Large Language Model for Science" (arXiv:2211.09085), table 5.
"""

from typing import Any


def _size(width: int, layers: int, heads: int, **more) -> dict[str, Any]:
    return dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width, **more)


def _galactica(width: int, layers: int, heads: int) -> dict[str, Any]:
    return _size(width, layers, heads, vocab_size=50000, activation_function="gelu", bos_token_id=0)


PRESETS: dict[str, dict[str, Any]] = {
    "opt-125m": _size(768, 12, 12),
    "opt-350m": _size(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _size(2048, 24, 32),
    "opt-2.7b": _size(2560, 32, 32),
    "opt-6.7b": _size(4096, 32, 32),
    "opt-13b": _size(5120, 40, 40),
    "opt-30b": _size(7168, 48, 56),
    "opt-66b": _size(9216, 64, 72),
    "opt-175b": _size(12288, 96, 96),
    "galactica-125m": _galactica(768, 12, 12),
    "galactica-1.3b": _galactica(2048, 24, 32),
    "galactica-6.7b": _galactica(4096, 32, 32),
    "galactica-30b": _galactica(7168, 48, 56),
    "galactica-120b": _galactica(10240, 96, 80),
}
