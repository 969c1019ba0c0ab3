"""The images to score: a run's samples, a folder or an npz; with their passport entries.

Shapes: n images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs

import e2ediff
from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.averaging import Averaging
from e2ediff.errors import DataError
from e2ediff.evaluate.images import ImageSet, Samples, stored_images
from e2ediff.evaluate.reference import npz_keys
from e2ediff.guidance import Guidance
from e2ediff.host.plugins import Host
from e2ediff.host.structure import unstructure
from e2ediff.model.build import averagings
from e2ediff.model.image_features import weights_sha256
from e2ediff.model.inference import Model
from e2ediff.model.labels import LabelLaw, called
from e2ediff.sample.conditions import SetLaw, numbers_of
from e2ediff.sample.load import ModelRef
from e2ediff.sample.post_hoc import width_of
from e2ediff.sample.set_record import origin_entry
from e2ediff.sampler import Sampler
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import JSON


@attrs.frozen(eq=False)
class Subject:
    """Images, with the passport fields of how (`protocol`) and of what (`identity`) they are.

    `chosen` lists the classes that were asked for; "" for all.
    """

    images: ImageSet
    count: int
    protocol: Mapping[str, JSON]
    identity: Mapping[str, JSON]
    labels: SetLaw | None = None
    model: Model | None = None
    chosen: str = ""


def stored_subject(place: Address, count: int | None) -> Subject:
    """Open the images of a folder or an npz.

    Raises:
        DataError: There are no images, or fewer than `count`.
    """
    place = addresses.plain(place)
    if place.endswith(".npz") and "arr_0" not in (keys := npz_keys(place)):
        raise DataError(
            f"{place}: holds {', '.join(keys) or 'nothing'}; expected images in arr_0, uint8 "
            "(n, height, width, 3)"
        )
    images = stored_images(place)
    if count is not None and count > images.count:
        raise DataError(f"{place}: holds {images.count} images, --count asks for {count}")
    return Subject(
        images,
        count or images.count,
        {"made_by": "unknown", "label_law": "unknown"},
        {"images_sha256": images.sha256()},
    )


def run_subject(
    host: Host,
    ref: ModelRef,
    count: int,
    law: LabelLaw,
    *,
    seed: int = 0,
    model: Model | None = None,
    classes: Sequence[int] = (),
    warn: Callable[[str], None] | None = None,
) -> Subject:
    """Describe a run's samples.

    Args:
        host: Knows the parts.
        ref: The run's model.
        count: Number of samples.
        law: How labels are drawn; other conditions are those of held-out images, in order.
        seed: Seed of their noise.
        model: The model that `ref` loads, if it is loaded already.
        classes: The classes of the samples; empty for all.
        warn: As for `ModelRef.load`.

    Raises:
        RunDirectoryError, CheckpointError: The run or its weights cannot be used.
    """
    directory = RunDirectory.open(ref.run)
    opened = open_checkpoint(directory.store, ref.checkpoint)
    ref = attrs.evolve(ref, checkpoint=opened.name)
    model = model or ref.load(warn=warn)
    recipe, conditioning = model.recipe, model.recipe.data.image.conditioning
    numbers, taken = numbers_of(recipe, count, law, seed, classes)
    chosen = called(model.image, classes)
    guides = tuple(other.origin.sha256 for other in model.others)
    kinds = f"{taken}, {conditioning.kinds} classes" if conditioning.kinds else taken
    kinds += f", {chosen} alone" if chosen else ""
    name = ref.weights or recipe.default_weights
    averaging = averagings(recipe).get(name)
    average: Any = unstructure(host, averaging, Averaging) if averaging else None
    options = average if isinstance(average, dict) else {}
    (example,) = model.tiles(model.image.conditioning.example(1), seed=0)
    protocol: dict[str, Any] = {
        "made_by": "e2ediff",
        "label_law": kinds,
        "sampler": unstructure(host, recipe.sampler, Sampler),
        "network_calls": example.passes,
        "guidance": recipe.guidance and unstructure(host, recipe.guidance, Guidance),
    }
    identity: dict[str, Any] = {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(directory.resolved().encode()).hexdigest(),
        "e2ediff": e2ediff.__version__,
        "checkpoint": opened.name,
        "step": opened.step,
        "images_trained": opened.images,
        "weights": name,
        "average": average,
        "ema_decay": 0.0 if name == "online" else options.get("decay"),
        "ema_width": width_of(name) or options.get("width"),
        "weights_sha256": weights_sha256(model.net),
        "seed": seed,
    }
    # Networks of the run itself belong to the subject, as its weights do; those of other runs
    # belong to the protocol, and must agree.
    for other in model.others:
        place = identity if other.origin.run == ref.run else protocol
        place.setdefault("guided_by", []).append(origin_entry(other.origin))
    samples = Samples(ref, numbers, seed, model, guides)
    return Subject(samples, count, protocol, identity, taken, model, chosen)
