"""Export one set of weights of a checkpoint as a plain safetensors file, and read its metadata."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import attrs
import safetensors
from torch import Tensor

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import CheckpointError
from e2ediff.latent import LatentContract
from e2ediff.store.manifest import Checkpoint, finite_json
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store
from e2ediff.store.tensor_file import pieces, size_of


def export(
    directory: RunDirectory,
    checkpoint: Checkpoint,
    weights: str,
    tensors: Mapping[str, Tensor],
    contract: LatentContract | None,
    place: Address,
) -> str:
    """Write a set of weights to a file that safetensors' `load_file` reads, by names of tensors.

    Args:
        directory: The run's.
        checkpoint: The run's checkpoint.
        weights: What they are called: `online`, `target`, an average, or a width as `ema:0.08`.
        tensors: The weights, by their names in the network.
        contract: What their latents are; None where the checkpoint does not say.
        place: The file, replaced if it exists; its name ends with `.safetensors`.

    Returns:
        The file's sha256.

    Raises:
        CheckpointError: The file has another suffix.
        ResourceError: The file cannot be written.
    """
    text = addresses.plain(place)
    folder, _, file = text.rpartition("/")
    if not file.endswith(".safetensors"):
        raise CheckpointError(f"{text}: expected a name that ends with .safetensors.")
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
    digest = hashlib.sha256()

    # Names that share memory in the network are several tensors in the file.
    def hashed() -> Iterator[bytes | memoryview]:
        for piece in pieces(tensors, metadata):
            digest.update(piece)
            yield piece

    store = Store(folder or ("/" if text.startswith("/") else os.curdir), "FILE")
    store.write(file, hashed(), size_of(tensors))
    return digest.hexdigest()


def latent_of(place: Address) -> LatentContract | None:
    """Return the latent contract in the metadata of an exported file; None without one."""
    try:
        with safetensors.safe_open(addresses.plain(place), "pt") as file:
            metadata: Mapping[str, str] = file.metadata() or {}
        return LatentContract.read(finite_json(metadata["latent"]))
    except (OSError, safetensors.SafetensorError, LookupError, ValueError, TypeError):
        return None  # an address that is not local, another format, or a file of others
