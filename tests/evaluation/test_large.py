"""Zoos of many networks: a part at a time, with the results of all at once; and what is said of collapsed ones."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import pdiff_hf
from pdiff_hf import ParameterLayout, WeightZoo
from pdiff_hf.evaluation import measures
from pdiff_hf.evaluation.measures import most_similar, nearest, outside_span, picked, resampled_means, similarity
from pdiff_hf.evaluation.verdict import Place, band, beside_fresh, share_of_gap, verdict, with_gain_at_fresh

from .test_verdict import HardDigits, independent_zoo, noisy


@pytest.fixture
def parts(monkeypatch):
    """Whatever is done in parts is done in many."""
    monkeypatch.setattr(measures, "BATCH_VALUES", 64)


def wrong(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 30, generator=torch.Generator().manual_seed(seed)) < 0.3


def zoo_of(folder, count: int, seed: int) -> WeightZoo:
    layout = ParameterLayout.from_state_dict(nn.Linear(4, 3).state_dict())
    with WeightZoo.create(folder, layout) as zoo:
        for vector in torch.randn(count, 15, generator=torch.Generator().manual_seed(seed)):
            zoo.append(vector)
    return zoo


def test_the_most_similar_are_found_in_parts(parts):
    a, b = wrong(9, 0), wrong(17, 1)
    expected = similarity(a, b)
    found = most_similar(a, b, 3)
    assert torch.equal(found.values, expected.topk(3, 1).values)
    assert torch.equal(expected.gather(1, found.indices), found.values)
    assert found.mean == pytest.approx(expected.mean().item())


def test_a_network_is_not_the_most_similar_to_itself(parts):
    b = wrong(17, 1)
    some = torch.tensor([2, 5, 16])
    expected = similarity(b[some], b)
    off = expected.clone()
    off[torch.arange(3), some] = -1
    found = most_similar(b[some], b, 2, own=some)
    assert torch.equal(found.values, off.topk(2, 1).values)
    assert found.mean == pytest.approx((expected.sum().item() - 3) / (3 * 16))
    assert most_similar(b[:2], b[:2], 5, own=torch.arange(2)).values.shape == (2, 1)


def test_the_nearest_are_found_in_parts(parts, tmp_path):
    a, b = zoo_of(tmp_path / "a", 9, 0), zoo_of(tmp_path / "b", 17, 1)
    some = torch.tensor([8, 0, 3])
    expected = torch.cdist(a.vectors()[some].double(), b.vectors().double())
    found = nearest(a, b, some)
    torch.testing.assert_close(found.values[:, 0], expected.amin(1))
    assert torch.equal(found.indices[:, 0], expected.argmin(1))
    assert found.mean == pytest.approx(expected.mean().item())
    own = torch.cdist(b.vectors().double(), b.vectors().double()).fill_diagonal_(torch.inf)
    again = nearest(b, b, torch.arange(17), own=torch.arange(17))
    torch.testing.assert_close(again.values[:, 0], own.amin(1))
    assert again.mean == pytest.approx(own[own.isfinite()].mean().item())


def test_a_part_of_many_networks_spans_what_it_spans(tmp_path, monkeypatch):
    zoo = zoo_of(tmp_path / "zoo", 40, 1)
    generated = zoo_of(tmp_path / "generated", 5, 2)
    of = nearest(generated, zoo, torch.arange(5))
    arguments = (zoo, generated, of.indices[:, 0], of.values[:, 0])
    # Forty networks of fifteen parameters reach everything, and so do some twenty of them; six do not.
    assert outside_span(*arguments) == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(measures, "MOST_COMPARED", 20)
    assert outside_span(*arguments) == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(measures, "MOST_COMPARED", 2)
    assert outside_span(*arguments) > 0.1


def test_networks_are_picked_evenly(monkeypatch):
    monkeypatch.setattr(measures, "MOST_COMPARED", 4)
    assert picked(3).tolist() == [0, 1, 2]
    assert picked(9).tolist() == [0, 3, 6]


def test_bootstrap_means_are_those_of_all_samples(monkeypatch):
    values = torch.rand(50, dtype=torch.float64)
    monkeypatch.setattr(measures, "BATCH_VALUES", 170)
    found = resampled_means(values, 0)
    assert found.shape == (measures.RESAMPLES,)
    assert found.mean().item() == pytest.approx(values.mean().item(), abs=0.01)
    assert found.std().item() == pytest.approx(values.std().item() / 50**0.5, rel=0.15)


@pytest.mark.slow
def test_an_evaluation_of_some_networks_says_what_one_of_all_says(monkeypatch):
    zoo = independent_zoo(0)
    generated = noisy(zoo, 0, 0.2)
    expected = pdiff_hf.evaluate(HardDigits(), trained=zoo, generated=generated)
    monkeypatch.setattr(measures, "MOST_COMPARED", 8)
    found = pdiff_hf.evaluate(HardDigits(), trained=zoo, generated=generated)
    for key in ("label", "accuracy_gain", "interval", "copied"):
        assert found["verdict"][key] == expected["verdict"][key]
    assert found["nearest_l2"]["generated"] == expected["nearest_l2"]["generated"]
    assert found["groups"]["generated"] == expected["groups"]["generated"]


@pytest.mark.slow
def test_networks_that_are_too_many_to_align_are_evaluated_without(monkeypatch):
    zoo = independent_zoo(0)
    size = sum(tensor.numel() for tensor in zoo[0].values())
    monkeypatch.setattr("pdiff_hf.evaluation.neighbours.MOST_ALIGNED_VALUES", 10 * size)
    found = pdiff_hf.evaluate(HardDigits(), trained=zoo, generated=noisy(zoo, 0, 0.2)[:4])
    assert found["nearest_l2"]["aligned"] is None
    assert found["nearest_l2"]["generated"]["min"] > 0


def test_networks_that_are_too_wide_to_align_are_evaluated_as_they_are(monkeypatch):
    monkeypatch.setattr("pdiff_hf.evaluation.canonical.MOST_UNITS", 3)
    zoo = independent_zoo(0)
    found = pdiff_hf.evaluate(HardDigits(), trained=zoo, generated=noisy(zoo, 0, 0.2)[:4])
    assert found["baselines_on"] == "networks as they are"
    assert found["nearest_l2"]["aligned"] is None


@pytest.mark.slow
@pytest.mark.long
def test_memory_grows_with_the_number_of_networks_and_not_with_its_square(tmp_path):
    """Twice the square of 20,000 would be 3.2 GB in single precision."""
    program = textwrap.dedent("""
        import resource, sys, torch, pdiff_hf
        from pdiff_hf import ParameterLayout, WeightZoo
        torch.set_num_threads(1)

        class Tiny(pdiff_hf.Task):
            def build_network(self):
                return torch.nn.Linear(4, 2)

            def data(self, split):
                inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(len(split)))
                return inputs, (inputs.sum(1) > 0).long()

        layout = ParameterLayout.from_state_dict(Tiny().build_network().state_dict())
        generator = torch.Generator().manual_seed(0)
        with WeightZoo.create(sys.argv[1], layout) as zoo:
            for vector in torch.ones(20_000, 10) + 0.3 * torch.randn(20_000, 10, generator=generator):
                zoo.append(vector)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pdiff_hf.evaluate(Tiny(), trained=zoo, generated=[zoo.state_dict(i) for i in range(10)], networks_per_point=5)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024**2)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "zoo")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1.7  # GB


