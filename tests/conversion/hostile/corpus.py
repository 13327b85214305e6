"""The table of all cases."""

from hostile import (
    bundle_cases,
    config_cases,
    container_cases,
    ctranslate2_cases,
    h5_cases,
    index_cases,
    keras_hub_cases,
    metaseq_cases,
    msgpack_cases,
    orbax_cases,
    output_cases,
    safetensors_cases,
    torch_bin_cases,
    value_cases,
)
from hostile.case import Case

MODULES = (
    container_cases,
    safetensors_cases,
    torch_bin_cases,
    metaseq_cases,
    msgpack_cases,
    h5_cases,
    keras_hub_cases,
    index_cases,
    bundle_cases,
    orbax_cases,
    ctranslate2_cases,
    config_cases,
    value_cases,
    output_cases,
)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]
