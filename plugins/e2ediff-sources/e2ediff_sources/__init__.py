"""Packed images as data sources of e2ediff: zips, tars, Parquet, Arrow, arrays."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl


@hookimpl
def register(add: Callable[[str, str, str], None]) -> None:
    """Name the sources; a class is imported when a recipe names it."""
    add("sources", "archive", "e2ediff_sources.archive:Archive")
    add("sources", "class_tars", "e2ediff_sources.tars:ClassTars")
    add("sources", "tar_shards", "e2ediff_sources.tars:TarShards")
    add("sources", "parquet", "e2ediff_sources.parquet:Parquet")
    add("sources", "arrow", "e2ediff_sources.arrow:Arrow")
    add("sources", "arrays", "e2ediff_sources.arrays:Arrays")
