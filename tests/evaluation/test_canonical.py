"""Baselines of networks whose hidden units are in different orders work on one order."""

import pytest
import torch
from torch import nn

import pdiff_hf
from pdiff_hf import CollectConfig, Task, WeightZoo, ZooError, load_task, run_collect
from pdiff_hf.evaluation.baselines import Baseline, strengths_of
from pdiff_hf.evaluation.canonical import canonical_zoo, in_form, symmetry_that_holds
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.zoo import make_layout


def collected(folder, protocol: str, count: int, seed: int = 0) -> WeightZoo:
    config = CollectConfig(
        task="digits-mlp", protocol=protocol, num_networks=count, epochs=8, output_dir=str(folder), seed=seed
    )
    return run_collect(config)


@pytest.fixture(scope="module")
def independent(tmp_path_factory) -> WeightZoo:
    return collected(tmp_path_factory.mktemp("independent") / "zoo", "independent", 64)


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory) -> WeightZoo:
    return collected(tmp_path_factory.mktemp("trajectory") / "zoo", "trajectory", 30)


def predictor(zoo: WeightZoo) -> tuple[Predictor, torch.Tensor]:
    task = load_task("digits-mlp")
    return Predictor(task, zoo.layout, torch.device("cpu")), task.data("test")[0]


def test_networks_of_several_seeds_have_a_canonical_form_and_those_of_one_run_need_none(
    independent, trajectory, tmp_path
):
    predict, inputs = predictor(independent)
    symmetry = symmetry_that_holds(independent, predict, inputs)
    assert symmetry is not None
    canonical, _ = canonical_zoo(independent, symmetry, tmp_path / "canonical")
    torch.testing.assert_close(
        predict(canonical.vectors(), inputs), predict(independent.vectors(), inputs), atol=1e-5, rtol=1e-4
    )
    assert canonical_zoo(trajectory, symmetry, tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_new_networks_are_of_new_seeds(independent, tmp_path):
    same = collected(tmp_path / "same", "independent", 3)
    with pytest.raises(ZooError, match=r"3 networks of .*same have seeds of training networks, and are no new ones"):
        pdiff_hf.evaluate(trained=independent, generated=independent, fresh=same, networks_per_point=2)


def test_the_front_of_independent_networks_is_higher_on_their_canonical_form(independent, monkeypatch):
    arguments = {"trained": independent, "generated": independent, "networks_per_point": 8}
    report = pdiff_hf.evaluate(**arguments)
    assert report["baselines_on"] == "canonical form"
    assert {"shrinking", "difference"} <= {row["kind"] for row in report["baselines"]}
    monkeypatch.setattr("pdiff_hf.evaluation.study.symmetry_that_holds", lambda *_: None)
    raw = pdiff_hf.evaluate(**arguments)
    assert raw["baselines_on"] == "networks as they are"
    assert "shrinking" not in {row["kind"] for row in raw["baselines"]}

    def accuracy(report, kind):
        return [row["accuracy"]["mean"] for row in report["baselines"] if row["kind"] == kind][-1]

    # Averages of unaligned networks are near chance.
    assert accuracy(report, "soup") > 0.9
    assert report["groups"]["soup"]["accuracy"]["mean"] > 0.9 > 0.8 > raw["groups"]["soup"]["accuracy"]["mean"]
    assert accuracy(raw, "soup") < 0.8
    assert accuracy(report, "interpolation") > accuracy(raw, "interpolation") + 0.02


def test_averages_of_independent_networks_are_within_their_span(independent, tmp_path):
    predict, inputs = predictor(independent)
    symmetry = symmetry_that_holds(independent, predict, inputs)
    canonical, _ = canonical_zoo(independent, symmetry, tmp_path / "canonical")
    averages = Baseline(canonical, "interpolation", 0.5)(20).state_dicts
    found = pdiff_hf.evaluate(trained=independent, generated=averages, networks_per_point=8)["verdict"]
    assert found["outside_span"] < 0.05
    assert found["label"] == "no-better-than-averaging"


def test_a_trajectory_is_compared_with_its_networks_as_they_are(trajectory):
    report = pdiff_hf.evaluate(trained=trajectory, generated=trajectory, networks_per_point=4)
    assert report["baselines_on"] == "networks as they are"
    assert {row["kind"] for row in report["baselines"]} == {
        *("noise", "soup", "interpolation", "gaussian", "low-rank-gaussian"),
    }


def test_numbers_that_are_too_large_for_a_canonical_form_stay_as_they_are(independent, tmp_path):
    predict, inputs = predictor(independent)
    symmetry = symmetry_that_holds(independent, predict, inputs)
    _, reference = canonical_zoo(independent, symmetry, tmp_path / "canonical")
    large = independent.vectors([0, 1, 2])
    large[0] *= 1e30
    with WeightZoo.create(tmp_path / "large", independent.layout) as zoo:
        for vector in large:
            zoo.append(vector)
    found = in_form(zoo, symmetry, reference, tmp_path / "form").vectors()
    assert torch.equal(found[0], large[0])
    torch.testing.assert_close(found[1:], symmetry.canonical(large[1:], reference))
    with WeightZoo.create(tmp_path / "all-large", independent.layout) as zoo:
        zoo.append(large[0])
    assert torch.equal(in_form(zoo, symmetry, reference, tmp_path / "alone").vectors(), large[:1])


def test_interpolations_end_half_way():
    for kind in ("interpolation", "nearest-interpolation"):
        assert strengths_of(kind, 100) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


class Rulers(Task):
    """A regression, whose targets have a unit, in a precision."""

    unit, dtype = 1.0, torch.float32

    def build_network(self):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).to(self.dtype)

    def data(self, split):
        inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(len(split)))
        return inputs.to(self.dtype), (self.unit * inputs[:, :1]).to(self.dtype)

    def probabilities(self, outputs):
        return outputs


@pytest.mark.parametrize(
    ("unit", "dtype"), [(1e-5, torch.float32), (1e5, torch.float32), (1.0, torch.bfloat16), (1.0, torch.float16)]
)
def test_neither_the_unit_of_targets_nor_precision_hides_the_canonical_form(unit, dtype, tmp_path):
    task = Rulers()
    task.unit, task.dtype = unit, dtype
    torch.manual_seed(0)
    states = []
    for _ in range(12):
        network = task.build_network()
        with torch.no_grad():
            network[2].weight *= unit
            network[2].bias *= unit
        states.append(network.state_dict())
    # All but their order is nearly the same.
    order = [torch.randperm(16) for _ in states]
    first = states[0]
    states = [
        {"0.weight": first["0.weight"][o], "0.bias": first["0.bias"][o], "2.weight": first["2.weight"][:, o]}
        | {"2.bias": state["2.bias"]}
        for state, o in zip(states, order, strict=True)
    ]
    layout = make_layout(states[0], ("*",))
    with WeightZoo.create(tmp_path / "zoo", layout) as zoo:
        for state in states:
            zoo.append(state)
    inputs = task.data("test")[0]
    symmetry = symmetry_that_holds(zoo, Predictor(task, zoo.layout, torch.device("cpu")), inputs)
    assert symmetry is not None
    canonical = canonical_zoo(zoo, symmetry, tmp_path / "canonical")
    assert canonical is not None
    hidden = [layout.slices[name] for name in ("0.weight", "2.weight")]
    for place in hidden:
        vectors = canonical[0].vectors()[:, place]
        assert (vectors - vectors[0]).norm() < 1e-2 * vectors.norm()
