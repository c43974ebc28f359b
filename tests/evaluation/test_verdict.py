"""Sets of networks of which the right verdict is known, since the test made them."""

from functools import cache

import pytest
import torch
from torch import nn

import pdiff_hf
from pdiff_hf.networks.trainer import NetworkTrainer
from pdiff_hf.tasks.digits import DigitsMLP


NETWORKS = 16
TRAJECTORY = 40
ZOOS = 4
EVERY_SEED = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 3))]


class HardDigits(DigitsMLP):
    """
    Digits with noise on their pixels, 200 of them to learn from and 1,397 to be tested on: 80 % are right, so that
    seeds differ, and as steps are noisy too, consecutive networks and their averages.
    """

    epochs = 16
    batch_size = 20
    learning_rate = 1e-2

    def data(self, split):
        parts = [super(HardDigits, self).data(part) for part in ("train", "validation", "test")]
        inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        inputs = inputs + 0.5 * torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
        few = {"train": slice(0, 200), "validation": slice(200, 400), "test": slice(400, None)}[split]
        return inputs[few], targets[few]

    def augment(self, inputs, generator):
        return inputs + 0.7 * torch.randn(inputs.shape, generator=generator).to(inputs)


def trainer(seed: int) -> NetworkTrainer:
    """A training run that has come to its end."""
    run = NetworkTrainer(HardDigits(), seed)
    for _ in range(run.task.epochs * run.steps_per_epoch):
        run.train_step()
    return run


@cache
def independent_zoo(number: int) -> list[dict]:
    """A network a seed; the seeds of different zoos are different ones."""
    return [trainer(1000 * number + seed).network.state_dict() for seed in range(NETWORKS)]


@cache
def trajectory_zoo(number: int) -> list[dict]:
    """What one network is after each of its further steps, which are larger ones."""
    run = trainer(500 + 1000 * number)
    for group in run.optimizer.param_groups:
        group["initial_lr"] = 2e-2
    zoo = []
    for step in range(20 + TRAJECTORY):
        run.train_step()
        if step >= 20:
            zoo.append({name: value.clone() for name, value in run.network.state_dict().items()})
    return zoo


def vectors(zoo: list[dict]) -> torch.Tensor:
    return torch.stack([nn.utils.parameters_to_vector(network.values()) for network in zoo]).cpu()


def networks(zoo: list[dict], values: torch.Tensor) -> list[dict]:
    """The state dicts of vectors `[n, P]`."""
    sizes = [tensor.numel() for tensor in zoo[0].values()]
    return [
        {name: part.view_as(zoo[0][name]) for name, part in zip(zoo[0], vector.split(sizes), strict=True)}
        for vector in values
    ]


