"""From a condition to a network without a generator: retrieval, averages, ridge regression, a hypernetwork."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..networks.behaviour import Behaviour
from ..pipelines.neural_network_diffusion import ConditionEncoder
from ..runs import own_randomness


Row = dict[str, Any]
Candidate = TypeVar("Candidate")
# From rows to networks, normalized vectors `[n, P]`.
Answer = Callable[[Sequence[Row]], torch.Tensor]
# Numbers of the conditions whose products of two, and of three, are features.
MOST_FEATURES = 2000
# Of ridge regression, in units of the number of networks.
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
NEIGHBOURS = (1, 4, 16)
# Of the hypernetwork; more steps where the generator has seen more networks.
HIDDEN, STEPS, BATCH, RATE = 512, 2000, 128, 1e-3
# Outputs of the training networks that are kept: half a gigabyte.
MOST_OUTPUTS = 2**27
# Of the difference of outputs in the hypernetwork's loss: whichever is best after this share of those steps.
WEIGHTS, CHOSEN_AFTER = (1.0, 256.0), 1 / 4


class Conditions:
    r"""
    Conditions as numbers: standardized, a word as a number for each known one.

    Args:
        rows (`Sequence[dict]`): Those of the training networks.
    """

    def __init__(self, rows: Sequence[Row]):
        self.encoder = ConditionEncoder.from_rows(rows, list(rows[0]), 1)
        self.rows = self(rows)

    def __call__(self, rows: Sequence[Row]) -> torch.Tensor:
        """`[n, numbers]`."""
        codes, parts, start = self.encoder.codes(rows), [], 0
        for column in self.encoder.config.columns:
            if column["kind"] == "word":
                parts.append(F.one_hot(codes[:, start].long(), len(column["words"])).float())
                start += 1
            else:
                parts.append(codes[:, start : start + len(column["mean"])])
                start += len(column["mean"])
        return torch.cat(parts, 1)

    def nearest(self, rows: Sequence[Row], count: int) -> torch.Tensor:
        """Indices of the training networks of each row's nearest conditions, ties included: a mask `[n, N]`."""
        distances = torch.cdist(self(rows), self.rows)
        kinds = self.rows.unique(dim=0)
        reach = torch.cdist(self(rows), kinds).sort(1).values[:, min(count, len(kinds)) - 1 :][:, :1]
        return distances <= reach + 1e-4


