"""The cheap generators: what they are called with is the pipeline's, what they make is what they say."""

import inspect

import pytest
import torch
from torch import nn

from pdiff_hf import Baseline, NeuralNetworkDiffusionPipeline, ParameterLayout, WeightZoo
from pdiff_hf.evaluation.baselines import KINDS, StandardizedZoo


STRENGTHS = {"noise": 0.5, "soup": 4, "interpolation": 0.3, "gaussian": 1.0, "low-rank-gaussian": 1.0}
STRENGTHS |= {"shrinking": 0.3, "difference": 0.5, "nearest-interpolation": 0.3}
EVERY_KIND = pytest.mark.parametrize("kind", STRENGTHS)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> StandardizedZoo:
    """Twelve networks with correlated parameters, of which one is the same everywhere, and positive variances."""
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout.from_state_dict(build().state_dict())
    size = layout.vector_size
    vectors = torch.randn(12, size, generator=generator) @ torch.randn(size, size, generator=generator)
    vectors += 5 * torch.randn(size, generator=generator)
    vectors[:, 0] = 0.1
    places = variances(layout)
    vectors[:, places] = (vectors[:, places] / 10).exp()
    with WeightZoo.create(tmp_path_factory.mktemp("baselines") / "zoo", layout, networks_per_shard=5) as zoo:
        for vector in vectors:
            zoo.append(vector)
    return StandardizedZoo(zoo)


def variances(layout: ParameterLayout) -> torch.Tensor:
    """Where running variances are in the vector."""
    return torch.cat(
        [
            torch.full((torch.Size(t["shape"]).numel(),), t["name"].endswith("running_var"))
            for t in layout.tensors("generated")
        ]
    )


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(
    source: StandardizedZoo, kind: str, strength: float, count: int, seed: int = 0, **arguments
) -> torch.Tensor:
    (generator,) = seeded(seed)
    made = Baseline(source, kind, strength)(count, generator, output_type="pt", **arguments)
    return made.state_dicts


def on_logarithms(source: StandardizedZoo, vectors: torch.Tensor) -> torch.Tensor:
    """Vectors in double precision, running variances by their logarithms."""
    places = variances(source.layout)
    values = vectors.double()
    values[:, places] = values[:, places].log()
    return values


def test_the_arguments_that_a_baseline_takes_are_arguments_of_the_pipeline():
    ours = inspect.signature(Baseline.__call__).parameters
    theirs = inspect.signature(NeuralNetworkDiffusionPipeline.__call__).parameters
    assert set(ours) <= set(theirs)
    for name, parameter in ours.items():
        assert parameter.default == theirs[name].default, name


def test_as_many_networks_as_generators_are_made(source):
    baseline = Baseline(source, "soup", 2)
    assert len(baseline(generator=seeded(0, 1, 2)).state_dicts) == 3
    assert len(baseline().state_dicts) == 1


def test_numbers_that_do_not_fit_are_refused_as_the_pipeline_refuses_them(source):
    baseline = Baseline(source, "soup", 2)
    with pytest.raises(ValueError, match="2 generators were passed for 3 networks: pass one for each"):
        baseline(3, seeded(0, 1))
    with pytest.raises(ValueError, match="`num_networks` has to be a positive integer, and is 0"):
        baseline(0)
    with pytest.raises(ValueError, match="`chunk_size` has to be a positive integer, and is 0"):
        baseline(2, chunk_size=0)


@pytest.mark.parametrize("strength", [0.5, 0, -1, 13, 2.5])
def test_soups_of_a_number_that_there_is_not_are_refused(source, strength):
    with pytest.raises(ValueError, match=r"soup.* 12"):
        Baseline(source, "soup", strength)


@EVERY_KIND
def test_state_dicts_load_into_the_base_network(source, kind):
    (generator,) = seeded(0)
    states = Baseline(source, kind, STRENGTHS[kind])(num_networks=3, generator=generator).state_dicts
    assert len(states) == 3
    for state in states:
        network = build()
        network.load_state_dict(state, strict=True)
        assert torch.isfinite(network.eval()(torch.ones(2, 3))).all()
    vectors = sample(source, kind, STRENGTHS[kind], 3)
    assert torch.equal(torch.stack([source.layout.flatten(state) for state in states]), vectors)


@EVERY_KIND
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_networks_do_not_depend_on_the_chunk_size(source, kind, chunk_size):
    # Matrix products of another size round otherwise.
    torch.testing.assert_close(
        sample(source, kind, STRENGTHS[kind], 7, chunk_size=chunk_size), sample(source, kind, STRENGTHS[kind], 7)
    )


@EVERY_KIND
def test_the_first_networks_are_the_same_however_many_are_made(source, kind):
    torch.testing.assert_close(sample(source, kind, STRENGTHS[kind], 3), sample(source, kind, STRENGTHS[kind], 8)[:3])


