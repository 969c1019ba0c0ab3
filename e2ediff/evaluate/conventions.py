"""Evaluation protocols of published work, as presets.

A score depends on how images became bytes, how they were resized, how labels were drawn, how many
images there were, and on the reference. Each preset cites the source of its rules; what could
not be confirmed there is in `unconfirmed`, and in the passport of every score.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from e2ediff.data import Rounding
from e2ediff.errors import DataError
from e2ediff.metric import Metric
from e2ediff.model.labels import LabelLaw

Resize = Literal["network", "pil_bicubic"]


@attrs.frozen(kw_only=True)
class Convention:
    """How images become features.

    `rounding` is an option of `to_pixels`; it does not apply to images stored as bytes.
    `resize` is the network's own resize, or Pillow's antialiased bicubic on float channels.
    `labels` is the law by which labels are drawn.
    `count` is the number of images that published scores use.
    `reference` describes in words the reference set; the user supplies the file.
    `options` are options of metrics, by the metric's class.
    `sources` cites the source of each rule; `unconfirmed` lists what was not found there.
    """

    name: str
    rounding: Rounding = "nearest"
    resize: Resize = "network"
    labels: LabelLaw = "balanced"
    count: int = 50_000
    reference: str
    options: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict)
    sources: Mapping[str, str]
    unconfirmed: tuple[str, ...] = ()

    def adapted(self, metric: Metric) -> Metric:
        """Return the metric with this convention's options."""
        own = self.options.get(type(metric).__name__)
        return attrs.evolve(metric, **own) if own else metric  # type: ignore[misc]


_ADM_REFERENCE = (
    "ADM's VIRTUAL_imagenet256_labeled.npz: its mu, sigma, mu_s, sigma_s for distances, its "
    "images for precision and recall"
)
_ADM_EVALUATOR = "guided-diffusion, evaluations/evaluator.py"
_UNSHUFFLED = {"InceptionScore": {"shuffle": False}}
_BYTES = "the tool takes bytes; rounding and labels are e2ediff's own"

CONVENTIONS: Mapping[str, Convention] = {
    c.name: c
    for c in (
        Convention(
            name="e2ediff",
            count=10_000,
            reference="the training images of the run's data set",
            sources={"all": "e2ediff"},
        ),
        Convention(
            name="adm",
            rounding="down",
            labels="uniform",
            reference=_ADM_REFERENCE,
            options=_UNSHUFFLED,
            sources={
                "rounding, labels": "guided-diffusion, scripts/image_sample.py",
                "resize, features, parts of the Inception Score": _ADM_EVALUATOR,
            },
            unconfirmed=(
                "the images behind mu and sigma in the reference file",
                "precision and recall take half-precision distances there, float64 here",
            ),
        ),
        Convention(
            name="dit_sit",
            rounding="half_up",
            labels="uniform",
            reference=_ADM_REFERENCE,
            options=_UNSHUFFLED,
            sources={
                "rounding, labels, count": "DiT and SiT, sample_ddp.py",
                "resize, features": _ADM_EVALUATOR,
            },
            unconfirmed=("the images behind mu and sigma in the reference file",),
        ),
        Convention(
            name="jit",
            labels="balanced",
            reference="JiT's fid_stats/jit_in256_stats.npz",
            sources={
                "rounding, labels, reference": "copies of JiT's engine_jit.py",
                "resize, features, Inception Score": "torch-fidelity 0.4.0, read and compared",
            },
            unconfirmed=("the images behind the statistics file", "the original repository"),
        ),
        Convention(
            name="unite",
            rounding="down",
            labels="balanced",
            reference="an npz of mu and sigma that the repository takes from an environment "
            "variable",
            options={"InceptionScore": {"shuffle": False, "classes": 1000}},
            sources={
                "rounding, features, Inception Score": "UNITE, utils/fid.py",
                "labels, count": "UNITE, engines/eval.py",
            },
            unconfirmed=("which statistics file the published scores used",),
        ),
        Convention(
            name="rae",
            rounding="down",
            labels="uniform",
            reference=_ADM_REFERENCE,
            options=_UNSHUFFLED,
            sources={
                "rounding, labels (the default; `equal` is an option), count": "RAE, "
                "src/sample_ddp.py",
                "resize, features, reference": "RAE, README: the npz goes to ADM's evaluator",
            },
            unconfirmed=("which of its two label laws each published score used",),
        ),
        Convention(
            name="torch_fidelity",
            reference="a folder of images, or an npz of mu and sigma",
            sources={"resize, features, metrics": "torch-fidelity 0.4.0, read and compared"},
            unconfirmed=(_BYTES,),
        ),
        Convention(
            name="clean_fid",
            resize="pil_bicubic",
            reference="statistics of the data set, resized in the same way",
            sources={
                "resize": "clean-fid, cleanfid/resize.py, mode clean",
                "features": "clean-fid, cleanfid/inception_torchscript.py",
                "count": "clean-fid, cleanfid/fid.py, fid_model",
            },
            unconfirmed=(
                _BYTES,
                "that its TorchScript weights equal the conversion of the same graph",
            ),
        ),
    )
}
"""The presets by name."""


def convention(name: str) -> Convention:
    """Return the preset of this name.

    Raises:
        DataError: There is no such preset.
    """
    from e2ediff.host.registry import did_you_mean

    if name not in CONVENTIONS:
        raise DataError(f"--convention {name}: unknown. {did_you_mean(name, CONVENTIONS)}")
    return CONVENTIONS[name]
