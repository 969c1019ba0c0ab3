"""Edit a checkpoint as someone does who computes every hash again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from e2ediff.store.manifest import sealed


def reseal(folder: Path) -> None:
    """Write the hashes and sizes of all files into the manifest, and its own hash."""
    path = folder / "MANIFEST.json"
    body = json.loads(path.read_text())
    body.pop("sha256", None)
    for file in body["files"]:
        data = (folder / file).read_bytes()
        body["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_bytes(sealed(body))


def edit_json(folder: Path, file: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change a file of JSON in place."""
    body = json.loads((folder / file).read_text())
    edit(body)
    text = json.dumps(body)
    if file == "MANIFEST.json":
        del body["sha256"]
        (folder / file).write_bytes(sealed(body))
        return
    (folder / file).write_text(text.replace("Infinity", "1e999"))
    reseal(folder)


def edit_tensors(folder: Path, file: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a file in place."""
    path = folder / f"{file}.safetensors"
    tensors = load(path.read_bytes())
    edit(tensors)
    path.write_bytes(save(tensors))
    reseal(folder)
