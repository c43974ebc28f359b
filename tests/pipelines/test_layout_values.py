"""What a tensor holds is told by its values over the zoo, and by nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pdiff_hf import ParameterLayout


NAMES = st.sampled_from(["running_var", "var", "std", "moving_variance", "scale", "v", "bias"])


def fitted(rows: torch.Tensor, name: str = "norm.value", **others: torch.Tensor) -> ParameterLayout:
    """A layout of one tensor, with these values over a zoo."""
    return ParameterLayout.from_state_dict({name: rows[0], **others}).fit([rows])


def generated(layout: ParameterLayout, scale: float = 5, count: int = 500) -> torch.Tensor:
    """Vectors of far too much noise."""
    noise = torch.randn(count, layout.vector_size, generator=torch.Generator().manual_seed(0))
    return layout(scale * noise).vectors


@given(name=NAMES, decades=st.floats(0.1, 6), width=st.integers(1, 5), count=st.integers(2, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_is_positive_in_all_networks_is_positive_in_generated_ones(name, decades, width, count):
    rows = 10 ** (-decades * torch.rand(count, width, generator=torch.Generator().manual_seed(count)))
    layout = fitted(rows, f"norm.{name}")
    assert (generated(layout, 2) > 0).all()
    torch.testing.assert_close(layout(layout.normalize(rows)).vectors, rows, rtol=1e-4, atol=0)


@given(name=NAMES, least=st.integers(-3, 1), span=st.integers(1, 4), width=st.integers(1, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_whole_numbers_stay_whole_and_in_their_range(name, least, span, width):
    draw = torch.Generator().manual_seed(span)
    rows = torch.randint(least, least + span + 1, (20, width), generator=draw).float()
    rows[0, 0], rows[1, 0] = least, least + span
    if name == "running_var":
        rows.abs_()
    made = generated(fitted(rows, f"norm.{name}"))
    assert torch.equal(made, made.round())
    assert made.min() >= rows.min()
    assert made.max() <= rows.max()
    assert made[:, 0].unique().tolist() != [made[0, 0]]


def test_a_mask_of_zeros_and_ones_comes_back_as_one():
    rows = (torch.rand(40, 9, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    layout = fitted(rows, "layer.mask")
    assert set(generated(layout).unique().tolist()) == {0, 1}
    assert not torch.signbit(generated(layout)).any()
    assert torch.equal(layout(layout.normalize(rows)).vectors, rows)


def test_what_is_zero_in_places_is_never_negative():
    rows = torch.rand(30, 8, generator=torch.Generator().manual_seed(1)) * (torch.arange(240).view(30, 8) % 3 > 0)
    assert (generated(fitted(rows)) >= 0).all()


def test_values_of_both_signs_are_left_alone():
    rows = torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    layout = fitted(rows)
    assert "values" not in layout.config.tensors[0]
    assert (generated(layout) < 0).any()
    assert not layout.log.any()


def test_values_far_above_zero_are_standardized_as_they_are():
    rows = 1 + 0.01 * torch.randn(30, 8, generator=torch.Generator().manual_seed(1))
    layout = fitted(rows)
    assert not layout.log.any()
    torch.testing.assert_close(layout.mean, rows.mean(0))
    assert (generated(layout, 1000) >= 0).all()


def test_constants_of_a_positive_tensor_stay_exact():
    rows = torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) + 0.01
    rows[:, 1], rows[:, 2] = 0.1, 0
    made = generated(fitted(rows, "norm.moving_variance"))
    assert torch.equal(made[:, 1], torch.full((500,), 0.1))
    assert torch.equal(made[:, 2], torch.zeros(500))
    assert (made > 0)[:, [0, 3]].all()


def test_batches_tell_what_the_whole_zoo_tells():
    rows = torch.rand(30, 8, generator=torch.Generator().manual_seed(1))
    rows[29, 3] = -1  # the last network alone
    layout = ParameterLayout.from_state_dict({"value": rows[0]}).fit(rows.split(7))
    assert layout.config.tensors == ParameterLayout.from_state_dict({"value": rows[0]}).fit([rows]).config.tensors
    assert "values" not in layout.config.tensors[0]


def test_what_the_zoo_told_is_saved_and_forgotten_by_the_next_fit(tmp_path):
    rows = (torch.rand(40, 9, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    layout = fitted(rows)
    layout.save_pretrained(tmp_path)
    loaded = ParameterLayout.from_pretrained(tmp_path)
    assert torch.equal(generated(loaded), generated(layout))
    assert loaded.config.tensors[0]["range"] == [0, 1]
    assert loaded.architecture == ParameterLayout.from_state_dict({"norm.value": rows[0]}).config.tensors
    layout.fit([torch.randn(5, 9)])
    assert layout.config.tensors == loaded.architecture


# ---- what is not generated


def test_an_infinite_mask_is_frozen_and_comes_back_exactly():
    mask = torch.full((3, 3), -torch.inf).triu(1)
    network = {"weight": torch.ones(2), "attention.mask": mask, "all": torch.full((2,), torch.inf)}
    layout = ParameterLayout.from_state_dict(network)
    assert list(layout.slices) == ["weight"]
    (restored,) = layout.unflatten(torch.zeros(1, 2))
    assert torch.equal(restored["attention.mask"], mask)
    assert torch.equal(restored["all"], network["all"])


def test_infinite_weights_are_no_mask():
    layout = ParameterLayout.from_state_dict({"weight": torch.tensor([1.0, torch.inf, 2.0])})
    with pytest.raises(ValueError, match="`weight` holds NaN or infinite"):
        layout.flatten({"weight": torch.tensor([1.0, torch.inf, 2.0])})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("*", "!*mask"), ["a.weight", "b.weight"]),
        (("!*mask",), ["a.weight", "b.weight"]),
        (("!b.*",), ["a.weight", "a.mask"]),
        ("a.*", ["a.weight", "a.mask"]),
        (["a.*", "!a.mask"], ["a.weight"]),
    ],
)
def test_patterns_exclude_and_a_text_is_one_pattern(patterns, names):
    network = {name: torch.ones(1) * i for i, name in enumerate(["a.weight", "a.mask", "b.weight", "b.mask"])}
    assert list(ParameterLayout.from_state_dict(network, patterns).slices) == names


@pytest.mark.parametrize("patterns", [("*", "!typo*"), ("!*",), ("a.*", "!a.*")])
def test_patterns_that_exclude_nothing_or_all_are_named(patterns):
    with pytest.raises(ValueError, match="match no floating-point tensor"):
        ParameterLayout.from_state_dict({"a.weight": torch.ones(1), "b.weight": torch.ones(1)}, patterns)


def test_excluding_one_of_two_tied_names_excludes_both():
    value = torch.ones(3)
    network = {"embed": value, "out": value, "bias": torch.ones(1)}
    for excluded in ("!embed", "!out"):
        assert list(ParameterLayout.from_state_dict(network, ["*", excluded]).slices) == ["bias"]


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Lazy().state_dict()["linear.weight"], "built lazily"),
        (torch.eye(3).to_sparse(), "is sparse"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "is quantized"),
        (torch.ones(3, device="meta"), "on the meta device"),
        ("text", "is no tensor, but str"),
        (torch.ones(3, dtype=torch.complex64), "is complex64"),
    ],
)
def test_what_is_no_dense_tensor_is_named(value, message):
    with pytest.raises(ValueError, match=rf"`x`.*{message}"):
        ParameterLayout.from_state_dict({"weight": torch.ones(1), "x": value})


# ---- names


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8).filter(
    lambda text: all(text.split("."))
)


@given(names=st.lists(TEXT, min_size=2, max_size=6, unique=True))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_text_is_the_name_of_a_tensor(names, tmp_path_factory):
    network = {name: torch.full((2,), float(i)) for i, name in enumerate(names)}
    pattern = "".join(f"[{c}]" if c in "*?[" else c for c in names[0]).replace("[[]", "[[]")
    layout = ParameterLayout.from_state_dict(network, [pattern] if not names[0].startswith("!") else ["*"])
    folder = tmp_path_factory.mktemp("layout")
    layout.save_pretrained(folder)
    loaded = ParameterLayout.from_pretrained(folder)
    (restored,) = loaded.unflatten(layout.flatten(network)[None])
    assert list(restored) == names
    assert all(torch.equal(restored[name], network[name]) for name in names)


@pytest.mark.parametrize("patterns", [("*",), ("weight",), ("weight.absmax",)])
def test_a_name_may_begin_with_another(patterns):
    network = {"weight": torch.ones(2), "weight.absmax": torch.zeros(3), "weight.absmax.scale": torch.ones(1)}
    layout = ParameterLayout.from_state_dict(network, patterns)
    (restored,) = layout.unflatten(layout.flatten(network)[None])
    assert all(torch.equal(restored[name], network[name]) for name in network)


def test_half_a_character_is_no_name():
    with pytest.raises(ValueError, match="is no name of a tensor"):
        ParameterLayout.from_state_dict({"w\ud800": torch.ones(2)})


# ---- frozen tensors


def test_frozen_tensors_that_differ_are_named_but_for_counts_and_accepted_ones():
    first = {"weight": torch.ones(2), "flag": torch.tensor(0), "bn.num_batches_tracked": torch.tensor(3)}
    layout = ParameterLayout.from_state_dict(first)
    layout.check_frozen(first | {"bn.num_batches_tracked": torch.tensor(9)})
    other = first | {"flag": torch.tensor(1)}
    with pytest.raises(ValueError, match="`flag` is not generated, and differs from that of the first network"):
        layout.check_frozen(other)
    layout.check_frozen(other, ["fl*"])


def test_frozen_nan_equals_itself():
    network = {"weight": torch.ones(2), "x": torch.tensor([torch.nan, 1])}
    layout = ParameterLayout.from_state_dict(network, "weight")
    layout.check_frozen(network)
    with pytest.raises(ValueError, match="`x`"):
        layout.check_frozen(network | {"x": torch.tensor([1.0, torch.nan])})


def test_either_name_of_tied_tensors_will_do():
    value = torch.arange(3.0)
    layout = ParameterLayout.from_state_dict({"embed": value, "out": value})
    for name in ("embed", "out"):
        (restored,) = layout.unflatten(layout.flatten({name: value})[None])
        assert torch.equal(restored["embed"], value)
        assert torch.equal(restored["out"], value)
