"""Feature networks: fixed networks whose features compare images, and the files of their weights.

Shapes: B batch, C H W image, K channels of a map, F features of an image.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor, nn

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import from_pixels
from e2ediff.errors import AbsentDataError, DataError, first_line
from e2ediff.limits import check_unpacked, read_whole

_SHOWN = 3


class FeatureNetwork(nn.Module, ABC):
    """A fixed network.

    `forward` takes images (B, C, H, W) in [-1, 1] of any size and 1 or 3 channels and returns
    feature maps (B, K, h, w), from shallow to deep; gradients reach the images.
    `vectors` is what scores are read off.

    `title` names the network in the names of scores, by default its class.
    `family` is what some metrics insist on, such as `clip`.
    `published` is True for the Inception weights in whose features a Fréchet distance is an FID.
    `taps` are the vectors that it offers; all have `pool`.
    `size` is the height and width to which `vectors` brings images, by stretching each side on its
    own where they are not square; 0 leaves them as they are.
    """

    title: str = ""
    family: str = ""
    published: bool = False
    taps: tuple[str, ...] = ("pool",)
    size: int = 0

    @abstractmethod
    def forward(self, x: Tensor) -> list[Tensor]:
        """Return feature maps of images in [-1, 1]."""

    def vectors(self, pixels: Tensor, taps: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        """Return vectors (B, F) of images, by tap; here the last map's mean over places.

        Args:
            pixels: Images (B, C, H, W), float, from 0 to 255.
            taps: Which vectors; each is one of `self.taps`.
        """
        return {"pool": self(from_pixels(pixels))[-1].mean(dim=(2, 3))}


class FeatureConfig(ABC):
    """Names a feature network in a recipe, with the place and hash of its weights.

    Weights that lie in a file are read by `read_weights`, which checks the hash and unpickles
    nothing but tensors, and loaded by `load_weights`, which names what does not fit.
    """

    @property
    def random(self) -> bool:
        """Whether the network is random for lack of weights, of which `check` and `run` warn."""
        return False

    @abstractmethod
    def build(self) -> FeatureNetwork:
        """Build the network with its weights, in eval mode and without gradients of its own.

        Raises:
            AbsentDataError: The weights, or the package of the network, are not on this machine.
            DataError: The weights do not fit, or are not those whose hash the recipe gives.
        """

    def blank(self) -> FeatureNetwork:
        """Build the network with any weights that need no file: for its shapes and its cost."""
        return self.build()


def trial_maps(network: FeatureNetwork, size: tuple[int, int, int]) -> list[Tensor]:
    """Return a network's maps, (1, K, h, w) each, of one image of zeros of this size (C, H, W).

    Raises:
        DataError: It does not compute on such images, or returns something else.
    """
    try:
        with torch.no_grad():
            maps = list(network(torch.zeros(1, *size)))
    except Exception as error:  # someone else's network raises what it likes
        why = first_line(error)
        raise DataError(f"the network does not compute on images of {size}: {why}") from error
    if not maps:
        raise DataError("the network returns no maps; name outputs of it")
    for one in maps:
        if one.ndim != 4:
            raise DataError(
                f"an output of shape {tuple(one.shape)} is no map (1, K, h, w), which has places "
                "on the image; name an earlier one"
            )
    return maps


def read_file(place: Address, sha256: str | None = None) -> tuple[bytes, str]:
    """Read a file of weights in any format; return its bytes and their sha256.

    Args:
        place: Path or URL.
        sha256: The hash that the file must have, in full.

    Raises:
        AbsentDataError: The file cannot be read.
        DataError: It has another hash.
    """
    place = addresses.plain(place)
    if not place:
        raise AbsentDataError("feature network: cannot read weights at an empty address")
    try:
        with addresses.open_file(place) as file:
            data = read_whole(file)
    except (OSError, ValueError, ImportError) as error:
        why = getattr(error, "strerror", None) or error
        raise AbsentDataError(
            f"feature network: cannot read the weights at {place}: {why}"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise DataError(
            f"feature network: {place} has sha256 {found}, the recipe expects {sha256}; these are "
            "other weights"
        )
    return data, found


def read_weights(place: Address, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Read a state dict, unpickling nothing but tensors; return it with the sha256 of its file.

    Args:
        place: Path or URL of a safetensors or a `.pt`/`.pth` file.
        sha256: The hash that the file must have, in full; checked before it is parsed.

    Raises:
        AbsentDataError: The file cannot be read.
        DataError: It has another hash, is damaged, or holds more than tensors.
    """
    data, found = read_file(place, sha256)
    return _parse(data, addresses.plain(place)), found


def _parse(data: bytes, place: str) -> dict[str, Tensor]:
    """Parse a file of weights; both readers raise what they like for a damaged one."""
    if place.endswith(".safetensors"):
        from safetensors.torch import load

        try:
            return dict(load(data))
        except Exception as error:
            raise DataError(
                f"feature network: {place} is no safetensors file: {_first_line(error)}"
            ) from error
    try:
        if data.startswith(b"PK"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                check_unpacked(archive, len(data))
        state: dict[str, Tensor] = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:
        raise DataError(
            f"feature network: {place} is not a file of tensors: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict) or not all(_is_weight(*item) for item in state.items()):
        raise DataError(
            f"feature network: {place} holds no state dict, a mapping of names to tensors"
        )
    return dict(state)  # without what torch hangs on it, which may tell modules what to do


def _is_weight(name: object, value: object) -> bool:
    """Return whether this is a name with plain numbers, each of which is stored."""
    return (
        isinstance(name, str)
        and type(value) in (Tensor, nn.Parameter)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # whose text advises to unpickle after all
        return "it is damaged, or has more than tensors, which alone are read"
    if isinstance(error, LookupError | EOFError | TypeError | AttributeError):
        return "it is damaged, or of another format"  # a parser that met what it did not expect
    said = str(error).partition("\n")[0]
    return said[:200] if said else type(error).__name__


def load_weights(network: nn.Module, state: dict[str, Tensor], place: str, title: str) -> None:
    """Load a state dict into a network by the names of its tensors.

    Args:
        network: The network to load it into.
        state: As `read_weights` returns it.
        place: Where the state dict was read, for the error message.
        title: Name of the network, for the error message.

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
    """Say in how many names and shapes a state dict and a network differ, and the first few."""
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
    return ", ".join(name[:100] for name in names[:_SHOWN]) + more
