"""The sheet of curves is drawn of whatever a run has figures of."""

from __future__ import annotations

import pytest

from e2ediff.monitor.pictures import curves_png
from e2ediff.parts.diagnostics.latent_health import LatentHealth

pytestmark = pytest.mark.usefixtures("drawn")


@pytest.mark.parametrize("own", [{}, {"rank": 0.0}, {"rank": 3.0}], ids=["fixed", "alike", "full"])
def test_curves_are_drawn_of_latents_that_are_fixed_or_all_alike(own) -> None:
    """Without a warning of matplotlib, which these tests would raise."""
    metrics = [{"images": n, "loss/denoising": 1.0 / n, **own} for n in (8, 16)]
    assert curves_png(metrics, "run", LatentHealth.figures).startswith(b"\x89PNG")
