"""Split the weights of a step over processes with FSDP2, and gather them for its passes.

In bfloat16 nearly all weights are those of linear layers and convolutions in blocks, which
autocast casts in every pass. They are sent as bfloat16, half of the bytes, and no float32 copy
of them is made; the numbers are the same to the bit. All others are sent in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone
from e2ediff.distributed.tensors import whole
from e2ediff.distributed.world import World
from e2ediff.errors import PluginError
from e2ediff.step.step import Step

if TYPE_CHECKING:  # takes half a second to import, and only FSDP2 needs it
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def shard(step: Step, world: World, device: torch.device) -> None:
    """Split every parameter over the processes, block by block; the rest is one more group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh, half = init_device_mesh(device.type, (world.size,)), []
    for net in (step.online, *step.averages.values()):
        assert isinstance(net, Backbone)
        for block in net.blocks():
            layers = cast_layers(block) if step.precision == torch.bfloat16 else []
            if layers:
                half.append(HalfLayers(block, layers, mesh))
            others = set(block.parameters()) - {p for m in layers for p in m.parameters()}
            # Scales and offsets are few: gathered with what is outside of blocks, they need no
            # message of their own for every block.
            if not layers or any(p.ndim > 1 for p in others):
                fully_shard(block, mesh=mesh)
    fully_shard(step, mesh=mesh)
    register_fsdp_forward_method(step, "gather")
    step.gather()  # the first forward call makes the step the root of all shards
    for group in half:
        group.gather_once()
    sharded(step).reshard()


def sharded(module: nn.Module) -> FSDPModule:
    """Return a module that was split, as what FSDP2 made of it."""
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(module, FSDPModule)
    return module


def cast_layers(block: nn.Module) -> list[nn.Module]:
    """Return the layers of a block whose weights autocast casts to bfloat16.

    A layer of a derived class may compute otherwise, and is none of them.
    """
    return [layer for layer in block.modules() if type(layer) in _LAYERS]


class HalfLayers:
    """The layers of a block whose weights are gathered in bfloat16 under autocast.

    Without autocast, as in calibration and most of a diagnosis, they are gathered in float32.
    """

    def __init__(self, block: nn.Module, layers: Sequence[nn.Module], mesh: DeviceMesh) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        fully_shard([*layers], mesh=mesh, mp_policy=policy)
        self.layers = layers
        self._device = mesh.device_type
        self._split: list[tuple[nn.Module, str, nn.Parameter]] = []
        # Hooks of every layer would cut a compiled block into pieces, and run again when its
        # activations are recomputed: they become hooks of the block.
        self._state: Any = fully_shard.state(layers[0])  # type: ignore[attr-defined]
        self._state._pre_forward_hook_handle.remove()
        self._state._post_forward_hook_handle.remove()
        block.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        block.register_forward_hook(self._after)

    def gather_once(self) -> None:
        """Gather once before any backward pass, even if no pass ever uses the block.

        After one that does not sum gradients FSDP2 looks at the gathered weights of all groups.
        """
        first = sharded(self.layers[0])
        first.unshard()
        first.reshard()

    def _before(self, block: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        if torch.is_autocast_enabled(self._device):
            return self._state._pre_forward(block, args, options)
        self._restore()  # if the block failed before
        for layer in self.layers:
            for name, p in layer.named_parameters(recurse=False):
                if p.requires_grad and torch.is_grad_enabled():
                    raise PluginError(
                        f"{type(block).__name__}: trained without autocast, but with `parallel: "
                        "fsdp2` and `precision: bfloat16` blocks are trained under autocast; do "
                        "not disable it around the network, or set parallel: ddp"
                    )
                self._split.append((layer, name, p))
                setattr(layer, name, nn.Parameter(whole(p.detach()), requires_grad=False))
        return None

    def _after(self, block: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        if torch.is_autocast_enabled(self._device):
            return self._state._post_forward(block, args, output)
        self._restore()
        return None

    def _restore(self) -> None:
        for layer, name, p in self._split:
            setattr(layer, name, p)
        self._split.clear()
