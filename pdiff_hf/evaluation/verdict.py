"""Is a set of generated networks worth more than what costs nothing? Its place against the front of the baselines."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from .measures import interval, most_similar, resample
from .scoring import Scores


# Higher than that of the other intervals, since a verdict compares with many baselines.
CONFIDENCE = 0.99
# Similarities at which the front is told, from the least to the greatest of the baselines.
BAND = 61
# A network whose distance to the nearest training network is less than this share of the latter's distance to its own
# neighbour is that network, for our purpose (the test of Yoon et al. 2023 for memorized images).
COPY_RATIO = 1 / 3
COPY_SIMILARITY = 0.95
AVERAGING = ("soup", "interpolation", "shrinking", "nearest-interpolation")
# Errors of generated networks that differ among each other by less than this share of what those of training networks
# do are those of one network, or of few.
COLLAPSED = 0.2
# Fewer networks may be good by chance, which a bootstrap over them does not show.
FEWEST = 10


@dataclass(frozen=True)
class Place:
    """Where a set of networks lies in the plane, in each of the bootstrap samples: accuracy and similarity `[B]`."""

    accuracy: torch.Tensor
    similarity: torch.Tensor

    @property
    def point(self) -> tuple[float, float]:
        """Similarity and accuracy of the sample itself, which comes first."""
        return self.similarity[0].item(), self.accuracy[0].item()


class Plane:
    r"""
    The plane of maximum similarity to a training network, and accuracy. Its uncertainty is a bootstrap over networks
    and over test examples at once, the same examples for all sets; the nearest training network of each network stays
    the one of the whole test split.

    Args:
        trained (`torch.Tensor`): Wrong predictions of the training networks, boolean `[M, E]`.
    """

    def __init__(self, trained: torch.Tensor):
        self.trained = trained
        examples = trained.shape[1]
        self.examples = torch.cat([torch.ones(1, examples), resample(examples, 1).float() * examples]).T

    def unchanged(self, some: torch.Tensor) -> Place:
        """That of the training networks themselves, of some of them `[n]`: where curves begin."""
        networks = torch.cat([torch.full((1, len(some)), 1 / len(some)), resample(len(some), 4).float()]).T
        accuracy = 1 - (self.trained[some].float() @ self.examples) / len(self.examples)
        mean = (accuracy * networks).sum(0)
        return Place(mean, torch.ones_like(mean))

    def place(self, scores: Scores, seed: int) -> Place:
        """The place of a set of networks; `seed` is that of the resampled networks."""
        wrong = scores.wrong
        nearest = self.trained[most_similar(wrong, self.trained).indices[:, 0]]
        both, either, wrong = (values.float() @ self.examples for values in (wrong & nearest, wrong | nearest, wrong))
        similar = torch.where(either == 0, 1.0, both / either.clamp_min(1))
        networks = torch.cat([torch.full((1, len(wrong)), 1 / len(wrong)), resample(len(wrong), seed).float()]).T
        accuracy = 1 - wrong / len(self.examples)
        return Place((accuracy * networks).sum(0), (similar * networks).sum(0))


def front(curve: list[Place], at: torch.Tensor) -> torch.Tensor:
    r"""
    The best accuracy `[B]` of a curve at similarities up to `at`: at one of its points, or between neighbours. Minus
    infinity where the curve does not reach so low a similarity.
    """
    best = torch.full_like(at, -torch.inf)
    for place in curve:
        # Similarities are float32: of flawless networks, 1 but for rounding.
        best = torch.where(place.similarity <= at + 1e-6, torch.maximum(best, place.accuracy), best)
    for a, b in pairwise(curve):
        low, high = torch.minimum(a.similarity, b.similarity), torch.maximum(a.similarity, b.similarity)
        share = (at - a.similarity) / torch.where(high == low, 1.0, b.similarity - a.similarity)
        between = a.accuracy + share * (b.accuracy - a.accuracy)
        best = torch.where((low < at) & (at < high), torch.maximum(best, between), best)
    return best


def band(generated: Place, curves: dict[str, list[Place]]) -> list[dict[str, Any]]:
    """The front over all similarities that baselines have: `similarity`, `accuracy` and its `interval` at each, that
    of the difference to the generated networks, which are tested on the same examples, put beside these."""
    similarities = [place.point[0] for curve in curves.values() for place in curve]
    accurate, found = generated.point[1], []
    for similar in torch.linspace(min(similarities), max(similarities), BAND).tolist():
        at = torch.full_like(generated.similarity, similar)
        above = gain(Place(generated.accuracy, at), curves)
        low, high = (accurate - end for end in interval(above[1:], CONFIDENCE)[::-1])
        best = accurate - above[0].item()
        if torch.isfinite(torch.tensor([best, low, high])).all():  # some samples do not reach the least similarities
            found.append({"similarity": similar, "accuracy": best, "interval": [low, high]})
    return found


def reached(curves: dict[str, list[Place]]) -> torch.Tensor:
    """The least similarity of the baselines, `[B]`."""
    return torch.stack([place.similarity for curve in curves.values() for place in curve]).amin(0)


def gain(generated: Place, curves: dict[str, list[Place]], least: torch.Tensor | None = None) -> torch.Tensor:
    """Accuracy above the curves at that similarity or below, or at the least one that is worth anything `[B]`, where
    it is below that: `[B]`, infinite where none reaches it."""
    at = generated.similarity if least is None else torch.maximum(generated.similarity, least)
    fronts = [front(curve, at) for curve in curves.values()]
    return generated.accuracy - torch.stack(fronts).amax(0)


def share_of_gap(
    generated: Place, fresh: Place, curves: dict[str, list[Place]], at_fresh: bool = False
) -> tuple[float | None, list[float | None]]:
    """How much of the way from the front to fresh networks generated ones go: the ratio of the gains of both over the
    front, each at its own similarity, or both at no less than that of the fresh ones, and its interval; None where
    fresh networks are not clear of the front."""
    least = reached(curves)
    ours = gain(generated, curves, torch.maximum(fresh.similarity, least) if at_fresh else least)
    theirs = gain(fresh, curves, least)
    if not interval(theirs[1:], CONFIDENCE)[0] > 0:
        return None, [None, None]
    shares = ours / theirs
    low, high = interval(shares[1:], CONFIDENCE)
    return _number(shares[0]), [_number(torch.tensor(low)), _number(torch.tensor(high))]


def beside_fresh(generated: Place, fresh: Place, curves: dict[str, list[Place]]) -> dict[str, Any]:
    """The gain and the share where no similarity below that of fresh networks counts: to be less similar to the zoo
    than new networks are is nothing that is won."""
    over = gain(generated, curves, torch.maximum(fresh.similarity, reached(curves)))
    share, interval_of_share = share_of_gap(generated, fresh, curves, at_fresh=True)
    return {
        "gain_at_fresh": over[0].item(),
        "gain_at_fresh_interval": interval(over[1:], CONFIDENCE),
        "share_at_fresh": share,
        "share_at_fresh_interval": interval_of_share,
    }


def with_gain_at_fresh(found: dict[str, Any]) -> str:
    """The sentence of a verdict that knows fresh networks."""
    there = points(found["gain_at_fresh"], found["gain_at_fresh_interval"])
    at = "at no less than the similarity of networks of new seeds, below which nothing is won"
    return f"{found['sentence'][:-1]}; {at}, {there} the front."


def verdict(
    generated: Place,
    curves: dict[str, list[Place]],
    trained_accuracy: float,
    chance: float,
    copied: float,
    outside: float,
    dispersion: float | None = None,
    count: int = FEWEST,
) -> dict[str, Any]:
    r"""
    What to think of generated networks.

    Args:
        generated (`Place`): Theirs.
        curves (`dict[str, list[Place]]`): The baselines', by kind, in the order of their strengths.
        trained_accuracy (`float`): Mean accuracy of the training networks.
        chance (`float`): Accuracy of always answering the most frequent class.
        copied (`float`): Share of generated networks that lie on a training network (see `COPY_RATIO`).
        outside (`float`):
            Share of the (squared) way from the nearest training network to the generated one that no weighted sum of
            training networks can go: noise goes nearly all of it outside, averaging none.
        dispersion (`float`, *optional*):
            How different the errors of generated networks are among each other, in units of those of training
            networks.
        count (`int`, *optional*, defaults to 10): Generated networks: of fewer than 10 nothing good is said.

    Returns:
        `dict`: `label`, `accuracy_gain` over the front, its `interval` and `confidence`, the
        gains over noise and over averaging (None where that baseline is nowhere so dissimilar), and `sentence`.
    """
    similar, accuracy = generated.point
    # To be less similar than any baseline is worth no more than to be as the least similar one.
    least = reached(curves)
    over_all = gain(generated, curves, least)
    noise, averages = {"noise": curves["noise"]}, {kind: curves[kind] for kind in AVERAGING if kind in curves}
    over_noise, over_averaging = gain(generated, noise), gain(generated, averages)
    low, high = interval(over_all[1:], CONFIDENCE)
    as_noise, as_averaging = (
        interval(gain(generated, some, least)[1:], CONFIDENCE)[0] <= 0 for some in (noise, averages)
    )
    # Where both do as well, the way they went tells them apart.
    noisy = as_noise and (not as_averaging or outside >= 0.5)

    margin = f"{points(over_all[0].item(), [low, high])} the front of the baselines"
    place = f"accuracy {100 * accuracy:.2f} % at similarity {similar:.3f}"
    # Where guessing is as good as training networks, what is far from both does not work.
    if accuracy < ((chance + trained_accuracy) / 2 if trained_accuracy > chance else chance / 2):
        label = "not-working"
        sentence = (
            f"The generated networks do not work: {100 * accuracy:.2f} %, where training networks reach "
            f"{100 * trained_accuracy:.2f} % and guessing {100 * chance:.2f} %."
        )
    elif copied > 0.5 and similar >= COPY_SIMILARITY:
        label = "memorized"
        sentence = f"{100 * copied:.0f} % of the generated networks are copies of training networks ({place})."
    elif dispersion is not None and dispersion < COLLAPSED:
        label = "collapsed"
        sentence = (
            f"The generated networks are nearly one network: their errors differ by {100 * dispersion:.0f} % of what "
            f"those of training networks do ({place}, {margin})."
        )
    elif low > 0 and count < FEWEST:
        label = "on-the-front"
        sentence = f"Too few networks, {count}, to be called above the front: {place}, {margin}."
    elif low > 0:
        label = "above-the-front"
        sentence = f"Above the front: {place}, {margin}."
    elif noisy:
        label = "no-better-than-noise"
        sentence = f"No better than training networks with noise on their weights: {place}, {margin}."
    elif as_averaging:
        label = "no-better-than-averaging"
        sentence = f"No better than averages of training networks: {place}, {margin}."
    else:
        label = "on-the-front"
        sentence = f"Not above the front, though better than noise and averages: {place}, {margin}."
    return {
        "label": label,
        "accuracy_gain": over_all[0].item(),
        "interval": [low, high],
        "confidence": CONFIDENCE,
        "gain_over_noise": _number(over_noise[0]),
        "gain_over_averaging": _number(over_averaging[0]),
        "copied": copied,
        "outside_span": outside,
        "dispersion": dispersion,
        "sentence": sentence,
    }


def points(gain: float, interval: list[float]) -> str:
    """How far above (+) or below (-) something, and the 99 % interval of that."""
    low, high = (100 * end for end in interval)
    return f"{100 * gain:+.2f} points (99 % interval {low:+.2f} to {high:+.2f}) against"


def _number(value: torch.Tensor) -> float | None:
    return value.item() if torch.isfinite(value) else None
