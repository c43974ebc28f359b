import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pdiff_hf import ParameterLayout

from ..conftest import random_network, small_network


def test_a_state_dict_survives_the_way_to_a_vector_and_back_exactly(layout):
    state_dict = random_network(3).state_dict()
    vector = layout.flatten(state_dict)
    (restored,) = layout.unflatten(vector[None])
    assert vector.dtype == torch.float32
    assert list(restored) == list(state_dict)
    assert all(torch.equal(restored[name], state_dict[name]) for name in state_dict if "num_batches" not in name)
    small_network().load_state_dict(restored, strict=True)


def test_the_vector_holds_the_tensors_in_state_dict_order_row_major():
    network = nn.Linear(2, 2)
    vector = ParameterLayout.from_state_dict(network.state_dict()).flatten(network.state_dict())
    assert vector.tolist() == [*network.weight.flatten().tolist(), *network.bias.tolist()]


def test_patterns_choose_what_is_generated_and_the_rest_is_frozen():
    base, other = random_network(0).state_dict(), random_network(1).state_dict()
    layout = ParameterLayout.from_state_dict(base, ("1.*", "2.bias"))
    assert [tensor["name"] for tensor in layout.tensors("generated")] == [
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "2.bias",
    ]
    (mixed,) = layout.unflatten(layout.flatten(other)[None])
    assert torch.equal(mixed["0.weight"], base["0.weight"])
    assert torch.equal(mixed["2.bias"], other["2.bias"])
    assert mixed["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("patterns", [("conv*",), ("*", "conv*"), ("1.num_batches_tracked",), ()])
def test_a_pattern_that_matches_nothing_is_named(patterns):
    with pytest.raises(ValueError, match=r"match no floating-point tensor.*0\.weight"):
        ParameterLayout.from_state_dict(small_network().state_dict(), patterns)


def test_normalized_vectors_have_mean_0_and_std_1_and_come_back():
    vectors = torch.stack(
        [
            torch.randn(26, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.01, 100, 26) + 5
            for seed in range(50)
        ]
    )
    layout = ParameterLayout.from_state_dict(nn.Linear(12, 2).state_dict()).fit(vectors.split(7))
    normalized = layout.normalize(vectors)
    torch.testing.assert_close(normalized.mean(0), torch.zeros(26), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalized.std(0, unbiased=False), torch.ones(26), atol=1e-5, rtol=0)
    torch.testing.assert_close(layout(normalized).vectors, vectors, atol=1e-4, rtol=1e-6)


def test_statistics_are_those_of_one_pass_over_everything():
    vectors = torch.randn(50, 26) + 1000
    layout = ParameterLayout.from_state_dict(nn.Linear(12, 2).state_dict()).fit(vectors.split(3))
    expected = vectors.double()
    torch.testing.assert_close(layout.mean.double(), expected.mean(0), atol=0, rtol=1e-7)
    torch.testing.assert_close(layout.std.double(), expected.std(0, unbiased=False), atol=0, rtol=1e-6)


def test_a_constant_parameter_comes_back_exactly_whatever_was_generated(layout):
    vectors = torch.stack([layout.flatten(random_network(seed).state_dict()) for seed in range(5)])
    vectors[:, [0, -12]] = torch.tensor([0.1, 0.3])
    layout.fit([vectors])
    assert (layout.normalize(vectors)[:, 0] == 0).all()
    assert torch.equal(layout(torch.randn(9, layout.vector_size)).vectors[:, 0], torch.full((9,), 0.1))


def test_running_variances_stay_positive(layout):
    vectors = torch.stack([layout.flatten(random_network(seed).state_dict()) for seed in range(5)])
    vectors[0, layout.slices["1.running_mean"]] *= -1
    layout.fit([vectors])
    networks = layout.unflatten(layout(10 * torch.randn(100, layout.vector_size)).vectors)
    assert min(network["1.running_var"].min() for network in networks) > 0
    assert min(network["1.running_mean"].min() for network in networks) < 0


def test_a_running_variance_of_zero_is_finite(layout):
    vectors = torch.stack([layout.flatten(random_network(seed).state_dict()) for seed in range(5)])
    vectors[0] = 0
    layout.fit([vectors])
    assert torch.isfinite(layout.normalize(vectors)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_round_trip_exactly(dtype):
    network = random_network(0).to(dtype)
    layout = ParameterLayout.from_state_dict(network.state_dict())
    (restored,) = layout.unflatten(layout.flatten(network.state_dict())[None])
    assert restored["0.weight"].dtype == dtype
    assert all(torch.equal(value, restored[name]) for name, value in network.state_dict().items())


def test_float64_parameters_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"`weight` is float64.*network\.float\(\)"):
        ParameterLayout.from_state_dict(nn.Linear(2, 2).double().state_dict())


def test_frozen_float64_tensors_keep_their_values_and_dtype(tmp_path):
    state_dict = {"weight": torch.randn(3), "scale": torch.tensor([1 / 3], dtype=torch.float64)}
    layout = ParameterLayout.from_state_dict(state_dict, ("weight",)).to(torch.float16)
    layout.save_pretrained(tmp_path)
    (restored,) = ParameterLayout.from_pretrained(tmp_path, torch_dtype=torch.float16).unflatten(torch.zeros(1, 3))
    assert torch.equal(restored["scale"], state_dict["scale"])


class TiedNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("patterns", [("*",), ("head.weight",), ("embedding.weight",)])
def test_tied_tensors_appear_once_and_stay_tied(patterns):
    network = TiedNetwork()
    layout = ParameterLayout.from_state_dict(network.state_dict(), patterns)
    assert layout.vector_size == 15
    (restored,) = layout.unflatten(torch.arange(15.0)[None])
    assert restored["head.weight"] is restored["embedding.weight"]
    network.load_state_dict(restored, strict=True)
    assert torch.equal(network.head.weight.flatten(), torch.arange(15.0))


def test_tied_tensors_that_differ_are_refused_and_may_be_left_out():
    layout = ParameterLayout.from_state_dict(TiedNetwork().state_dict())
    with pytest.raises(ValueError, match=r"`head\.weight` should equal `embedding\.weight`"):
        layout.flatten({"embedding.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)})
    assert layout.flatten({"embedding.weight": torch.ones(5, 3)}).sum() == 15


def edited(name, value):
    state_dict = copy.deepcopy(random_network(1).state_dict())
    state_dict[name] = value
    return state_dict


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (edited("0.weight", torch.zeros(5, 3)), r"`0\.weight`: expected float32 \[4, 3\], found float32 \[5, 3\]"),
        (edited("0.bias", torch.zeros(4).double()), r"`0\.bias`: expected float32 \[4\], found float64 \[4\]"),
        (edited("3.bias", torch.zeros(2)), r"does not know: 3\.bias"),
        ({"0.weight": torch.zeros(4, 3)}, r"`0\.bias` is missing"),
        (edited("2.bias", torch.tensor([1, torch.nan])), r"`2\.bias` holds NaN or infinite"),
        (edited("2.bias", torch.tensor([torch.inf, 0])), r"`2\.bias` holds NaN or infinite"),
    ],
)
def test_a_network_that_does_not_fit_is_described(layout, state_dict, message):
    with pytest.raises(ValueError, match=message):
        layout.flatten(state_dict)


def test_vectors_of_another_length_are_refused(layout):
    with pytest.raises(ValueError, match=r"shape \[N, 42\], and found \[1, 3\]"):
        layout.unflatten(torch.zeros(1, 3))


def test_statistics_of_one_network_are_refused(layout):
    with pytest.raises(ValueError, match="at least two networks, and this one has 1"):
        layout.fit([torch.zeros(1, layout.vector_size)])


# ---- slices


def test_slices_say_where_each_generated_tensor_lies_in_the_vector(layout):
    state_dict = random_network(3).state_dict()
    vector = layout.flatten(state_dict)
    assert list(layout.slices) == [tensor["name"] for tensor in layout.tensors("generated")]
    for name, place in layout.slices.items():
        assert torch.equal(vector[place], state_dict[name].flatten())


def test_slices_follow_each_other_and_fill_the_vector(layout):
    ends = [0, *(place.stop for place in layout.slices.values())]
    assert [place.start for place in layout.slices.values()] == ends[:-1]
    assert ends[-1] == layout.vector_size


def test_slices_leave_out_what_is_frozen_or_tied():
    frozen = ParameterLayout.from_state_dict(small_network().state_dict(), ("2.*",))
    assert frozen.slices == {"2.weight": slice(0, 8), "2.bias": slice(8, 10)}
    tied = ParameterLayout.from_state_dict(TiedNetwork().state_dict())
    assert tied.slices == {"embedding.weight": slice(0, 15)}


# ---- where statistics are computed


class DevicesOfFloat64(TorchDispatchMode):
    """Notes where tensors of double precision, which some accelerators lack, come to be."""

    def __init__(self):
        super().__init__()
        self.devices = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.devices.add(tensor.device.type)
        return output


def test_statistics_are_computed_on_the_cpu_wherever_the_layout_is(layout):
    vectors = torch.stack([layout.flatten(random_network(seed).state_dict()) for seed in range(5)])
    layout.to("meta")  # stands for an accelerator
    with DevicesOfFloat64() as noted:
        layout.fit([vectors])
    assert noted.devices == {"cpu"}
    assert layout.mean.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_statistics_of_vectors_on_an_accelerator_are_those_on_the_cpu(layout):
    vectors = torch.stack([layout.flatten(random_network(seed).state_dict()) for seed in range(5)])
    expected = copy.deepcopy(layout).fit([vectors])
    layout.to("cuda").fit([vectors.cuda()])
    assert layout.mean.device.type == "cuda"
    assert torch.equal(layout.mean.cpu(), expected.mean)
    assert torch.equal(layout.std.cpu(), expected.std)


@pytest.mark.parametrize("adapter", [3, "text", ["r"]])
def test_an_adapter_that_is_no_configuration_is_refused(adapter):
    tensors = [{"name": "w", "shape": [2], "dtype": "float32", "role": "generated"}]
    with pytest.raises(ValueError, match="adapter of a layout is a mapping"):
        ParameterLayout(tensors=tensors, adapter=adapter)
