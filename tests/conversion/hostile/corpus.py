"""The table of all cases."""

from hostile import (
    config_cases,
    container_cases,
    h5_cases,
    index_cases,
    msgpack_cases,
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
    msgpack_cases,
    h5_cases,
    index_cases,
    config_cases,
    value_cases,
    output_cases,
)
CASES: list[Case] = [case for module in MODULES for case in module.CASES]