# ---- verdicts


def place(accuracy: float, similar: float) -> Place:
    return Place(torch.full((1001,), accuracy), torch.full((1001,), similar))


CURVES = {"noise": [place(0.9, 1.0), place(0.7, 0.5)], "soup": [place(0.6, 0.9)]}


def test_the_share_of_the_way_to_fresh_networks_is_that_of_the_gains():
    share, (low, high) = share_of_gap(place(0.83, 0.8), place(0.90, 0.9), CURVES)
    assert share == pytest.approx(0.01 / 0.04, abs=1e-4)
    assert low == pytest.approx(share)
    assert high == pytest.approx(share)
    assert share_of_gap(place(0.83, 0.8), place(0.85, 0.9), CURVES) == (None, [None, None])


def test_the_front_has_an_interval_at_each_similarity():
    found = band(place(0.8, 0.7), CURVES)
    assert [at["similarity"] for at in (found[0], found[-1])] == pytest.approx([0.5, 1.0])
    for at in found:  # between both ends of the noise, above the soup
        expected = 0.7 + 0.4 * (at["similarity"] - 0.5)
        assert [at["accuracy"], *at["interval"]] == pytest.approx(3 * [expected], abs=1e-4)
    noise = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    shaken = Place(0.9 + 0.01 * noise, torch.full((1001,), 0.8))
    ((low, high),) = {tuple(at["interval"]) for at in band(place(0.8, 0.7), {"noise": [shaken]})}
    assert low < shaken.point[1] < high
    assert high - low == pytest.approx(2 * 2.576 * 0.01, rel=0.2)
    # What both share, the test examples, is no uncertainty of where one is above the other.
    for at in band(shaken, {"noise": [shaken]}):
        assert at["interval"] == pytest.approx([at["accuracy"], at["accuracy"]], abs=1e-6)