@EVERY_KIND
def test_a_generator_for_each_network_makes_each_of_them_alone(source, kind):
    baseline = Baseline(source, kind, STRENGTHS[kind])
    together = baseline(3, seeded(5, 6, 7), output_type="pt").state_dicts
    alone = [baseline(1, seeded(seed), output_type="pt").state_dicts[0] for seed in (5, 6, 7)]
    torch.testing.assert_close(together, torch.stack(alone))
    again = baseline(3, seeded(5, 6, 7), output_type="pt").state_dicts
    assert torch.equal(together, again)


@EVERY_KIND
def test_other_seeds_make_other_networks(source, kind):
    networks = sample(source, kind, STRENGTHS[kind], 20)
    assert len(networks.unique(dim=0)) > 10
    assert not torch.equal(networks, sample(source, kind, STRENGTHS[kind], 20, seed=1))


def test_the_result_is_a_tuple_where_that_is_asked_for(source):
    (states,) = Baseline(source, "soup", 2)(2, seeded(0)[0], return_dict=False)
    assert [set(state) for state in states] == [set(build().state_dict())] * 2


def test_unknown_kinds_and_outputs_are_refused(source):
    with pytest.raises(ValueError, match=r"There is no baseline 'magic': noise, soup"):
        Baseline(source, "magic", 1)
    with pytest.raises(ValueError, match=r"`output_type` is 'np'; expected 'state_dict' or 'pt'"):
        Baseline(source, "soup", 2)(1, output_type="np")


def test_a_zoo_is_taken_as_well_as_its_statistics(source):
    made = Baseline(source.zoo, "gaussian", 1.0)(3, seeded(0)[0], output_type="pt").state_dicts
    assert torch.equal(made, sample(source, "gaussian", 1.0, 3))


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_gaussians_have_the_moments_of_the_zoo(source, strength):
    """
    Of 4,000 samples the mean is off by std / 63, and the variance by 2.2 % of itself (one standard error each; 27
    parameters are compared at five of them). Covariances of the zoo are those over N, not N - 1.
    """
    zoo = on_logarithms(source, source.zoo.vectors())
    mean, std = zoo.mean(0), zoo.std(0, correction=0)
    covariance = torch.cov(zoo.T, correction=0)
    scale = torch.outer(std, std).clamp_min(1e-12)
    for kind in ("gaussian", "low-rank-gaussian"):
        made = on_logarithms(source, sample(source, kind, strength, 4000))
        assert ((made.mean(0) - mean).abs() <= 5 * strength * std / 4000**0.5 + 1e-5).all()
        torch.testing.assert_close(made.std(0, correction=0), strength * std, rtol=0.06, atol=1e-5)
        expected = covariance if kind == "low-rank-gaussian" else torch.diag(covariance.diag())
        found = torch.cov(made.T, correction=0) / strength**2
        assert ((found - expected) / scale).abs()[1:, 1:].max() < 0.12


def test_the_low_rank_gaussian_stays_within_the_span_of_the_zoo(source):
    zoo = on_logarithms(source, source.zoo.vectors())
    made = on_logarithms(source, sample(source, "low-rank-gaussian", 1.0, 5)) - zoo.mean(0)
    differences = (zoo - zoo.mean(0)).T
    found = differences @ torch.linalg.lstsq(differences, made.T, driver="gelsd").solution
    torch.testing.assert_close(found.T, made, rtol=1e-4, atol=1e-4)


def test_noise_is_around_training_networks_in_units_of_each_parameters_deviation(source):
    zoo = on_logarithms(source, source.zoo.vectors())
    std = zoo.std(0, correction=0)
    made = on_logarithms(source, sample(source, "noise", 0.01, 600))
    parents = torch.cdist(made / std.clamp_min(1e-9), zoo / std.clamp_min(1e-9)).argmin(1)
    # Each of twelve is drawn 50 times, give or take seven.
    assert parents.bincount(minlength=12).min() > 15
    away = made - zoo[parents]
    torch.testing.assert_close(away.std(0, correction=0), 0.01 * std, rtol=0.2, atol=1e-5)


