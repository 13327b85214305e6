"""The truth about OPT, without a framework: config, weight schema, float64 reference, tokenizer, generation rules."""

from opt_core.config import OPTConfig

__all__ = ["GenerationConfig", "OPTConfig", "OPTTokenizer"]


def __getattr__(name: str):
    if name == "OPTTokenizer":  # imports `tokenizers`, which a user of the config alone need not wait for
        from opt_core.tokenizer import OPTTokenizer

        return OPTTokenizer
    if name == "GenerationConfig":  # imports NumPy
        from opt_core.generation_config import GenerationConfig

        return GenerationConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
