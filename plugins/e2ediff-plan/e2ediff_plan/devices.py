"""Devices: their peak rate of matrix products, and their memory."""

from __future__ import annotations

import os
from collections.abc import Mapping

import attrs

RESERVE = 0.08
"""Share of a GPU's memory that is left to its context, libraries and fragmentation."""


@attrs.frozen
class Device:
    """Peak FLOP/s of dense matrix products by precision, and memory in bytes, with source."""

    name: str
    flops: Mapping[str, float]
    memory: float
    source: str

    @property
    def usable(self) -> float:
        """Return the bytes that a run may use."""
        return self.memory if self.name.startswith("cpu") else self.memory * (1 - RESERVE)


def _gpu(name: str, bf16: float, fp32: float, memory: float, source: str) -> Device:
    flops = {"bfloat16": bf16 * 1e12, "float32": fp32 * 1e12}
    return Device(name, flops, memory * 1e9, source)


_SHEET = "NVIDIA's data sheet, dense (half of the figure with sparsity)"
GPUS = {
    "h200": _gpu("H200 SXM 141 GB", 989, 67, 141, _SHEET),
    "h100": _gpu("H100 SXM 80 GB", 989, 67, 80, _SHEET),
    "a100": _gpu("A100 SXM 80 GB", 312, 19.5, 80, _SHEET),
    "l40s": _gpu("L40S 48 GB", 362, 91.6, 48, _SHEET),
    "4090": _gpu(
        "GeForce RTX 4090 24 GB", 165.2, 82.6, 24,
        "NVIDIA's Ada white paper, dense, accumulating in float32",
    ),
}  # fmt: skip
NAMES = (*GPUS, "cpu", "measured")

# One core of a CPU with AVX2 and without bfloat16 instructions, matrix products through MKL.
_CORE = {"float32": 85e9, "bfloat16": 7.5e9}


def cpu() -> Device:
    """Describe this machine: its cores at a typical rate, and its memory."""
    cores = os.cpu_count() or 1
    flops = {kind: rate * cores for kind, rate in _CORE.items()}
    source = (
        f"{cores} cores of 85 GFLOP/s in float32 and 7.5 in bfloat16, as measured on one AVX2 "
        "core; `--device measured` measures yours"
    )
    return Device(f"cpu, {cores} cores", flops, memory_of_machine(), source)


def memory_of_machine() -> float:
    """Return the bytes of main memory."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
