"""What tests of data share: a tree of class folders, and a cache of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import write_tree
from source_kinds import COUNTS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tree`, the images that every kind of source is made from."""
    place = tmp_path_factory.mktemp("sources")
    write_tree(place / "tree", COUNTS)
    return place


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; `usefixtures` keeps a test from the user's."""
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
