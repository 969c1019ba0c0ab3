"""What the machine can do: products of matrices, and copies.

    python benchmarks/speed/ceiling.py
    python benchmarks/speed/ceiling.py --device cuda --json

Every other speed is a share of one of these, measured in the same process.
"""

from __future__ import annotations

import statistics

import torch
from measuring import Report, benchmark, copying, matmul


@benchmark(rounds=5)
def main(report: Report, rounds: int) -> None:
    """Measure each ceiling in every round."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found: dict[str, list[float]] = {name: [] for name in [*kinds, "copy"]}
    for _ in range(rounds):
        for name, dtype in kinds.items():
            slow = report.device.type == "cpu" and dtype == torch.bfloat16
            found[name].append(matmul(report.device, dtype, 256 if slow else 0))
        found["copy"].append(copying(report.device))
    for name, rates in found.items():
        unit = "GB/s" if name == "copy" else "GFLOP/s"
        best, middle = max(rates) / 1e9, statistics.median(rates) / 1e9
        report.row(f"{name:<9} {best:9.1f} {unit}, median {middle:.1f}",
                   what=name, unit=unit, best=best, median=middle)  # fmt: skip


if __name__ == "__main__":
    main()
