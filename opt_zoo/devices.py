"""Devices by name: memory, bandwidth and rate of matrix products as their makers publish them.

Rates are those without sparsity. Half precision is bfloat16, of a V100 float16, with sums in float32; float32 is plain
float32 and no TF32, which this project does not use unasked; None where no rate is published. Sources, of each row: the
data sheets of NVIDIA (V100 2020, A100 2021, H100 and H200 2024, L4 and L40S 2023) and
https://docs.cloud.google.com/tpu/docs (v5e, v6e).
"""

from typing import NamedTuple

DEFAULT = "a100-80gb"  # OPT was trained on 992 of them (arXiv:2205.01068, section 2.5)


class Device(NamedTuple):
    """Bytes, bytes per second, operations per second."""

    name: str
    memory: int
    bandwidth: float | None = None
    half_flops: float | None = None
    float32_flops: float | None = None

    def flops_of(self, dtype: str) -> float | None:
        return self.float32_flops if dtype == "float32" else self.half_flops


def _device(name: str, gigabytes: int, gigabytes_per_second: float, half: float, float32: float | None) -> Device:
    teraflops = None if float32 is None else float32 * 1e12
    return Device(name, gigabytes * 10**9, gigabytes_per_second * 1e9, half * 1e12, teraflops)


DEVICES = {
    device.name: device
    for device in (
        _device("v100-32gb", 32, 900, 125, 15.7),
        _device("a100-40gb", 40, 1555, 312, 19.5),
        _device("a100-80gb", 80, 2039, 312, 19.5),
        _device("h100", 80, 3350, 989, 67),
        _device("h100-pcie", 80, 2000, 756, 51),
        _device("h200", 141, 4800, 989, 67),
        _device("l4", 24, 300, 121, 30.3),
        _device("l40s", 48, 864, 362, 91.6),
        _device("tpu-v5e", 16, 819, 197, None),
        _device("tpu-v6e", 32, 1638, 918, None),
    )
}