def answers(
    rows: Sequence[Row],
    networks: torch.Tensor,
    behaviour: Behaviour | None,
    seed: int,
    on_validation: Callable[[Answer], float],
    mix: Callable[[torch.Tensor], torch.Tensor] | None = None,
    seen: int = 0,
    weight: float = 1.0,
) -> dict[str, Answer]:
    r"""
    What needs no generator, by name; each as strong as validation conditions prefer.

    Args:
        rows (`Sequence[dict]`): The conditions of the training networks.
        networks (`torch.Tensor`): These networks, in canonical form and normalized, `[N, P]`.
        behaviour (`Behaviour`, *optional*): The loss on outputs that the hypernetwork shares with the generator.
        seed (`int`): Of the hypernetwork.
        on_validation (`Callable`): The accuracy of an answer on validation conditions.
        mix (`Callable`, *optional*): A network `[P]` of these, by a boolean mask `[N]`: of adapters, by their updates.
        seen (`int`, *optional*, defaults to 0): Networks that the generator saw: no more than the hypernetwork does.
        weight (`float`, *optional*, defaults to 1.0): How much outputs count in the generator's loss, which is tried.
    """
    conditions = Conditions(rows)
    candidates: dict[str, list[Answer]] = {
        "mean network": [lambda asked: networks.mean(0).expand(len(asked), -1)],
        "nearest condition": [lambda asked: networks[conditions.nearest(asked, 1).int().argmax(1)]],
        "mean of the nearest": [_averaging(conditions, networks, count) for count in NEIGHBOURS],
    }
    if mix is not None:
        candidates["mix of the nearest"] = [_mixing(conditions, mix, count) for count in NEIGHBOURS]
    for degree, name in ((1, "ridge regression"), (2, "ridge, pairs"), (3, "ridge, triples")):
        features = _interactions(conditions.rows, degree)
        if features is not None:
            candidates[name] = _ridge(conditions, features, networks, degree)
    found = {name: _best(some, on_validation) for name, some in candidates.items()}

    def hypernetwork(weight: float, steps: int) -> Answer:
        return _hypernetwork(conditions, networks, behaviour, seed, weight, steps)

    weights = sorted({*WEIGHTS, weight}) if behaviour is not None else WEIGHTS[:1]
    few = int(CHOSEN_AFTER * STEPS)
    best = _best(weights, lambda one: on_validation(hypernetwork(one, few)))
    return {**found, "hypernetwork": hypernetwork(best, max(STEPS, -(-seen // BATCH)))}


def _best(candidates: Sequence[Candidate], measure: Callable[[Candidate], float]) -> Candidate:
    """The one that measures most; a single one is taken without measuring."""
    return max(candidates, key=measure) if len(candidates) > 1 else candidates[0]


def _averaging(conditions: Conditions, networks: torch.Tensor, count: int) -> Answer:
    def answer(asked: Sequence[Row]) -> torch.Tensor:
        near = conditions.nearest(asked, count).float()
        return near @ networks / near.sum(1, keepdim=True)

    return answer


def _mixing(conditions: Conditions, mix: Callable[[torch.Tensor], torch.Tensor], count: int) -> Answer:
    return lambda asked: torch.stack([mix(near) for near in conditions.nearest(asked, count)])


def _interactions(numbers: torch.Tensor, degree: int) -> torch.Tensor | None:
    """Products of up to so many different numbers, and a constant, `[n, features]`; None where they are too many."""
    places = [
        combination
        for size in range(1, degree + 1)
        for combination in itertools.islice(itertools.combinations(range(numbers.shape[1]), size), MOST_FEATURES + 1)
    ]
    if len(places) > MOST_FEATURES or (degree > 1 and numbers.shape[1] < degree):
        return None
    products = [numbers[:, list(combination)].prod(1) for combination in places]
    return torch.stack([torch.ones(len(numbers)), *products], 1)


def _ridge(conditions: Conditions, features: torch.Tensor, networks: torch.Tensor, degree: int) -> list[Answer]:
    inputs = features.double()
    gram, products = inputs.T @ inputs, inputs.T @ networks.double()
    penalized = torch.eye(len(gram), dtype=gram.dtype)
    penalized[0, 0] = 0  # the constant is free
    strengths = [penalty * len(inputs) for penalty in PENALTIES]
    weights = [torch.linalg.solve(gram + strength * penalized, products).float() for strength in strengths]

    def answer(asked: Sequence[Row], solved: torch.Tensor) -> torch.Tensor:
        some = _interactions(conditions(asked), degree)
        assert some is not None
        return some @ solved

    return [lambda asked, solved=solved: answer(asked, solved) for solved in weights]  # type: ignore[misc]


def _hypernetwork(
    conditions: Conditions,
    networks: torch.Tensor,
    behaviour: Behaviour | None,
    seed: int,
    weight: float,
    steps: int,
) -> Answer:
    """A perceptron from the condition to the network, trained on the same networks with the same losses, the
    difference of outputs with this weight. It is trained on the device of that difference, and answers on the CPU."""
    device = networks.device if behaviour is None else behaviour.layout.device
    sizes = (conditions.rows.shape[1], HIDDEN, HIDDEN, networks.shape[1])
    with own_randomness():
        torch.manual_seed(seed)
        layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.SiLU())]
    model = nn.Sequential(*layers[:-1]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    known = None if behaviour is None else _known_outputs(behaviour, networks, steps)
    with torch.enable_grad():
        for _ in tqdm(range(steps), desc=f"train hypernetwork (outputs count {weight:g})", unit="step", leave=False):
            indices = torch.randint(len(networks), (BATCH,), generator=generator)
            predicted, stored = model(conditions.rows[indices].to(device)), networks[indices].to(device)
            loss = F.mse_loss(predicted, stored)
            if behaviour is not None:
                inputs = behaviour.draw(1, generator)[0]
                if known is None:
                    loss = loss + weight * behaviour(predicted, stored, inputs)
                else:
                    expected = known[indices][:, inputs].to(device)
                    loss = loss + weight * behaviour.difference(predicted, expected, inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return lambda asked: model(conditions(asked).to(device)).detach().cpu()


@torch.no_grad()
def _known_outputs(behaviour: Behaviour, networks: torch.Tensor, steps: int) -> torch.Tensor | None:
    """Of all networks on all inputs, `[N, E, ...]`, where that is less than what so many steps compare, and fits."""
    count, device = len(behaviour.inputs), behaviour.layout.device
    values = behaviour.outputs(networks[:1].to(device), behaviour.inputs[:1]).numel() * len(networks) * count
    if values > MOST_OUTPUTS or len(networks) * count > steps * BATCH * behaviour.count:
        return None
    parts = networks.split(BATCH // 8)
    return torch.cat([behaviour.outputs(some.to(device), behaviour.inputs).cpu() for some in parts])
