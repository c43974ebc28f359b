"""How near generated networks lie to training networks, and which are copies, in another order of units included."""

from functools import cached_property
from typing import Any

import torch

from ..networks.canonical import CanonicalForm, aligned_distances
from ..zoo import WeightZoo
from .canonical import MOST_ALIGNED_VALUES
from .measures import Nearest, most_similar, nearest, outside_span, spread
from .verdict import COPY_RATIO


# Training networks with the most similar errors to which a network is aligned.
CANDIDATES = 4
# Distances that are in memory at a time.
COMPARED_VALUES = 2**27


class Neighbours:
    r"""
    The neighbours of networks among the training networks.

    Args:
        trained (`WeightZoo`): N training networks.
        generated (`WeightZoo`): n others.
        wrong (`torch.Tensor`): Wrong predictions of the training networks, `[N, E]`.
        compared (`torch.Tensor`): Indices of the training networks that are compared with all.
        similar (`dict[str, Nearest]`): Those with the most similar errors, of the `trained` ones and the `generated`.
        symmetry (`CanonicalForm`, *optional*): Of the architecture.
        forms (`tuple[WeightZoo, WeightZoo]`): Both zoos in the form that baselines work on.
    """

    def __init__(
        self,
        trained: WeightZoo,
        generated: WeightZoo,
        wrong: torch.Tensor,
        compared: torch.Tensor,
        similar: dict[str, Nearest],
        symmetry: CanonicalForm | None,
        forms: tuple[WeightZoo, WeightZoo],
    ):
        self.trained, self.generated, self.wrong = trained, generated, wrong
        self.compared, self.similar, self.symmetry, self.forms = compared, similar, symmetry, forms

    def figures(self) -> dict[str, Any]:
        """`trained`, `generated` and `aligned` distances, the share that is `copied`, and what is `outside_span`."""
        every = torch.arange(len(self.generated))
        away = self._distances(self.generated, every, self.similar["generated"].indices)
        # Their own nearest neighbours, of those that are compared and of those that generated networks lie near to.
        some = torch.cat([self.compared, *(indices for _, indices in away.values())]).unique()
        own = self._distances(self.trained, some, self._similar(some), own=some)
        if "aligned" in own:
            # That of a network that is there twice, in another order, is 0.
            of_own, which = own["aligned"]
            own["aligned"] = torch.where(of_own > 0, of_own, own["stored"][0]), which
        copies = torch.zeros(len(every), dtype=torch.bool)
        for form, (distances, indices) in away.items():
            # A copy stays one when its hidden units are in another order.
            copies |= distances <= COPY_RATIO * own[form][0][torch.searchsorted(some, indices)]
        pairs = {"trained": own, "generated": away}
        spreads = {form: {name: spread(of[form][0]) for name, of in pairs.items()} for form in away}
        trained, generated = self.forms
        distances, indices = away["stored"]
        if trained is not self.trained:
            closest = nearest(generated, trained, every, None)
            distances, indices = closest.values[:, 0], closest.indices[:, 0]
        return {
            **spreads["stored"],
            "aligned": spreads.get("aligned"),
            "copied": copies.double().mean().item(),
            "outside_span": outside_span(trained, generated, indices, distances),
        }

    def _similar(self, some: torch.Tensor) -> torch.Tensor:
        """Training networks with the most similar errors, `[n, k]`, to these; all that are compared are among them."""
        wrong, known = self.wrong, torch.isin(some, self.compared)
        rest = some[~known]
        similar = torch.empty(len(some), self.similar["trained"].indices.shape[1], dtype=torch.long)
        similar[known] = self.similar["trained"].indices
        similar[~known] = most_similar(wrong[rest], wrong, CANDIDATES, own=rest).indices
        return similar

    def _distances(
        self, zoo: WeightZoo, some: torch.Tensor, similar: torch.Tensor, own: torch.Tensor | None = None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Distances `[n]` of some networks to the nearest training networks, and which those are: as they are stored,
        and, where hidden units are recognized, up to permutations and scales."""
        closest = nearest(zoo, self.trained, some, own)
        found = {"stored": (closest.values[:, 0], closest.indices[:, 0])}
        values = self.trained.vector_size * (len(self.trained) + len(self.generated))
        if self.symmetry is not None and values <= MOST_ALIGNED_VALUES:
            candidates = torch.cat([closest.indices, similar, self._alike(zoo, some, own)], 1)
            places = candidates.unique()
            # Units of one scale, too.
            ours, theirs = (
                self._balanced(one).double()
                for one in (zoo.vectors(some.tolist()), self.trained.vectors(places.tolist()))
            )
            distances, which = aligned_distances(self.symmetry, ours, theirs, torch.searchsorted(places, candidates))
            found["aligned"] = distances, places[which]
        return found

    def _alike(self, zoo: WeightZoo, some: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """The training networks, `[n, 1]`, with the nearest values in each tensor, in whatever order."""
        ours, theirs, found = self._sorted(zoo.vectors(some.tolist())), self._trained_sorted, []
        for rows in torch.arange(len(some)).split(max(1, COMPARED_VALUES // len(theirs))):
            distances = torch.cdist(ours[rows], theirs)
            if own is not None:
                distances[torch.arange(len(rows)), own[rows]] = torch.inf
            found.append(distances.argmin(1, keepdim=True))
        return torch.cat(found)

    @cached_property
    def _trained_sorted(self) -> torch.Tensor:
        return torch.cat([self._sorted(batch) for batch in self.trained.batches()])

    def _balanced(self, vectors: torch.Tensor) -> torch.Tensor:
        """Networks with hidden units of one scale, where these are recognized and no number is too large for it."""
        if self.symmetry is None:
            return vectors
        balanced = self.symmetry.balance(vectors)
        return torch.where(balanced.isfinite().all(1, keepdim=True), balanced, vectors)

    def _sorted(self, vectors: torch.Tensor) -> torch.Tensor:
        """The values of each tensor in one scale, which permutations of hidden units leave as they are."""
        vectors = self._balanced(vectors)
        slices = self.trained.layout.slices.values()
        return torch.cat([vectors[:, place].sort(1).values for place in slices], 1)
