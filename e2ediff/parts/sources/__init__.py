"""Sources of images, one family a file."""

from __future__ import annotations

from e2ediff.parts.sources.fashion import FASHION_CLASSES, FashionMNIST
from e2ediff.parts.sources.folder import ImageFolder
from e2ediff.parts.sources.synthetic import Synthetic

__all__ = [
    "FASHION_CLASSES",
    "FashionMNIST",
    "ImageFolder",
    "Synthetic",
]
