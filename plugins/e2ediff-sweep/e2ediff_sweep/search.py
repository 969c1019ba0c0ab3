"""Score candidates with the same noise and labels, and store each score at once."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import attrs

from e2ediff.ablate.grid import Axis, Value
from e2ediff.errors import DataError, RunDirectoryError
from e2ediff.evaluate.evaluate import passport_of
from e2ediff.evaluate.passes import Pass, View, feature_pass
from e2ediff.evaluate.passport import Card, Score, parse_card, write_card
from e2ediff.evaluate.reference import ReferenceSet, reference_features
from e2ediff.evaluate.request import Request
from e2ediff.evaluate.subject import run_subject
from e2ediff.limits import MAX_GRAPH, json_object
from e2ediff.model.build import choose_device
from e2ediff.model.image_features import network_title, weights_sha256
from e2ediff.model.inference import Model, denoise_once
from e2ediff.sample.set_record import differences
from e2ediff.store.storage import JSON, Store
from e2ediff_sweep.candidates import Candidate, SweptRun
from e2ediff_sweep.proxy import Mean, Proxy

SPEC, SCORES = "sweep.json", "scores"
_METRIC = {"name": "kernel_distance", "error": "jackknife over samples, reference fixed"}


@attrs.frozen(eq=False)
class Result:
    """A scored candidate: its card, and the share of each image in its distance."""

    candidate: Candidate
    card: Card
    shares: tuple[float, ...]

    @property
    def mean(self) -> Mean:
        """Return the distance with its standard error."""
        return Mean.of(self.shares)

    @property
    def calls(self) -> float:
        """Return network calls per image."""
        return float(self.card.passport.protocol["network_calls"])  # type: ignore[arg-type]


@attrs.define(eq=False)
class Search:
    """Scores candidates and stores the scores in a folder.

    `request` holds what all candidates share.
    """

    run: SweptRun
    request: Request
    reference: ReferenceSet
    store: Store
    say: Callable[[str], None]
    update: Callable[[str], None]
    found: dict[str, Result] = attrs.field(factory=dict)
    _proxy: Proxy | None = None
    _loaded: tuple[str, Model] | None = None
    _warned: set[str] = attrs.field(factory=set)

    def begin(self) -> None:
        """Load the scores in the folder, or create it.

        Raises:
            RunDirectoryError: It holds another sweep, or something else.
        """
        spec = self._spec()
        present = [name for name in self.store.list() if not name.startswith(".")]
        if present:
            try:
                there = json_object(self.store.read(SPEC, 1 << 20))
                apart = differences(there, spec)
            except (OSError, ValueError, AttributeError, TypeError):
                apart = [f"holds no {SPEC} of a sweep"]
            if apart:
                what = "\n  ".join(apart)
                raise RunDirectoryError(
                    f"{self.store.where()}: holds another sweep, or none:\n  {what}\n"
                    "Choose another --out, or remove it."
                )
        else:
            self.store.write(SPEC, json.dumps(spec, indent=1).encode())
        for name in self.store.list(SCORES):
            path = f"{SCORES}/{name}"
            if name.endswith(".json"):
                self._take(parse_card(self.store.read(path, MAX_GRAPH), self.store.where(path)))
        if self.found:
            self.say(f"{self.store.where()}: {len(self.found)} candidates are scored already")

    def _take(self, card: Card) -> Result:
        notes: Mapping[str, JSON] = card.notes
        try:
            candidate = Candidate(str(notes["weights"]), tuple(map(str, notes["overrides"])))  # type: ignore[arg-type]
            result = Result(candidate, card, tuple(map(float, notes["shares"])))  # type: ignore[arg-type]
            self.found[str(notes["candidate"])] = result
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{card.place}: not the scores of a candidate ({error!r})") from error
        return result

    def _spec(self) -> dict[str, JSON]:
        """Return what must agree for scores to be comparable; axes may change."""
        r, checkpoint = self.request, self.run.checkpoint
        return {
            "e2ediff_sweep": 1,
            "recipe": self.run.recipe.name,
            "checkpoint": checkpoint.name,
            "weights_sha256": checkpoint.sha256("online"),
            "seed": r.seed,
            "images": r.count,
            "labels": r.labels or r.conventions[0].labels,
            "convention": r.conventions[0].name,
            "network": network_title(r.network),
            "network_sha256": weights_sha256(r.network),
            "reference": self.reference.place,
            "reference_sha256": self.reference.sha256,
        }

    def score(self, candidate: Candidate) -> Result:
        """Return a candidate's score, measured unless known; errors are those of sampling."""
        key = self.run.key(candidate)
        if key not in self.found:
            self._measure(candidate, key)
            result = self.found[key]
            mean = result.mean
            self.say(f"{mean.value:.6g} +- {mean.error:.2g}  {candidate.words}")
        return self.found[key]

    def attempt(self) -> None:
        """Call the denoiser of the recipe's own candidate once, to be timed."""
        if self._loaded is None:
            self._model(self.run.candidate([]))
        assert self._loaded is not None
        denoise_once(self._loaded[1])

    def _measure(self, candidate: Candidate, key: str) -> None:
        r = attrs.evolve(self.request, target=candidate.of(self.request.target))
        one = r.conventions[0]
        work = Pass(
            r.network, (), ("pool",), r.batch, str(choose_device(r.target.device)),
            choose_threads=r.choose_threads and r.processes > 1,
        )  # fmt: skip
        view = View(one.rounding, one.resize)
        if self._proxy is None:
            real = reference_features(
                self.reference, work, view, cache=r.cache, processes=r.processes
            )
            self._proxy = Proxy.of(real.rows["pool"].cpu())
        assert r.count is not None
        subject = run_subject(
            self.run.host, r.target, r.count, r.labels or one.labels, seed=r.seed,
            model=self._model(candidate),
        )  # fmt: skip
        made = feature_pass(
            work, subject.images, [view], subject.count, processes=r.processes,
            progress=lambda n: self.update(f"{n}/{subject.count} images  {candidate.words}"),
        )[view]  # fmt: skip
        shares = self._proxy.shares(made.rows["pool"].cpu())
        passport = passport_of(r, subject, one, view, self.reference, len(self._proxy.real))
        name = "KID" if r.network.published else f"KD-{network_title(r.network)}"
        mean = Mean.of(shares)
        notes: dict[str, JSON] = {
            "candidate": key, "weights": candidate.weights,
            "overrides": list(candidate.overrides), "shares": shares,
            "reference": self.reference.place,
        }  # fmt: skip
        score = Score(mean.value, mean.error, better="low", metric=_METRIC)
        card = Card("", passport, {name: score}, notes)
        place = write_card(self.store.where(SCORES), card)
        self._take(attrs.evolve(card, place=place))

    def _model(self, candidate: Candidate) -> Model:
        """Return the candidate's model; loaded weights are kept for the next candidate."""
        recipe, r = self.run.recipe_of(candidate), self.request
        plain = recipe.guidance is None or not recipe.guidance.references
        if plain and self._loaded is not None and self._loaded[0] == candidate.weights:
            model = self._loaded[1]
            return attrs.evolve(model, recipe=recipe, guidance=recipe.guidance, others=())
        model = candidate.of(r.target).load(self.run.host, self._warn)
        self._loaded = (candidate.weights, model)
        return model

    def _warn(self, text: str) -> None:
        """Show a warning once, although every candidate is loaded."""
        if text not in self._warned:
            self._warned.add(text)
            self.say(text)


def every(run: SweptRun, axes: Sequence[Axis]) -> list[Candidate]:
    """Return all combinations."""
    products = itertools.product(*(axis.values for axis in axes))
    return [run.candidate(values) for values in products]


def one_by_one(
    run: SweptRun, axes: Sequence[Axis], rounds: int, score: Callable[[Candidate], Result]
) -> Iterator[Result]:
    """Score one axis after another, the others staying at their best values so far.

    Starts with the recipe. Stops early after a round that changed nothing.
    """
    chosen: dict[str, Value] = {}
    best = score(run.candidate([]))
    yield best
    for _ in range(rounds):
        before = best
        for axis in axes:
            held = chosen
            for value in axis.values:
                tried = {**chosen, axis.path: value}
                result = score(run.candidate([tried[a.path] for a in axes if a.path in tried]))
                yield result
                if result.mean.value < best.mean.value:
                    best, held = result, tried
            chosen = held
        if best is before:
            return
