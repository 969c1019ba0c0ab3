"""Times every attention kernel that runs here, forward and backward.

    python benchmarks/attention.py
    python benchmarks/attention.py --tokens 16 --heads 2 --batch 2 --precision float32

The CPU has torch's kernel alone, which is the one that the tests run; on CUDA xformers and
torch's kernels compete. A kernel that does not run, or disagrees with the formula, is listed with
the reason. Prints a table, and the same as one line of JSON.
"""

from __future__ import annotations

import json

import click
import torch

from e2ediff.model.build import DTYPES, choose_device
from e2ediff.nn.attention import (
    both_ways,
    candidates,
    check_agreement,
    random_inputs,
    seconds_of,
)
from e2ediff.nn.flash import in_place


@click.command()
@click.option("--tokens", default=(64, 256, 257, 512), multiple=True, show_default=True)
@click.option("--heads", default=12, show_default=True)
@click.option("--head-dim", default=64, show_default=True)
@click.option("--batch", default=256, show_default=True)
@click.option("--precision", default="bfloat16", type=click.Choice(list(DTYPES)))
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--rounds", default=20, show_default=True)
def main(
    tokens: tuple[int, ...],
    heads: int,
    head_dim: int,
    batch: int,
    precision: str,
    device: str,
    rounds: int,
) -> None:
    """Time all kernels at each number of tokens; TFLOP/s count 14 B H N^2 K a pass."""
    place, dtype = choose_device(device), DTYPES[precision]
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    click.echo(f"{name}, torch {torch.__version__}, {precision}, batch {batch}, {heads} heads "
               f"of {head_dim}")  # fmt: skip
    found = []
    for n in tokens:
        inputs = random_inputs(batch, n, heads, head_dim, place, dtype)
        flops = 14 * batch * heads * n**2 * head_dim  # 4 forward, 10 with recomputed scores back
        for kernel, load in candidates().items():
            row: dict[str, object] = {"tokens": n, "kernel": kernel}
            try:
                attend = load()
                with in_place(kernel):
                    check_agreement(attend, place, dtype, head_dim, n)
                    taken = seconds_of(
                        lambda attend=attend, inputs=inputs: both_ways(attend, *inputs),  # type: ignore[misc]
                        place,
                        rounds,
                    )
                row |= {"milliseconds": round(1e3 * taken, 4)}
                said = f"{1e3 * taken:9.3f} ms  {flops / taken / 1e12:7.2f} TFLOP/s"
            except (ImportError, OSError, NotImplementedError, ValueError, RuntimeError) as error:
                row["refused"] = str(error).strip().partition("\n")[0]
                said = f"refused: {row['refused']}"
            found.append(row)
            click.echo(f"{n:6d} tokens  {kernel:<15} {said}")
    click.echo(json.dumps({"device": name, "torch": str(torch.__version__), "rows": found}))


if __name__ == "__main__":
    main()
