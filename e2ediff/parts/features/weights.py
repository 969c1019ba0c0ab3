"""Weights of foreign networks, from a path or URL that a user gives; never unpickled."""

from __future__ import annotations

import hashlib
import io
import pickle

import torch
from torch import Tensor, nn

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import DataError

_SHOWN = 3


def read_file(place: Address, sha256: str | None = None) -> tuple[bytes, str]:
    """A file's bytes and their sha256.

    Args:
        place: Path or URL.
        sha256: The hash that the file must have, in full.

    Raises:
        DataError: The file is missing or has another hash.
    """
    place = addresses.plain(place)
    try:
        with addresses.open_file(place) as file:
            data = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"feature network: cannot read the weights at {place}: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise DataError(
            f"feature network: {place} has sha256 {found}, the recipe expects {sha256}; these are "
            "other weights"
        )
    return data, found


def read_weights(place: Address, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """A state dict, and the sha256 of its file.

    Args:
        place: Path or URL of a safetensors or a `.pt`/`.pth` file.
        sha256: The hash that the file must have, in full; checked before it is parsed.

    Raises:
        DataError: The file is missing, has another hash, or holds more than tensors.
    """
    data, found = read_file(place, sha256)
    return _parse(data, addresses.plain(place)), found


def _parse(data: bytes, place: str) -> dict[str, Tensor]:
    if place.endswith(".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(data)
        except SafetensorError as error:
            raise DataError(f"feature network: {place} is no safetensors file: {error}") from error
    try:
        state: dict[str, Tensor] = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(
            f"feature network: {place} is not a file of tensors: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise DataError(
            f"feature network: {place} holds no state dict, a mapping of names to tensors"
        )
    return state


def fill(network: nn.Module, state: dict[str, Tensor], place: str, title: str) -> None:
    """Load a state dict by name.

    Raises:
        DataError: A tensor is missing, is one too many, or has another shape.
    """
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(
            f"feature network: {place} does not fit {title}: {_apart(network, state) or error}. "
            f"Give weights of {title}."
        ) from error


def _apart(network: nn.Module, state: dict[str, Tensor]) -> str:
    """In how many names and shapes a state dict differs from a network's, and the first few."""
    own = network.state_dict()
    lost, unknown = ([k for k in a if k not in b] for a, b in ((own, state), (state, own)))
    other = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and v.shape != own[k].shape
    ]
    kinds = (
        (f"{len(lost)} of its {len(own)} tensors are missing", lost),
        (f"{len(unknown)} of the file's {len(state)} are not its", unknown),
        (f"{len(other)} have other shapes", other),
    )
    return "; ".join(f"{text} ({_few(names)})" for text, names in kinds if names)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
