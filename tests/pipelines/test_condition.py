"""What a pipeline is asked for: columns as embeddings, and guidance towards them."""

import math

import pytest
import torch
from torch import nn

from pdiff_hf import ConditionEncoder

from .cases import (
    CONDITIONS,
    assert_same_tensors,
    build_encoder,
    build_neuron,
    build_pipe,
    build_unet,
    randn,
    run,
    seeded,
)


ASKED = {"accuracy": 0.9, "classes": [1, 0, 1], "kind": "ball"}


@pytest.fixture
def encoder() -> ConditionEncoder:
    torch.manual_seed(0)
    encoder = build_encoder()
    nn.init.normal_(encoder.unasked)
    return encoder.eval()


@pytest.fixture
def pipe():
    return build_pipe("neuron")


# ---- columns


def test_columns_of_rows_become_standardized_numbers_and_places_of_words(encoder):
    columns = {column["name"]: column for column in encoder.config.columns}
    assert [column["kind"] for column in columns.values()] == ["number", "numbers", "word"]
    assert columns["kind"]["words"] == ["ball", "cube", "tree"]
    codes = encoder.codes(CONDITIONS)
    assert codes.shape == (len(CONDITIONS), 5)
    numbers = codes[:, :4]
    torch.testing.assert_close(numbers.nanmean(0), torch.zeros(4), atol=1e-5, rtol=0)
    assert codes[:, 4].tolist()[:3] == [0.0, 1.0, 2.0]
    assert math.isnan(codes[3, 0])


def test_a_constant_column_is_no_division_by_zero():
    encoder = ConditionEncoder.from_rows([{"a": 2.0}, {"a": 2.0}], ["a"], 4)
    assert encoder([{"a": 2.0}]).isfinite().all()
    encoder = ConditionEncoder.from_rows([{"a": 0.1}] * 3, ["a"], 4)  # whose mean is rounded
    assert encoder.codes([{"a": 0.2}]).abs().max() < 1


def test_what_is_not_asked_for_is_a_learned_row(encoder):
    nothing, some, all_ = encoder([{}, {"accuracy": None, "kind": "ball"}, ASKED])
    torch.testing.assert_close(nothing, encoder.mlp(encoder.unasked.sum(0)))
    assert not torch.allclose(nothing, some)
    assert not torch.allclose(some, all_)
    codes = encoder.codes([ASKED])
    untold = encoder.embed(codes, torch.tensor([[False, False, True]]))
    torch.testing.assert_close(untold, encoder([{"kind": "ball"}]))


def test_a_row_does_not_depend_on_the_others(encoder):
    torch.testing.assert_close(encoder([ASKED, {}, *CONDITIONS])[:1], encoder([ASKED]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"colour": 1}, r"'colour' is nothing to ask for. Known are accuracy \(a number\), classes \(a list of 3 num"),
        ({"kind": "bal"}, r"'kind' cannot be 'bal'.*one of 'ball', 'cube', 'tree'"),
        ({"kind": 1}, "'kind' cannot be 1"),
        ({"classes": [0, 1]}, r"'classes' cannot be \[0, 1\].*a list of 3 numbers"),
        ({"classes": 1}, "'classes' cannot be 1"),
        ({"classes": ["a", 0, 1]}, "finite numbers"),
        ({"accuracy": math.nan}, "finite numbers"),
        ({"accuracy": "high"}, "finite numbers"),
        ({"accuracy": [0.9]}, "finite numbers"),
        ("accuracy", "has to be a dict"),
    ],
)
def test_what_is_not_known_is_said_with_what_is(encoder, row, message):
    with pytest.raises(ValueError, match=message):
        encoder([row])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([None, None], "No row has 'a'"),
        ([1, "one"], "'a' cannot be asked for"),
        ([[1, 2], [1]], "'a' cannot be asked for"),
        ([[1], 1], "'a' cannot be asked for"),
        ([math.inf, 1], "'a' cannot be asked for"),
        ([{"b": 1}, {"b": 1}], "'a' cannot be asked for"),
        ([[], []], "'a' cannot be asked for"),
    ],
)
def test_a_column_that_holds_what_cannot_be_asked_for_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ConditionEncoder.from_rows([{"a": value} for value in values], ["a"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([], "`columns` has to hold"),
        ([{"name": "a", "kind": "picture"}], "of the kind 'picture'"),
        ([{"name": "a", "kind": "word", "words": []}], "0 values"),
        ([{"name": "a", "kind": "number", "mean": [0.0], "std": []}], "do not fit"),
        *(
            ([{"name": "a", "kind": "number", "mean": [mean], "std": [std]}], "has to have finite means, and finite")
            for mean, std in ((math.nan, 1.0), ("x", 1.0), (10**400, 1.0), (0.0, 0.0), (0.0, -1.0), (0.0, math.inf))
        ),
        ([{"name": "a", "kind": "word", "words": ["x", 5]}], "words that are no texts, or stand twice"),
        ([{"name": "a", "kind": "word", "words": "xyz"}], "words that are no texts, or stand twice"),
        ([{"name": "a", "kind": "word", "words": ["x", "x"]}], "words that are no texts, or stand twice"),
        ([{"name": "a", "kind": "numbers", "mean": [0.0] * 2_000_000, "std": []}], "do not fit"),
    ],
)
def test_a_hostile_config_is_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        ConditionEncoder(columns)


