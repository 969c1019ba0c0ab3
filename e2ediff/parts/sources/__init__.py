"""Sources of images, one family a file."""

from __future__ import annotations

from e2ediff.parts.sources.arrays import Arrays
from e2ediff.parts.sources.fashion import FASHION_CLASSES, FashionMNIST
from e2ediff.parts.sources.folder import Archive, ImageFolder
from e2ediff.parts.sources.parquet import Parquet
from e2ediff.parts.sources.shards import Shards
from e2ediff.parts.sources.synthetic import Synthetic
from e2ediff.parts.sources.tars import ClassTars, TarShards

__all__ = [
    "FASHION_CLASSES",
    "Archive",
    "Arrays",
    "ClassTars",
    "FashionMNIST",
    "ImageFolder",
    "Parquet",
    "Shards",
    "Synthetic",
    "TarShards",
]
