"""Evaluate images with every metric in one feature pass, under one or several conventions.

Shapes: n images.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib import metadata

from e2ediff.data import left_out_text
from e2ediff.distances import self_test
from e2ediff.distributed.threads import quiet, threads_for
from e2ediff.errors import DataError, PluginError
from e2ediff.evaluate.conventions import Convention
from e2ediff.evaluate.images import Samples
from e2ediff.evaluate.passes import Pass, View, feature_pass
from e2ediff.evaluate.passport import Card, Passport
from e2ediff.evaluate.reference import ReferenceSet, open_reference
from e2ediff.evaluate.request import Request, Say
from e2ediff.evaluate.resampling import Resampling
from e2ediff.evaluate.sections import Sections
from e2ediff.evaluate.subject import Subject, run_subject, stored_subject
from e2ediff.features import FeatureNetwork
from e2ediff.host.plugins import Host
from e2ediff.metric import FeatureSet, Metric, taps_of
from e2ediff.model.build import choose_device
from e2ediff.model.image_features import network_title, weights_sha256
from e2ediff.model.labels import without_images
from e2ediff.store.environment import describe_environment
from e2ediff.store.run_directory import is_run
from e2ediff.store.storage import JSON


def default_metrics(host: Host, network: FeatureNetwork) -> list[Metric]:
    """Return every registered metric, with its defaults, whose taps the network offers."""
    found: list[Metric] = []
    for part in host.parts("metrics"):
        try:
            metric = part.cls()
        except TypeError:
            continue  # it has options without defaults, so the user must name it
        assert isinstance(metric, Metric)
        fits = {*metric.moments, *metric.rows} <= {*network.taps}
        if fits and metric.features in ("", network.family):
            found.append(metric)
    return found


def evaluate(host: Host, request: Request, say: Say = quiet, report: Say = quiet) -> list[Card]:
    """Score a run's samples, or stored images; return one card for each convention.

    Args:
        host: Knows the parts.
        request: What to evaluate, and how.
        say: Called with progress.
        report: Called with lines that should stay visible, such as the chosen thread count.

    Raises:
        DataError: Images are missing, too few, of another size, or the metrics do not fit.
        PluginError: A metric does not say whether low or high figures are better.
        ResourceError: The machine's linear algebra is broken.
        E2EDiffError: As loading the run has it.
    """
    self_test()
    _check_metrics(request)
    device = choose_device(request.target.device)
    subject = _subject(host, request, report)
    if isinstance(subject.images, Samples):
        image = subject.images.model.image
        if empty := without_images(image, subject.images.labels):
            report(f"warning: {empty}")
    references = _references(host, request, subject)
    sets = [subject.images, *(reference.images for reference in references.values())]
    for images in dict.fromkeys(sets):
        if images is not None and images.left_out:
            report(f"{images.place}: {left_out_text(images.left_out)}")
    least = max([m.min_images() for m in request.metrics], default=1)
    if subject.count < least:
        raise DataError(
            f"{request.target.run}: {subject.count} images, and the metrics need {least}; give "
            "more (--count), or leave metrics out"
        )
    resampling = Resampling(sets=request.bootstrap, say=say)
    moments, rows = taps_of(request.metrics)
    rows |= resampling.taps(request.metrics)
    rows |= {"pool"} if "memorisation" in request.sections else frozenset()
    several = request.processes > 1
    exact = subject.model is not None and subject.model.recipe.deterministic
    work = Pass(
        request.network, moments, rows, request.batch, str(device),
        choose_threads=request.choose_threads and several and not exact,
    )  # fmt: skip
    views = {  # stored images are bytes already
        c.name: View(c.rounding if subject.model else "nearest", c.resize)
        for c in request.conventions
    }
    made: Mapping[View, FeatureSet] = {}
    fixed = several or not request.choose_threads
    with threads_for(
        work.attempt(subject.images), report, device, fixed=fixed, deterministic=exact
    ) as finished:

        def progress(n: int) -> None:
            say(f"{n}/{subject.count} images")
            finished(n)

        if request.metrics or rows:
            made = feature_pass(
                work, subject.images, list(dict.fromkeys(views.values())), subject.count,
                processes=request.processes, progress=progress,
            )  # fmt: skip
        sections = Sections(host, request, subject, work, resampling, say)
        cards = []
        for one in request.conventions:
            view, reference = views[one.name], references.get(one.name)
            scores, compared, notes = sections.scores(one, view, made.get(view), reference)
            passport = passport_of(request, subject, one, view, reference, compared)
            cards.append(Card("", passport, scores, notes))
    return cards


def _check_metrics(request: Request) -> None:
    network = request.network
    for metric in request.metrics:
        if metric.better not in ("low", "high"):
            raise PluginError(
                f"metric {type(metric).__name__}: better is {metric.better!r}; its author must "
                "write 'low' or 'high'"
            )
        if metric.features not in ("", network.family):
            raise DataError(
                f"--metrics: {type(metric).__name__} needs a {metric.features} network, not "
                f"{network_title(network)}; give one with --features '{{name: {metric.features}, "
                "weights: ...}'"
            )
    if request.sections and not is_run(request.target.run):
        raise DataError(
            f"--metrics {','.join(request.sections)}: only a run has them; {request.target.run} "
            "is none"
        )


def _subject(host: Host, request: Request, report: Say) -> Subject:
    first = request.conventions[0]
    if not is_run(request.target.run):
        if request.target.overrides:
            raise DataError(f"--set: only a run has a sampler; {request.target.run} is none")
        return stored_subject(request.target.run, request.count)
    subject = run_subject(
        host,
        request.target,
        request.count or first.count,
        request.labels or first.labels,
        seed=request.seed,
        classes=request.classes,
        warn=report,
    )
    if request.labels and subject.labels != request.labels:
        raise DataError("--labels: the run is not conditioned on classes; leave it out")
    return subject


def _references(host: Host, request: Request, subject: Subject) -> Mapping[str, ReferenceSet]:
    """Open the reference of each convention, whose images must have the subject's size."""
    if not any(metric.compares for metric in request.metrics):
        return {}
    data = subject.model.recipe.data if subject.model else None
    classes = request.classes
    opened = functools.cache(lambda place: open_reference(place, host, data, classes))
    found = {}
    for one in request.conventions:
        default = "data" if data is not None else ""
        place = request.references.get(one.name, request.references.get("", default))
        if not place:
            raise DataError(
                f"--reference is missing: {one.name} compares with {one.reference}; give an npz, "
                "a folder of images or a data source"
            )
        found[one.name] = opened(place)
    for reference in found.values():
        images = reference.images
        if images is not None and images.shape[1:] != subject.images.shape[1:]:
            ours, theirs = (f"{s[1]} x {s[2]}" for s in (subject.images.shape, images.shape))
            raise DataError(
                f"{reference.place}: its images have {theirs} pixels (height x width), those of "
                f"{subject.images.place} {ours}; a score needs one resolution"
            )
    return found


def passport_of(
    request: Request,
    subject: Subject,
    one: Convention,
    view: View,
    reference: ReferenceSet | None,
    compared: int,
) -> Passport:
    """Return the passport of a subject scored against `compared` images of a reference."""
    channels, height, width = subject.images.shape
    protocol: dict[str, JSON] = {
        "convention": one.name,
        "images": subject.count,
        "resolution": f"{width} x {height} x {channels}",
        "rounding": view.rounding if subject.model else "as stored",
        "resize": view.resize,
        "network": network_title(request.network),
        "network_sha256": weights_sha256(request.network),
        "reference_sha256": reference.sha256 if reference else None,
        "reference_images": compared or None,
        **subject.protocol,
    }
    where = describe_environment(device=str(choose_device(request.target.device)))
    machine: dict[str, JSON] = {k: where[k] for k in ("versions", "git", "hardware")}
    machine["libraries"] = {n: metadata.version(n) for n in ("numpy", "pillow", "torchvision")}
    machine["batch"], machine["processes"] = request.batch, request.processes
    machine["target"] = request.target.run
    return Passport(protocol, subject.identity, machine)