def test_an_encoder_survives_saving(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    again = ConditionEncoder.from_pretrained(tmp_path)
    assert_same_tensors(encoder, again)
    torch.testing.assert_close(again([ASKED]), encoder([ASKED]))


# ---- denoisers


@pytest.mark.parametrize("build", [build_unet, build_neuron])
def test_a_denoiser_insists_on_its_condition(build):
    told, untold = build(condition_dim=3).eval(), build().eval()
    sample = randn(2, 1, 42) if build is build_neuron else randn(2, 2, 6)
    with pytest.raises(ValueError, match="needs a `condition`"):
        told(sample, 1)
    with pytest.raises(ValueError, match="takes no `condition`"):
        untold(sample, 1, condition=torch.zeros(2, 3))
    one, other = (told(sample, 1, condition=randn(2, 3, seed=seed)).sample for seed in (1, 2))
    assert not torch.allclose(one, other)


# ---- the pipeline


def test_networks_are_those_that_were_asked_for(pipe):
    asked, other, nothing = (run(pipe, condition=one) for one in (ASKED, {"kind": "cube"}, None))
    assert not torch.allclose(asked, other)
    assert not torch.allclose(asked, nothing)
    torch.testing.assert_close(run(pipe, condition={}), nothing)


def test_each_network_may_be_asked_for_something_else_whatever_the_chunks(pipe):
    rows = [ASKED, {}, {"kind": "cube"}]
    together = pipe(condition=rows, generator=seeded(0), output_type="pt").state_dicts
    chunked = pipe(condition=rows, generator=seeded(0), output_type="pt", chunk_size=1).state_dicts
    torch.testing.assert_close(together, chunked, atol=1e-4, rtol=1e-4)
    alike = pipe(3, condition=ASKED, generator=seeded(0), output_type="pt").state_dicts
    torch.testing.assert_close(together[0], alike[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[1:], alike[1:])


def test_guidance_moves_away_from_nothing_asked(pipe):
    latents = randn(1, 1, 42)
    one_step = {"num_inference_steps": 1, "latents": latents, "output_type": "latent"}
    without, once, twice = (pipe(condition=ASKED, guidance_scale=scale, **one_step).state_dicts for scale in (0, 1, 2))
    free = pipe(**one_step).state_dicts
    torch.testing.assert_close(without, free)
    torch.testing.assert_close(twice - free, 2 * (once - free), atol=1e-4, rtol=1e-4)
    evaluations = []
    pipe.transformer.register_forward_pre_hook(lambda *_: evaluations.append(1))
    pipe(condition=ASKED, num_inference_steps=3, generator=seeded(0))
    assert len(evaluations) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"condition": [ASKED]}, "1 conditions were passed for 2 networks"),
        ({"condition": "ball"}, "has to be a dict, or a list of them, and is 'ball'"),
        ({"condition": {"colour": 1}}, "'colour' is nothing to ask for"),
        ({"guidance_scale": 2.0}, "is for what is asked for: pass `condition`"),
        ({"condition": ASKED, "guidance_scale": -1.0}, "`guidance_scale` has to be at least 0"),
    ],
)
def test_what_cannot_be_asked_for_is_said(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(num_networks=2, **arguments)


@pytest.mark.parametrize("arguments", [{"condition": ASKED}, {"guidance_scale": 2.0}])
def test_a_pipeline_without_an_encoder_cannot_be_asked(arguments):
    with pytest.raises(ValueError, match="cannot be asked for anything"):
        build_pipe("unet-linear")(**arguments)
