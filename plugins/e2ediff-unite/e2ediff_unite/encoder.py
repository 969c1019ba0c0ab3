"""The block of the generative encoder.

Shapes: B batch, N tokens, W width.
"""

from __future__ import annotations

from torch import Tensor, nn

from e2ediff.nn.layers import MLP, Block, SwiGLUWidth


class NormedBlock(Block):
    """An adaLN-zero block with RMSNorm, whose output is normalised once more.

    Source: UNITE (arXiv 2603.22283), released code.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, swiglu_width: SwiGLUWidth
    ) -> None:
        mlp = MLP(width, mlp_ratio, "swiglu", swiglu_width)
        super().__init__(width, heads, mlp, "block", norm="rms")
        self.after = nn.RMSNorm(width, eps=1e-6)

    def forward(
        self, x: Tensor, c: Tensor, common: Tensor | None, turn: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Tokens (B, N, W) under conditioning c (B, W)."""
        out: Tensor = self.after(super().forward(x, c, common, turn))
        return out
