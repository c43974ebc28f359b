"""Initializations: what they are drawn from is found, drawn again, and told to the denoiser."""

import pytest
import torch
from torch import nn

from pdiff_hf import NeuralNetworkDiffusionPipeline, ParameterLayout

from .cases import assert_same, build_layout, build_neuron, build_pipe, randn, run, seeded


NETWORKS = 200


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 5), nn.Linear(5, 5, bias=False))
    nn.init.normal_(network[2].weight, 0.5, 0.1)
    nn.init.orthogonal_(network[3].weight)
    return network


@pytest.fixture(scope="module")
def fitted() -> ParameterLayout:
    with torch.random.fork_rng():
        states = [build(seed).state_dict() for seed in range(NETWORKS)]
    layout = ParameterLayout.from_state_dict(states[0])
    return layout.fit_initial(torch.stack([layout.flatten(state) for state in states]))


def found(layout: ParameterLayout) -> dict[str, dict]:
    return {tensor["name"]: tensor["initial"] for tensor in layout.tensors("generated")}


def test_distributions_of_initializations_are_found(fitted):
    initial = found(fitted)
    assert {name: one["distribution"] for name, one in initial.items()} == {
        "0.weight": "uniform",
        "0.bias": "uniform",
        "1.weight": "constant",
        "1.bias": "constant",
        "1.running_mean": "constant",
        "1.running_var": "constant",
        "2.weight": "normal",
        "2.bias": "uniform",
        "3.weight": "other",
    }
    assert initial["0.weight"]["std"] == pytest.approx((1 / 6 / 3) ** 0.5, rel=0.02)
    assert initial["2.weight"]["mean"] == pytest.approx(0.5, abs=0.005)
    assert initial["1.running_var"] == {"distribution": "constant", "mean": 1.0, "std": 0.0}


def test_what_differs_from_place_to_place_is_no_distribution():
    layout = ParameterLayout.from_state_dict(nn.Linear(6, 8).state_dict())
    vectors = randn(50, layout.vector_size)
    vectors[:, :48] += torch.arange(48.0)  # a weight that begins near a matrix of its own
    assert {name: one["distribution"] for name, one in found(layout.fit_initial(vectors)).items()} == {
        "weight": "other",
        "bias": "normal",
    }


@pytest.mark.parametrize(
    "draw",
    [
        lambda weight: torch.nn.init.sparse_(weight, 0.9),
        torch.nn.init.trunc_normal_,
        lambda weight: weight.copy_((torch.rand_like(weight) < 0.5) * 0.2 - 0.1),
    ],
    ids=["sparse", "truncated", "signs"],
)
def test_what_is_neither_uniform_nor_normal_is_not_called_so(draw):
    torch.manual_seed(0)
    states = [{"weight": torch.empty(16, 64)} for _ in range(64)]
    for state in states:
        draw(state["weight"])
    layout = ParameterLayout.from_state_dict(states[0])
    layout.fit_initial(torch.stack([layout.flatten(state) for state in states]))
    assert layout.tensors("generated")[0]["initial"]["distribution"] == "other"
    with pytest.raises(ValueError, match="in a way of its own"):
        layout.draw_initial([torch.Generator()])


def test_drawn_networks_are_as_those_that_were_recorded(fitted):
    layout = ParameterLayout(tensors=[t for t in fitted.config.tensors if not t["name"].startswith("3.")])
    drawn = layout.draw_initial([seeded(seed) for seed in range(500)])
    for name, place in layout.slices.items():
        part, expected = drawn[:, place].double(), found(layout)[name]
        assert part.mean().item() == pytest.approx(expected["mean"], abs=0.1 * expected["std"] + 1e-6)
        assert part.std().item() == pytest.approx(expected["std"], rel=0.02, abs=1e-6)
        if expected["distribution"] == "uniform":
            assert (part - expected["mean"]).abs().max() <= 1.7321 * expected["std"]
    assert torch.equal(drawn[7], layout.draw_initial([seeded(7)])[0])


def test_what_is_drawn_in_a_way_of_its_own_has_to_be_passed(fitted):
    with pytest.raises(ValueError, match=r"`3\.weight` is initialized in a way of its own.*pass `initial`"):
        fitted.draw_initial([seeded(0)])
    with pytest.raises(ValueError, match="pass `initial`"):
        build_layout().draw_initial([seeded(0)])