def randomness(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(10_000 + seed)


def copies(zoo: list[dict], seed: int) -> list[dict]:
    return [zoo[i] for i in torch.randint(len(zoo), (NETWORKS,), generator=randomness(seed))]


def noisy(zoo: list[dict], seed: int, strength: float) -> list[dict]:
    """Training networks with noise of so many standard deviations of each parameter over the zoo."""
    draw, values = randomness(seed), vectors(zoo)
    chosen = values[torch.randint(len(zoo), (NETWORKS,), generator=draw)]
    return networks(zoo, chosen + strength * values.std(0) * torch.randn(chosen.shape, generator=draw))


def soups(zoo: list[dict], seed: int, size: int) -> list[dict]:
    draw, values = randomness(seed), vectors(zoo)
    return networks(
        zoo, torch.stack([values[torch.randperm(len(zoo), generator=draw)[:size]].mean(0) for _ in range(NETWORKS)])
    )


def interpolations(zoo: list[dict], seed: int, share: float) -> list[dict]:
    draw, values = randomness(seed), vectors(zoo)
    pairs = torch.stack([torch.randperm(len(zoo), generator=draw)[:2] for _ in range(NETWORKS)])
    return networks(zoo, torch.lerp(values[pairs[:, 0]], values[pairs[:, 1]], share))


def gaussian(zoo: list[dict], seed: int, strength: float) -> list[dict]:
    values = vectors(zoo)
    normal = torch.randn(NETWORKS, values.shape[1], generator=randomness(seed))
    return networks(zoo, values.mean(0) + strength * values.std(0) * normal)


def fresh(seed: int) -> list[dict]:
    return [trainer(100_000 + 1000 * seed + i).network.state_dict() for i in range(NETWORKS)]


def chance(seed: int) -> list[dict]:
    with torch.random.fork_rng():
        torch.manual_seed(10_000 + seed)
        return [HardDigits().build_network().state_dict() for _ in range(NETWORKS)]


def judge(zoo: list[dict], generated: list[dict]) -> dict:
    return pdiff_hf.evaluate(HardDigits(), trained=zoo, generated=generated)["verdict"]


def of_either_kind(seed: int) -> list[dict]:
    """A zoo, of another kind and another training for each seed."""
    return (independent_zoo if seed % 2 else trajectory_zoo)(seed // 2 % ZOOS)


every_seed = pytest.mark.parametrize("seed", EVERY_SEED)


@every_seed
def test_copies_are_memorized(seed):
    zoo = of_either_kind(seed)
    found = judge(zoo, copies(zoo, seed))
    assert found["label"] == "memorized", found
    assert found["copied"] == 1


@every_seed
def test_noise_on_independent_networks_is_no_better_than_noise(seed):
    zoo = independent_zoo(seed % ZOOS)
    found = judge(zoo, noisy(zoo, seed, (0.1, 0.2, 0.4)[seed % 3]))
    assert found["label"] == "no-better-than-noise", found
    assert found["outside_span"] > 0.9


@every_seed
def test_noise_on_a_trajectory_is_no_better_than_noise(seed):
    """Averages do better, mostly by points: what a little noise does no better than is noise all the same."""
    zoo = trajectory_zoo(seed % ZOOS)
    found = judge(zoo, noisy(zoo, seed, (1, 2, 4)[seed % 3]))
    assert found["label"] == "no-better-than-noise", found
    assert found["gain_over_noise"] < 0.01
    assert found["outside_span"] > 0.9


@every_seed
@pytest.mark.parametrize("size", [4, 16])
def test_soups_are_no_better_than_averaging(seed, size):
    zoo = trajectory_zoo(seed % ZOOS)
    found = judge(zoo, soups(zoo, seed, size))
    assert found["label"] == "no-better-than-averaging", found
    assert found["outside_span"] < 0.01


@every_seed
def test_interpolations_are_no_better_than_averaging(seed):
    zoo = trajectory_zoo(seed % ZOOS)
    found = judge(zoo, interpolations(zoo, seed, (0.25, 0.5)[seed % 2]))
    assert found["label"] == "no-better-than-averaging", found


@every_seed
def test_independent_noise_around_the_mean_is_never_above_the_front(seed):
    zoo = trajectory_zoo(seed % ZOOS)
    found = judge(zoo, gaussian(zoo, seed, (0.5, 1.0, 1.5)[seed % 3]))
    assert found["label"] in ("no-better-than-averaging", "on-the-front"), found


@every_seed
def test_networks_trained_from_new_seeds_are_above_the_front_of_a_trajectory(seed):
    found = judge(trajectory_zoo(seed % ZOOS), fresh(seed))
    assert found["label"] == "above-the-front", found
    assert found["interval"][0] > 0.005
    assert found["copied"] == 0


@every_seed
def test_networks_trained_from_new_seeds_are_not_below_the_front_of_independent_ones(seed):
    # Between these and the front on the canonical form there is too little room for so few networks to tell.
    found = judge(independent_zoo(seed % ZOOS), fresh(seed))
    assert found["label"] in ("above-the-front", "on-the-front", "no-better-than-averaging"), found
    assert found["interval"][1] > 0
    assert found["copied"] == 0


@every_seed
def test_untrained_networks_do_not_work(seed):
    found = judge(independent_zoo(seed % ZOOS), chance(seed))
    assert found["label"] == "not-working", found