@pytest.mark.parametrize("size", [2, 5, 12])
def test_soups_are_averages_of_different_networks(source, size):
    zoo = on_logarithms(source, source.zoo.vectors())
    made = on_logarithms(source, sample(source, "soup", size, 6))
    weights = torch.linalg.lstsq(torch.cat([zoo, torch.ones(12, 1)], 1).T, torch.cat([made, torch.ones(6, 1)], 1).T)
    shares = (weights.solution * size).round()
    assert shares.sum(0).tolist() == [size] * 6
    assert set(shares.flatten().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close((shares / size).T @ zoo, made, rtol=1e-4, atol=1e-4)


def test_interpolations_begin_and_end_at_training_networks(source):
    zoo = source.zoo.vectors()
    begin, end, middle = (sample(source, "interpolation", share, 10) for share in (0.0, 1.0, 0.5))
    first, second = torch.cdist(begin, zoo).argmin(1), torch.cdist(end, zoo).argmin(1)
    assert (first != second).all()
    torch.testing.assert_close(begin, zoo[first], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, zoo[second], rtol=1e-4, atol=1e-4)
    values = on_logarithms(source, zoo)
    torch.testing.assert_close(
        on_logarithms(source, middle), (values[first] + values[second]) / 2, rtol=1e-4, atol=1e-4
    )


def test_no_strength_at_all_is_the_zoo_or_its_mean(source):
    zoo = on_logarithms(source, source.zoo.vectors())
    for kind in ("gaussian", "low-rank-gaussian"):
        made = on_logarithms(source, sample(source, kind, 0.0, 2))
        torch.testing.assert_close(made, zoo.mean(0).expand(2, -1), rtol=1e-4, atol=1e-4)
    copies = on_logarithms(source, sample(source, "noise", 0.0, 5))
    assert torch.cdist(copies, zoo).amin(1).max() < 1e-3


@EVERY_KIND
@pytest.mark.parametrize("strength", [1, 10])
def test_constants_are_exact_and_variances_positive(source, kind, strength):
    if kind == "soup":
        strength = min(strength, 12)
    made = sample(source, kind, strength, 50)
    assert torch.isfinite(made).all()
    assert (made[:, 0] == source.zoo[0][0]).all()
    assert (made[:, variances(source.layout)] > 0).all()


def test_frozen_tensors_are_those_of_the_zoo(tmp_path):
    state = build().state_dict()
    layout = ParameterLayout.from_state_dict(state, ("2.*",))
    with WeightZoo.create(tmp_path / "zoo", layout) as zoo:
        for seed in range(3):
            zoo.append(torch.randn(layout.vector_size, generator=torch.Generator().manual_seed(seed)))
    for made in Baseline(zoo, "gaussian", 1.0)(2, seeded(0)[0]).state_dicts:
        assert all(torch.equal(made[name], value) for name, value in state.items() if not name.startswith("2."))


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_shrinking_goes_straight_to_the_mean(source, strength):
    zoo = on_logarithms(source, source.zoo.vectors())
    made = on_logarithms(source, sample(source, "shrinking", strength, 30))
    expected = strength * zoo.mean(0) + (1 - strength) * zoo
    assert torch.cdist(made, expected).amin(1).max() < 1e-3 * zoo.norm(dim=1).max()


def test_a_difference_is_of_two_others(source):
    zoo = on_logarithms(source, source.zoo.vectors())
    made = on_logarithms(source, sample(source, "difference", 0.5, 20))
    candidates = torch.stack(
        [
            zoo[a] + 0.5 * (zoo[b] - zoo[c])
            for a in range(12)
            for b in range(12)
            for c in range(12)
            if len({a, b, c}) == 3
        ]
    )
    assert torch.cdist(made, candidates).amin(1).max() < 1e-3 * zoo.norm(dim=1).max()
    few = StandardizedZoo(source.zoo)
    assert torch.isfinite(sample(few, "difference", 0.5, 5)).all()


def test_the_partner_is_the_nearest_of_the_others(source):
    zoo = on_logarithms(source, source.zoo.vectors())
    made = on_logarithms(source, sample(source, "nearest-interpolation", 0.3, 20))
    scaled = zoo / source.layout.std.double().clamp_min(1e-12)
    scaled[:, 0] = 0  # a constant
    partner = torch.cdist(scaled, scaled).fill_diagonal_(torch.inf).argmin(1)
    expected = 0.7 * zoo + 0.3 * zoo[partner]
    assert torch.cdist(made, expected).amin(1).max() < 1e-3 * zoo.norm(dim=1).max()


def test_every_kind_is_tested_here():
    assert set(STRENGTHS) == set(KINDS)


def test_only_networks_that_are_combined_are_read(source, tmp_path):
    with WeightZoo.create(tmp_path / "zoo", source.zoo.layout, networks_per_shard=1) as zoo:
        for vector in source.zoo.vectors():
            zoo.append(vector)
    other = StandardizedZoo(zoo)
    whole = sample(other, "interpolation", 0.3, 1)
    read: list[int] = []
    vectors = zoo.vectors
    zoo.vectors = lambda indices: read.extend(indices) or vectors(indices)
    assert torch.equal(sample(other, "interpolation", 0.3, 1), whole)
    assert len(read) == 2
