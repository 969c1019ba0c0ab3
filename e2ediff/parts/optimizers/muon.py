"""Muon for the hidden matrices of a network, AdamW for everything else."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from typing_extensions import override

from e2ediff.parts.optimizers.scheduled import BETAS, Scheduled, grouped


@attrs.frozen(kw_only=True)
class MuonRest:
    """AdamW for what Muon leaves: vectors, embeddings, and first and last layers.

    `lr` is its peak learning rate, by default Muon's; `betas`, `eps` and `weight_decay` are the
    algorithm's, the last for matrices that are no embeddings.
    """

    lr: float | None = attrs.field(default=None, validator=validators.optional(validators.gt(0)))
    betas: tuple[float, float] = attrs.field(default=(0.9, 0.95), validator=BETAS)
    eps: float = attrs.field(default=1e-8, validator=validators.gt(0))
    weight_decay: float = attrs.field(default=0.0, validator=validators.ge(0))


@attrs.frozen(kw_only=True)
class Muon(Scheduled):
    """Muon for hidden matrices, with AdamW for the rest.

    Muon's are the parameters with two dimensions none of whose name's words is in `exclude`:
    the weights of attention, perceptrons and modulation inside the trunk.
    The rest are vectors, convolutions, embeddings, and first and last layers, which by the
    names of this project's networks have a word `embed` or `head`; `adamw` holds their options.
    A matrix that stacks several (queries, keys and values) is taken as one.
    `momentum`, `nesterov`, `steps` (Newton-Schulz iterations, in bfloat16) and `weight_decay`
    are the algorithm's.
    `scale` multiplies a matrix's rate: `match_rms_adamw` by 0.2 sqrt(larger side), so that one
    `lr` serves both optimizers; `original` by sqrt(max(1, rows / columns)).
    `lr`, `warmup_images`, `schedule`, `cooldown`, `decay_images`, `decay_from`, `floor`, `clip`
    and `groups` are those of `adamw`.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), by torch.optim.Muon; the
    scale is Liu et al. 2025's (arXiv 2502.16982), section 2.2. Momentum and scale as UNITE's
    code (arXiv 2603.22283), where Muon also has embeddings and the decoder's last layer, which
    `recipes/unite_in256.yaml` writes by `exclude`. Ours: the default `lr`.
    """

    lr: float = attrs.field(default=1e-4, validator=validators.gt(0))
    momentum: float = attrs.field(default=0.95, validator=[validators.ge(0), validators.lt(1)])
    nesterov: bool = True
    steps: int = attrs.field(default=5, validator=[validators.ge(1), validators.lt(100)])
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    exclude: tuple[str, ...] = ("embed", "head")
    adamw: MuonRest = MuonRest()

    def hidden(self, name: str, p: nn.Parameter) -> bool:
        """Whether the parameter is Muon's."""
        return p.ndim == 2 and not any(
            re.search(rf"(^|[._]){re.escape(word)}s?([._]|$)", name) for word in self.exclude
        )

    @override
    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        matrices = [
            {"params": hidden, **own}
            for own, mine in self.divided(named, self.lr)
            if (hidden := [p for name, p in mine if self.hidden(name, p)])
        ]
        rest = [(name, p) for name, p in named if not self.hidden(name, p)]
        parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = ByShape(
                matrices,
                lr=self.lr,
                weight_decay=self.weight_decay,
                momentum=self.momentum,
                nesterov=self.nesterov,
                ns_steps=self.steps,
                adjust_lr_fn=self.scale,
            )
            parts.append(muon)
        if rest:
            own, lr = self.adamw, self.adamw.lr or self.lr
            groups = grouped(self, rest, lr, own.weight_decay)
            parts.append(torch.optim.AdamW(groups, lr, own.betas, own.eps, fused=True))
        return Together(parts)


# Numbers in a batch of matrices: larger ones keep the machine busy by themselves, and a batch is
# copied.
_BATCH = 2**20

# Without instructions for bfloat16 a CPU takes 5 to 50 times as long for its products as for those
# of float32.
_CPU_COMPUTES_BFLOAT16 = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    and torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


class ByShape(torch.optim.Muon):
    """torch.optim.Muon with one iteration for all matrices of a shape.

    State and options are torch's. A matrix moves as torch's moves it, to the rounding of bfloat16.
    Matrices that are spread over processes go to torch's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move each matrix that has a gradient."""
        matrices = [p for group in self.param_groups for p in group["params"]]
        if any(hasattr(p, "full_tensor") for p in matrices):  # spread, as by FSDP2
            return super().step(closure)  # type: ignore[no-any-return,no-untyped-call]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[object, ...], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape, p.dtype, p.device), []).append((p, p.grad))
            for matrices in alike.values():
                count = max(1, _BATCH // matrices[0][0].numel())
                for first in range(0, len(matrices), count):
                    self._move(group, *zip(*matrices[first : first + count], strict=True))
        return loss

    def _move(
        self, group: Mapping[str, Any], matrices: tuple[Tensor, ...], grads: tuple[Tensor, ...]
    ) -> None:
        """Move matrices of one shape."""
        for p, grad in zip(matrices, grads, strict=True):
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(grad)
        momenta = tuple(self.state[p]["momentum_buffer"] for p in matrices)
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        if group["nesterov"]:
            momenta = torch._foreach_lerp(grads, momenta, group["momentum"])
        updates = orthogonal(
            torch.stack(momenta), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        rows, columns = matrices[0].shape
        scale = max(1, rows / columns) ** 0.5
        if group["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * max(rows, columns) ** 0.5
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, updates.unbind(), alpha=-group["lr"] * scale)


def orthogonal(
    x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices near the orthogonal factors of x (M, rows, columns), in x's type.

    On a CPU that does not compute in bfloat16 its numbers are multiplied as float32, and each
    product is rounded as it would be, once.

    Source: the Newton-Schulz iteration of Jordan et al. 2024, in bfloat16 as there.
    """
    a, b, c = coefficients
    tall = x.shape[1] > x.shape[2]
    y = (x.mT if tall else x).bfloat16()
    y = y / torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True).clamp_min(eps)
    wide = x.device.type == "cpu" and not _CPU_COMPUTES_BFLOAT16
    held = torch.float32 if wide else torch.bfloat16

    def rounded(product: Tensor) -> Tensor:
        return product.bfloat16().to(held)

    y = y.to(held)
    for _ in range(steps):
        gram = rounded(y @ y.mT)
        square = rounded(torch.baddbmm(gram, gram, gram, beta=b, alpha=c))
        y = rounded(torch.baddbmm(y, square, y, beta=a))
    return (y.mT if tall else y).to(x.dtype)


class Together(torch.optim.Optimizer):
    """Optimizers of different parameters as one, with the groups and states of all."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = tuple(parts)
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each, on this object's groups and states: loading replaces both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for part in self.parts:
            last = first + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[first:last]
            part.step()
            first = last
        return loss
