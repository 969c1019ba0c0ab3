"""Encode tensors as a safetensors file piece by piece, without a second copy of them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce

import torch
from safetensors.torch import save as encode
from torch import Tensor

_PIECE = 1 << 22  # bytes
_SUMMED = 1 << 15  # elements that torch sums without waking other threads


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of tensors, without a file's header."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """Yield the content of a safetensors file of these tensors, byte for byte as the library.

    Of `metadata` the library changes the order from file to file; here it stays.
    A tensor that is contiguous and on the CPU is not copied, any other one only while its own
    bytes are yielded. Views that share memory are stored separately.

    Raises:
        SafetensorError, RuntimeError, ValueError, LookupError: The format has no such type.
    """
    # The library decides about the order and the names of types: it is given tensors without data.
    empty = encode({name: torch.empty(0, dtype=t.dtype) for name, t in tensors.items()})
    header, at = json.loads(empty[8 : 8 + int.from_bytes(empty[:8], "little")]), 0
    for name, entry in header.items():
        size = tensors[name].numel() * tensors[name].element_size()
        entry["shape"], entry["data_offsets"] = [*tensors[name].shape], [at, at + size]
        at += size
    about = {"__metadata__": {**metadata}} if metadata else {}
    text = json.dumps({**about, **header}, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in header:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]


def count_not_finite(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return how many values are nan or inf in each tensor that has any, in order.

    A sum is finite only if all its terms are, so values are counted one by one only where a sum
    is not, which large finite values can cause too. Works in one thread on a CPU, and waits once
    for another device if there is nothing to count.
    """
    sums: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            size = _SUMMED if tensor.device.type == "cpu" else tensor.numel()
            total = reduce(torch.add, (_wide(part).sum() for part in _parts(tensor, size)))
            sums.setdefault(tensor.device, []).append((name, total))
    suspects: set[str] = set()
    for found in sums.values():
        finite = torch.stack([total for _, total in found]).isfinite().tolist()
        suspects |= {name for (name, _), sound in zip(found, finite, strict=True) if not sound}
    counts = {
        name: sum(part.numel() - int(_wide(part).isfinite().sum()) for part in _parts(t, 1 << 20))
        for name, t in tensors.items()
        if name in suspects
    }
    return {name: count for name, count in counts.items() if count}


def _parts(tensor: Tensor, size: int) -> Sequence[Tensor]:
    return torch.split(tensor.detach().reshape(-1), max(1, size))


def _wide(part: Tensor) -> Tensor:
    """Return small floats as float32: float8 has no sum, and one in half precision overflows."""
    return part.float() if part.element_size() < 4 else part
