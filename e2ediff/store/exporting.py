"""Export one set of weights of a checkpoint as a plain safetensors file, and read its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping

import attrs
import safetensors
from safetensors.torch import save as encode

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import CheckpointError
from e2ediff.latent import LatentContract
from e2ediff.store.manifest import Checkpoint, finite_json
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store


def export(directory: RunDirectory, checkpoint: Checkpoint, weights: str, place: Address) -> str:
    """Write a set of weights to a file that safetensors' `load_file` reads, by names of tensors.

    Args:
        directory: The run's.
        checkpoint: The run's checkpoint.
        weights: `online`, `target`, or the name of an average.
        place: The file, replaced if it exists; its name ends with `.safetensors`.

    Returns:
        The file's sha256.

    Raises:
        CheckpointError: The checkpoint has no such weights, or they are damaged, or the file has
            another suffix.
        ResourceError: The file cannot be written.
    """
    text = addresses.plain(place)
    folder, _, file = text.rpartition("/")
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{text}: expected a name that ends with .safetensors.")
    contract = checkpoint.latent(weights) if weights in checkpoint.files else None
    metadata = {
        "format": "pt",
        "run": str(directory.environment().get("name", "")),
        "recipe_sha256": hashlib.sha256(directory.resolved().encode()).hexdigest(),
        "checkpoint": checkpoint.name,
        "weights": weights,
        "step": str(checkpoint.step),
        "images": str(checkpoint.images),
        "latent": json.dumps(attrs.asdict(contract)) if contract else "",
    }
    # Names that share memory in the network are several tensors in the file.
    tensors = {name: t.clone() for name, t in checkpoint.tensors(weights).items()}
    data = encode(tensors, metadata)
    Store(folder or ("/" if text.startswith("/") else os.curdir), "FILE").write(file, data)
    return hashlib.sha256(data).hexdigest()


def latent_of(place: Address) -> LatentContract | None:
    """Return the latent contract in the metadata of an exported file; None without one."""
    try:
        with safetensors.safe_open(addresses.plain(place), "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
        return LatentContract.read(finite_json(metadata["latent"]))
    except (OSError, safetensors.SafetensorError, LookupError, ValueError, TypeError):
        return None  # an address that is not local, another format, or a file of others