def test_distributions_stay_when_statistics_are_fitted_and_are_no_part_of_the_architecture(fitted, tmp_path):
    expected = found(fitted)
    again = ParameterLayout(tensors=fitted.config.tensors).fit([randn(5, fitted.vector_size).exp()])
    assert found(again) == expected
    assert again.architecture == fitted.architecture
    again.save_pretrained(tmp_path)
    assert found(ParameterLayout.from_pretrained(tmp_path)) == expected


@pytest.mark.parametrize(
    "initial",
    [
        "uniform",
        {"distribution": "uniform"},
        {"distribution": "cauchy", "mean": 0.0, "std": 1.0},
        {"distribution": "normal", "mean": 0.0, "std": -1.0},
        {"distribution": "normal", "mean": float("nan"), "std": 1.0},
        {"distribution": "normal", "mean": 0.0, "std": 1e300},
        {"distribution": ["normal"], "mean": 0.0, "std": 1.0},
    ],
)
def test_a_description_that_is_no_distribution_is_refused(initial):
    tensors = build_layout().config.tensors
    with pytest.raises(ValueError, match="which is no way"):
        ParameterLayout(tensors=[{**tensors[0], "initial": initial}, *tensors[1:]])


# ---- the pipeline


@pytest.fixture
def told() -> NeuralNetworkDiffusionPipeline:
    layout = build_layout(("*",))
    layout.fit_initial(randn(40, layout.vector_size))
    return build_pipe(
        "neuron", layout=layout, transformer=build_neuron(with_initial=True).eval(), condition_encoder=None
    )


def test_initializations_are_drawn_by_the_seed_of_each_network(told):
    many = told(3, 3, generator=[seeded(seed) for seed in range(3)], output_type="pt").state_dicts
    assert_same(many, told(3, 3, generator=[seeded(seed) for seed in range(3)], output_type="pt", chunk_size=1)[0])
    one = told(generator=[seeded(2)], num_inference_steps=3, output_type="pt").state_dicts
    assert_same(one[0], many[2])


def test_networks_follow_from_the_initialization_that_is_passed(told):
    vectors = told.layout.draw_initial([seeded(8), seeded(9)])
    expected = run(told, initial=vectors)
    assert_same(run(told, initial=told.layout.unflatten(vectors)), expected)
    assert (run(told, initial=vectors.flip(0)) - expected).abs().max() > 1e-3
    # The noise is the same, whoever draws the initialization.
    assert (run(told) - expected).abs().max() > 1e-3
    assert len(told(initial=vectors, num_inference_steps=2).state_dicts) == 2


@pytest.mark.parametrize(
    ("initial", "message"),
    [
        (torch.zeros(3, 42), "3 initial networks were passed for 2"),
        (torch.zeros(2, 41), r"shape \(2, 41\); expected \(2, 42\)"),
        ([{}, {}], "is missing"),
        ({"weight": torch.zeros(2), "bias": torch.zeros(2)}, r"has to be a list of state dicts, and is a dict"),
    ],
)
def test_initializations_that_do_not_fit_are_refused(told, initial, message):
    with pytest.raises(ValueError, match=message):
        run(told, initial=initial)


def test_a_denoiser_that_is_not_told_takes_none():
    with pytest.raises(ValueError, match="knows nothing of initializations"):
        run(build_pipe("neuron"), initial=torch.zeros(2, 42))


def test_what_is_the_same_in_all_untrained_networks_is_kept(tmp_path):
    layout = ParameterLayout.from_state_dict({"drawn": torch.zeros(40), "head": torch.zeros(2, 3)})
    head = torch.tensor([0.5, -1.0, 2.0, 0.0, 3.0, -0.25])
    vectors = torch.cat([torch.randn(60, 40, generator=torch.Generator().manual_seed(0)), head.expand(60, -1)], 1)
    layout.fit_initial(vectors)
    assert layout.config.tensors[1]["initial"]["distribution"] == "the same"
    layout.save_pretrained(tmp_path)
    for one in (layout, ParameterLayout.from_pretrained(tmp_path)):
        drawn = one.draw_initial([torch.Generator().manual_seed(seed) for seed in range(3)])
        assert torch.equal(drawn[:, 40:], head.expand(3, -1))
        assert drawn[:, :40].std() > 0.5
    # Fitted again, on others, nothing of it is left.
    layout.fit_initial(torch.randn(60, 46, generator=torch.Generator().manual_seed(1)))
    assert layout.config.tensors[1]["initial"]["distribution"] == "normal"
    assert not dict(layout.initial.named_buffers())
