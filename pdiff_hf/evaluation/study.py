"""All that is measured of one set of generated networks."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from ..errors import PipelineError, ZooError
from ..files import UNFINISHED
from ..hub.pipelines import check_draws
from ..parallel import from_main, processes
from ..zoo import WeightZoo, evenly
from . import pictures
from .baselines import KINDS, Baseline, StandardizedZoo, strengths_of
from .canonical import canonical_zoo, in_form, symmetry_that_holds
from .equal_time import from_the_same
from .measures import Nearest, mean, most_similar, parameter_statistics, picked
from .neighbours import CANDIDATES, Neighbours
from .scoring import Scorer, Scores
from .subjects import Subjects
from .verdict import Place, Plane, band, beside_fresh, share_of_gap, verdict, with_gain_at_fresh


# Where a curve passes the generated networks' similarity, it is refined by so many points.
REFINEMENTS = 3
TRAJECTORY_NETWORKS, MAPPED_NETWORKS, MOST_SPREAD = 20, 50, 2048
# Parameters of all networks of a baseline that are made at a time: for each time, the whole zoo is read.
BASELINE_VALUES = 2**27
PARTS = f"{UNFINISHED}scores"


class Point(NamedTuple):
    """A baseline of some strength: its scores, and its place in the plane."""

    strength: float
    scores: Scores
    place: Place


class Study:
    """The evaluation of one set of generated networks."""

    def __init__(self, subjects: Subjects, networks_per_point: int, parts: Path | None):
        self.trained, self.generated, self.fresh = subjects.trained, subjects.generated, subjects.fresh
        self.pipeline, self.networks_per_point = subjects.pipeline, networks_per_point
        self._denoising_steps = subjects.denoising_steps
        try:
            self.scorer = Scorer(subjects.task, self.trained, processes().device, parts)
        except RuntimeError as error:
            raise ZooError(f"The networks of {self.trained.folder} do not fit the task: {error}") from error
        self.targets = self.scorer.targets["test"]
        self.symmetry = symmetry_that_holds(self.trained, self.scorer.predict, self.scorer.inputs[:50])
        canonical = canonical_zoo(self.trained, self.symmetry, subjects.scratch / "canonical")
        self.standardized = StandardizedZoo(canonical[0] if canonical else self.trained)
        self._reference, self._scratch = canonical and canonical[1], subjects.scratch

    def figures(self) -> dict[str, Any]:
        """All that the report says, but for its pictures."""
        # All processes score these, before the main one goes on alone.
        groups, curves = self.groups, self.curves
        nearest = from_main(self._neighbours)
        return {
            "vector_size": self.trained.vector_size,
            "examples": len(self.targets),
            "chance": self.chance,
            "verdict": self._verdict(nearest),
            "front": band(self.place, self._places),
            "groups": groups,
            "similarity": self._pairwise,
            "nearest_l2": {key: nearest[key] for key in ("trained", "generated", "aligned")},
            "ensembles": {
                name: [{k: v for k, v in row.items() if k != "predictions"} for row in self.scores[name].ensembles]
                for name in ("trained", "generated", "fresh")
                if name in self.scores
            },
            "training": self._training(),
            "parameters": from_main(lambda: parameter_statistics(self.trained, self.generated)),
            "baselines_on": "networks as they are" if self._reference is None else "canonical form",
            "baselines": [
                {
                    "kind": kind,
                    "strength": strength,
                    "count": len(scores),
                    "accuracy": {"mean": scores.test.mean().item(), "min": scores.test.min().item()},
                    "maximum_similarity": {"mean": place.point[0]},
                }
                for kind, points in curves.items()
                for strength, scores, place in points
            ],
        }

    @cached_property
    def latents(self) -> torch.Tensor:
        """What the pipeline encodes the training networks to, `[N, C, L]`."""
        return from_main(lambda: self._encode(self.trained))

    @cached_property
    def scores(self) -> dict[str, Scores]:
        """How each group of networks does."""
        trained = self._score(self.trained, "trained")
        scores = {"trained": trained}
        average = mean(self.standardized.zoo).float()[None]
        scores["soup"] = self.scorer(lambda _: average, 1, "soup", average, calibrate=True)
        if trained.ensembles[-1]["predictions"] is not None:
            scores["ensemble"] = self.scorer.single(trained.ensembles[-1]["predictions"])
        scores["generated"] = self._score(self.generated, "generated")
        if self.fresh is not None:
            scores["fresh"] = self._score(self.fresh, "fresh")
        if self.pipeline is not None and self.pipeline.vae is not None:
            latents = self.latents
            scores["reconstructed"] = self.scorer(
                self._decoding(latents), len(latents), "reconstructed", latents, calibrate=True
            )
        return scores

    @cached_property
    def compared(self) -> torch.Tensor:
        """Indices of the training networks that are compared with all of them."""
        return picked(len(self.trained))

    @cached_property
    def similarity(self) -> dict[str, Nearest]:
        """Of each group, of the training networks those that are compared, to the most similar training networks."""
        wrong, some = self.scores["trained"].wrong, self.compared
        found = {
            name: most_similar(scores.wrong, wrong, CANDIDATES)
            for name, scores in self.scores.items()
            if name != "trained"
        }
        return {"trained": most_similar(wrong[some], wrong, CANDIDATES, own=some), **found}

    @cached_property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The figures of each group."""
        return {name: scores.summary(self.similarity[name].values[:, 0]) for name, scores in self.scores.items()}

    @cached_property
    def chance(self) -> float:
        """Accuracy of always answering the most frequent class; 0 where targets are no classes."""
        if self.targets.ndim != 1 or self.targets.is_floating_point():
            return 0.0
        return self.targets.unique(return_counts=True)[1].max().item() / len(self.targets)

    @cached_property
    def plane(self) -> Plane:
        """Of accuracy and similarity to the training networks."""
        return Plane(self.scores["trained"].wrong)

    @cached_property
    def place(self) -> Place:
        """Of the generated networks in that plane."""
        return self._place(self.scores["generated"], seed=2)

    @cached_property
    def _fresh_place(self) -> Place:
        return self._place(self.scores["fresh"], seed=3)

    @cached_property
    def curves(self) -> dict[str, list[Point]]:
        """Each baseline over its strengths, finer near the generated networks' similarity."""
        # Curves are finest where they are compared with.
        fresh = [self._fresh_place.point[0]] if "fresh" in self.scores else []
        at = [self.place.point[0], *fresh]
        broken = (self.chance + self.groups["trained"]["accuracy"]["mean"]) / 2
        strengths = {
            kind: strengths_of(kind, len(self.trained))
            for kind in KINDS
            if self._reference is not None or not KINDS[kind].independent
        }
        refined = REFINEMENTS * len(at) * len(strengths.keys() - {"soup"})
        found = {}
        with tqdm(
            total=sum(map(len, strengths.values())) + refined, desc="baselines", unit="point", leave=False
        ) as progress:
            for kind in strengths:
                found[kind] = self._curve(kind, strengths[kind], at, broken, progress)
        return found

    def _curve(
        self, kind: str, strengths: Sequence[float], at: list[float], broken: float, progress: Any
    ) -> list[Point]:
        points: list[Point] = []

        def add(place: int, strength: float) -> None:
            points.insert(place, self._point(kind, strength, len(points)))
            progress.update()

        for strength in strengths:
            add(len(points), strength)
            similar, accuracy = points[-1].place.point
            if accuracy < broken and similar < min(at):
                progress.total -= len(strengths) - len(points)  # the stronger ones need not be looked at
                break
        for place in [place for place in at for _ in range(REFINEMENTS)] if kind != "soup" else []:
            similarities = [point.place.point[0] for point in points]
            crossing = [i for i in range(1, len(points)) if similarities[i] <= place < similarities[i - 1]]
            if not crossing:
                progress.total -= 1
                continue
            last = crossing[0]
            add(last, (points[last - 1].strength * points[last].strength) ** 0.5)
        return points

    @cached_property
    def _places(self) -> dict[str, list[Place]]:
        """Those of the baselines; curves of those that change one network begin with the training networks."""
        curves = {kind: [point.place for point in points] for kind, points in self.curves.items()}
        unchanged = from_main(lambda: self.plane.unchanged(self.compared))
        return {kind: [unchanged, *places] if KINDS[kind].from_one else places for kind, places in curves.items()}

    def _verdict(self, nearest: dict[str, Any]) -> dict[str, Any]:
        curves = self._places
        against = {
            "curves": curves,
            "trained_accuracy": self.groups["trained"]["accuracy"]["mean"],
            "chance": self.chance,
        }
        found = verdict(
            self.place,
            copied=nearest["copied"],
            outside=nearest["outside_span"],
            dispersion=self._dispersion(),
            count=len(self.generated),
            **against,
        )
        if "fresh" in self.scores:
            place = self._fresh_place
            of_fresh = verdict(place, copied=0.0, outside=1.0, count=len(self.scores["fresh"]), **against)
            found["fresh_accuracy_gain"], found["fresh_interval"] = of_fresh["accuracy_gain"], of_fresh["interval"]
            found["share_of_gap"], found["share_of_gap_interval"] = share_of_gap(self.place, place, curves)
            found |= beside_fresh(self.place, place, curves)
            found["sentence"] = with_gain_at_fresh(found)
        return found

    def _score(self, zoo: WeightZoo, name: str) -> Scores:
        known = self.scorer.parts is None or zoo is self.trained  # which tells parts from others anyway
        return self.scorer(zoo.vectors, len(zoo), name, name if known else zoo.networks_sha256(), calibrate=True)

    def _decoding(self, latents: torch.Tensor) -> Callable[[range], torch.Tensor]:
        pipeline = self.pipeline
        assert pipeline is not None
        return lambda some: pipeline.decode(latents[some.start : some.stop]).cpu()

    def _encode(self, zoo: WeightZoo) -> torch.Tensor:
        assert self.pipeline is not None
        return torch.cat([self.pipeline.encode(batch).cpu() for batch in zoo.batches()])

    def _some_latents(self, zoo: WeightZoo) -> torch.Tensor:
        """Of all networks; where latents are as many as parameters, of as many, evenly picked, as are no load."""
        assert self.pipeline is not None
        if self.pipeline.vae is not None:
            return self._encode(zoo)
        some = evenly(len(zoo), max(2, min(MOST_SPREAD, BASELINE_VALUES // zoo.vector_size)))
        return self.pipeline.encode(zoo.vectors(some)).cpu()

    def _point(self, kind: str, strength: float, number: int) -> Point:
        # The average of all is one network however often it is made.
        count = 1 if kind == "soup" and strength == len(self.trained) else self.networks_per_point
        seed = 1000 * (1 + list(KINDS).index(kind)) + number
        seeds = torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
        baseline = Baseline(self.standardized, kind, strength)
        scores = self.scorer(
            lambda some: baseline.vectors(seeds[some.start : some.stop]),
            count,
            f"{kind} {strength}",
            torch.tensor(seeds),
            most_values=BASELINE_VALUES,
        )
        return Point(strength, scores, self._place(scores, seed))

    def _place(self, scores: Scores, seed: int) -> Place:
        """That of the main process: what is scored next follows from it, on whatever kinds of machines."""
        return from_main(lambda: self.plane.place(scores, seed))

    def _neighbours(self) -> dict[str, Any]:
        networks = self.trained, self.generated, self.scores["trained"].wrong, self.compared, self.similarity
        forms = self._forms["trained"], self._forms["generated"]
        return Neighbours(*networks, self.symmetry, forms).figures()

    @cached_property
    def _forms(self) -> dict[str, WeightZoo]:
        """The zoos in the form that baselines work on."""
        zoos = {"generated": self.generated, **({} if self.fresh is None else {"fresh": self.fresh})}
        if self.symmetry is not None and self._reference is not None:
            for name, zoo in zoos.items():
                zoos[name] = in_form(zoo, self.symmetry, self._reference, self._scratch / f"canonical-{name}")
        return {"trained": self.standardized.zoo, **zoos}

    @cached_property
    def _pairwise(self) -> dict[str, float | None]:
        wrong, every = self.scores["generated"].wrong, torch.arange(len(self.generated))
        alone = len(every) < 2
        return {
            "trained_trained": self.similarity["trained"].mean,
            "generated_generated": None if alone else most_similar(wrong, wrong, own=every).mean,
            "generated_trained": self.similarity["generated"].mean,
            "maximum_generated_trained": self.similarity["generated"].values.max().item(),
        }

    def _training(self) -> dict[str, Any] | None:
        """How training does that takes as long as generating, where the denoiser is told the initialization."""
        if self.pipeline is None or not self.pipeline.takes_initial:
            return None
        pipeline, steps = self.pipeline, self._denoising_steps(self.pipeline)
        bf16 = next(self.generated.rows()).get("mixed_precision") == "bf16"
        found = from_main(lambda: from_the_same(self.scorer.task, pipeline, steps, bf16))
        if found is None:
            return None
        facts, vectors = found
        scores = self.scorer(lambda some: vectors[some.start : some.stop], len(vectors), "training", vectors)
        return {**facts, "accuracy": {"mean": scores.test.mean().item(), "min": scores.test.min().item()}}

    def _dispersion(self) -> float | None:
        """How different errors of generated networks are among each other, in units of those of training networks."""
        pairs = self._pairwise
        of_trained, of_generated = pairs["trained_trained"], pairs["generated_generated"]
        if of_trained is None or of_generated is None or of_trained >= 1:
            return None
        return (1 - of_generated) / (1 - of_trained)

    def draw(
        self, report: dict[str, Any], denoising: tuple[list[int], list[torch.Tensor]] | None, folder: Path
    ) -> list[Path]:
        """Draws all pictures, PNG and SVG."""
        files = [
            *pictures.plane(report, self._shown(), folder),
            *pictures.parameters(self.trained, self.generated, folder),
            *pictures.overlap(self.scores["trained"].wrong, self.scores["generated"].wrong, folder),
            *pictures.calibration(report, folder),
            *pictures.weight_map(self._forms["trained"], self._mapped(), folder),
        ]
        if denoising is not None:
            files += pictures.denoising(*denoising, report, folder)
            of_trained, of_generated = self._some_latents(self.trained), self._some_latents(self.generated)
            files += pictures.training(self.pipeline, of_trained, of_generated, report, folder)
        return files

    def _shown(self) -> dict[str, tuple[list[int], torch.Tensor, torch.Tensor]]:
        """Places, similarity and accuracy of some networks of each group, of the training networks of those that are
        compared."""
        found = {}
        for name, scores in self.scores.items():
            some = picked(len(scores.test))
            similar = self.similarity[name].values[:, 0]
            found[name] = (some.tolist(), similar if name == "trained" else similar[some], scores.test[some])
        return found

    def _mapped(self) -> dict[str, Iterator[torch.Tensor]]:
        """Networks for the map, as vectors `[n, P]` at a time."""
        size = max(1, min(MAPPED_NETWORKS, BASELINE_VALUES // self.trained.vector_size))

        def made(kind: str, strength: float) -> Iterator[torch.Tensor]:
            baseline = Baseline(self.standardized, kind, strength)
            for start in range(0, MAPPED_NETWORKS, size):
                yield baseline.vectors(list(range(start, min(start + size, MAPPED_NETWORKS))))

        return {
            **{name: zoo.batches() for name, zoo in self._forms.items()},
            "trained": (self._forms["trained"].vectors(some.tolist()) for some in self.compared.split(size)),
            "gaussian": made("gaussian", 1.0),
            "soup": made("soup", min(16, len(self.trained))),
        }

    def denoising(self) -> tuple[list[int], list[torch.Tensor]] | None:
        """Accuracies of some networks, `[n]` each, if denoising ended after a step; nothing without a
        pipeline that samples by itself."""
        if self.pipeline is None:
            return None
        try:
            check_draws(self.pipeline)
        except PipelineError:
            return None
        kept: dict[int, list[torch.Tensor]] = {}

        def keep(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
            kept.setdefault(step + 1, []).append(tensors["latents"].cpu())  # of some networks after the others
            return {}

        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline(
            num_networks=min(TRAJECTORY_NETWORKS, self.networks_per_point),
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=keep,
        )
        steps = list(kept)
        shown = steps[:: max(1, len(steps) // 15)]
        shown = shown if shown[-1] == steps[-1] else [*shown, steps[-1]]

        def accuracies(latents: torch.Tensor) -> torch.Tensor:
            return self.scorer(self._decoding(latents), len(latents), "denoising", latents).test

        return shown, [accuracies(torch.cat(kept[step])) for step in shown]
