"""Plugins for tests: real modules with real metadata, installed into folders of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
from command_line import OURS


@attrs.frozen
class Site:
    """A folder on Python's path, and the command line in a process that sees it."""

    path: Path
    cache: Path
    cwd: Path

    def install(
        self, name: str, source: str, *, version: str = "1.2", requires: str = "", entry: str = ""
    ) -> None:
        """A distribution with one module, whose entry point is called like it."""
        module = name.replace("-", "_")
        (self.path / f"{module}.py").write_text(source)
        info = self.path / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {requires}"] if requires else []
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[e2ediff]\n{entry or name} = {module}\n")

    def damage(self, name: str, about: bytes | None, entries: bytes) -> Path:
        """Metadata of these bytes, {name} in them replaced: METADATA and entry_points.txt."""
        info = self.path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        for file, said in (("METADATA", about), ("entry_points.txt", entries)):
            if said is not None:
                (info / file).write_bytes(said.replace(b"{name}", name.encode()))
        return info

    def python(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A Python process."""
        path = os.pathsep.join(filter(None, [str(self.path), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *words],
            env={
                **os.environ,
                "PYTHONPATH": path,
                "XDG_CACHE_HOME": str(self.cache),
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            cwd=self.cwd,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def e2ediff(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command line."""
        return self.python("-m", "e2ediff", *words, **environment)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    folders = [tmp_path / name for name in ("site", "cache", "work")]
    for folder in folders:
        folder.mkdir()
    return Site(*folders)


@pytest.fixture
def inside(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """The same, seen by this process, and forgotten by it afterwards."""
    monkeypatch.syspath_prepend(str(site.path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(site.cache))
    monkeypatch.setenv("E2EDIFF_BLOCK", OURS)
    monkeypatch.chdir(site.cwd)
    yield site
    for path in site.path.glob("*.py"):
        sys.modules.pop(path.stem, None)
