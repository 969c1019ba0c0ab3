"""Load weights of a checkpoint into a network."""

from __future__ import annotations

import attrs
from torch import Tensor, nn

from e2ediff.backbone import Backbone
from e2ediff.distributed.tensors import split_as
from e2ediff.errors import CheckpointError
from e2ediff.store.manifest import Checkpoint


def load_weights(module: nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Load one file of a checkpoint into a module.

    Raises:
        LatentError: The latents of the file differ from the module's.
        CheckpointError: Names, shapes or types differ.
    """
    if isinstance(module, Backbone) and (theirs := checkpoint.latent(name)):
        expected = attrs.evolve(module.contract(theirs.scale), statistics=theirs.statistics)
        expected.accept(theirs, f"{checkpoint.path} ({name})")
    own = module.state_dict()
    tensors = {
        k: split_as(v, own[k]) if k in own else v for k, v in checkpoint.tensors(name).items()
    }
    for k, v in tensors.items():
        if k in own and v.dtype != own[k].dtype:
            raise CheckpointError(
                f"{checkpoint.path}: weights '{name}' do not fit the network of the recipe: {k} "
                f"is {_type(v)}, expected {_type(own[k])}. Restore it from a copy, or use another "
                "checkpoint."
            )
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"{checkpoint.path}: weights '{name}' do not fit the network of the recipe: {first}"
        ) from error


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
