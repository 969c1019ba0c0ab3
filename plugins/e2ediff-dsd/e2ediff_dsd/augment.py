"""The online view: hidden patches and changed colours, token by token in place.

Nothing moves on the image plane, so that tokens of both views correspond.

Shapes: B batch, C H W image, N tokens.
"""

from __future__ import annotations

import attrs
import torch
from attrs import validators
from torch import Tensor

from e2ediff.objective import Draw

_SHARE = [validators.ge(0.0), validators.le(1.0)]


@attrs.frozen(kw_only=True)
class Augmentation:
    """How the online encoder's view differs from the target encoder's.

    With `mask_probability` an image loses a share of its patches, uniform between 0 and
    `mask_most`; the rest of the images stay whole, because a latent that is sampled is never
    masked.
    `jitter` is the largest relative change of brightness and contrast, drawn for each image;
    in colour images also of saturation.

    Source: DSD (arXiv 2511.14716), caption of figure 1, which says of self-distillation in general
    that the online view is augmented, "e.g., with a random mask". Shares and strengths are ours.
    """

    mask_probability: float = attrs.field(default=0.5, validator=_SHARE)
    mask_most: float = attrs.field(default=0.4, validator=_SHARE)
    jitter: float = attrs.field(default=0.0, validator=_SHARE)

    @property
    def changes(self) -> bool:
        """Whether the view can differ from the image at all."""
        return self.jitter > 0 or self.hides

    @property
    def hides(self) -> bool:
        """Whether patches are ever hidden."""
        return self.mask_probability > 0 and self.mask_most > 0

    def mask(self, tokens: int, draw: Draw) -> Tensor | None:
        """(B, N), bool, True where a patch is hidden; None where nothing ever is."""
        if not self.hides:
            return None
        b = len(draw.t)
        share, chosen = draw.uniform(2, b)
        share = torch.where(chosen < self.mask_probability, share * self.mask_most, 0.0)
        return draw.uniform(b, tokens) < share[:, None]

    def colours(self, x: Tensor, draw: Draw) -> Tensor:
        """x (B, C, H, W) in [-1, 1] with brightness, contrast and saturation changed."""
        if self.jitter == 0:
            return x
        strengths = 1 + self.jitter * (2 * draw.uniform(3, len(x)) - 1)
        brightness, contrast, saturation = strengths.reshape(3, -1, 1, 1, 1)
        y = (x + 1) / 2 * brightness
        mean = y.mean(dim=(1, 2, 3), keepdim=True)
        y = (y - mean) * contrast + mean
        if x.shape[1] == 3:
            grey = y.mean(dim=1, keepdim=True)
            y = (y - grey) * saturation + grey
        view: Tensor = (2 * y - 1).clamp(-1, 1)
        return view