def test_less_similar_than_fresh_networks_is_worth_nothing():
    found = beside_fresh(place(0.83, 0.8), place(0.90, 0.9), CURVES)
    # At .9 the front is at .86.
    assert found["gain_at_fresh"] == pytest.approx(-0.03, abs=1e-4)
    assert found["gain_at_fresh_interval"] == pytest.approx([-0.03, -0.03], abs=1e-4)
    assert found["share_at_fresh"] == pytest.approx(-0.03 / 0.04, abs=1e-3)
    sentence = with_gain_at_fresh({"sentence": "Above the front: it is, +1 against the front.", **found})
    assert sentence.startswith("Above the front: it is, +1 against the front; at no less than the similarity of")
    assert sentence.endswith("-3.00 points (99 % interval -3.00 to -3.00) against the front.")
    more = beside_fresh(place(0.89, 0.95), place(0.90, 0.9), CURVES)
    assert more["gain_at_fresh"] == pytest.approx(0.89 - 0.88, abs=1e-4)
    # Less similar than any baseline is worth what the least similar one, at .5, is.
    unreached = beside_fresh(place(0.83, 0.2), place(0.90, 0.3), CURVES)
    assert unreached["gain_at_fresh"] == pytest.approx(0.13, abs=1e-4)


def test_verdicts_where_no_baseline_reaches_or_few_networks_are():
    far = verdict(place(0.83, 0.2), CURVES, 0.9, 0.1, copied=0.0, outside=1.0)
    assert far["label"] == "above-the-front"
    assert far["accuracy_gain"] == pytest.approx(0.13, abs=1e-4)
    assert "+13.00 points (99 % interval +13.00 to +13.00)" in far["sentence"]
    assert far["gain_over_averaging"] is None
    worse = verdict(place(0.6, 0.2), CURVES, 0.9, 0.1, copied=0.0, outside=1.0)
    assert worse["label"] == "no-better-than-noise"
    assert worse["accuracy_gain"] == pytest.approx(-0.1, abs=1e-4)
    few = verdict(place(0.83, 0.2), CURVES, 0.9, 0.1, copied=0.0, outside=1.0, count=9)
    assert few["label"] == "on-the-front"
    assert few["sentence"].startswith("Too few networks, 9, to be called above the front: ")
    gaussian = {"gaussian": [place(0.9, 0.8)]}
    found = verdict(place(0.85, 0.8), CURVES | gaussian, 0.9, 0.1, copied=0.0, outside=1.0)
    assert found["label"] == "on-the-front"
    assert found["sentence"].startswith("Not above the front, though better than noise and averages")


@pytest.mark.parametrize(("spread", "label"), [(0.02, "no-better-than-noise"), (0.002, "above-the-front")])
def test_what_may_be_chance_is_not_above_the_front(spread, label):
    noise = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    noise[0] = 0
    shaken = Place(0.85 + spread * noise, torch.full((1001,), 0.8))
    found = verdict(shaken, CURVES, 0.9, 0.1, copied=0.0, outside=1.0)
    assert found["accuracy_gain"] == pytest.approx(0.03, abs=1e-4)
    assert found["label"] == label


def test_half_of_the_networks_have_to_be_copies_to_be_called_memorized():
    labels = [verdict(place(0.89, 0.96), CURVES, 0.9, 0.1, copied=share, outside=1.0)["label"] for share in (0.5, 0.6)]
    assert [label == "memorized" for label in labels] == [False, True]


def test_networks_that_are_nearly_one_are_called_collapsed():
    def label(dispersion, accuracy=0.85, similar=0.8):
        found = verdict(place(accuracy, similar), CURVES, 0.9, 0.1, copied=0.0, outside=1.0, dispersion=dispersion)
        return found["label"]

    assert label(0.1) == "collapsed"
    assert label(0.5) == label(None) == "above-the-front"
    assert label(0.1, accuracy=0.2) == "not-working"


@pytest.mark.slow
def test_one_network_many_times_is_collapsed():
    zoo = independent_zoo(1)
    other = independent_zoo(2)[0]
    found = pdiff_hf.evaluate(HardDigits(), trained=zoo, generated=[other] * 16)["verdict"]
    assert found["label"] == "collapsed", found
    assert found["dispersion"] == 0
