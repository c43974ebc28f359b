"""Schedulers that fit a pipeline are those that lead a perfect denoiser to the clean sample."""

import diffusers
import pytest
import torch
from diffusers import DDIMInverseScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from pdiff_hf import GenerateConfig, WeightZoo, run_generate
from pdiff_hf.errors import ConfigError
from pdiff_hf.schedulers import fits, replacement
from pdiff_hf.train import denoising_scheduler


WITH_DATA = ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
NOT_WITH_DATA = ["EDMEulerScheduler", "EulerAncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "PNDMScheduler"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", WITH_DATA)
def test_what_leads_to_the_clean_sample_fits(name, prediction_type):
    new = replacement(name, denoising_scheduler(prediction_type))
    assert type(new) is getattr(diffusers, name)
    assert new.config.prediction_type == prediction_type


@pytest.mark.parametrize("name", NOT_WITH_DATA)
def test_what_crashes_or_leads_elsewhere_is_refused_and_not_recommended(name):
    with pytest.raises(ConfigError, match=f"{name} does not fit what this pipeline predicts") as error:
        replacement(name, denoising_scheduler("sample"))
    recommended = str(error.value).partition("These do: ")[2].rstrip(".").split(", ")
    assert set(WITH_DATA) < set(recommended)
    assert not set(NOT_WITH_DATA) & set(recommended)
    for one in recommended:
        assert fits(replacement(one, denoising_scheduler("sample")))


def test_a_check_leaves_the_randomness_of_the_caller_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert fits(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scheduler_that_inverts_does_not_fit():
    assert not fits(DDIMInverseScheduler.from_config(denoising_scheduler("sample").config))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "Flow", "UNet1DModel"])
def test_schedulers_of_another_kind_are_refused(name):
    with pytest.raises(ConfigError, match=rf"'{name}' is no scheduler that fits this pipeline\. These do: .*DDIMSch"):
        replacement(name, denoising_scheduler("sample"))


def test_flow_matching_is_a_kind_of_its_own():
    new = replacement("FlowMatchHeunDiscreteScheduler", FlowMatchEulerDiscreteScheduler())
    assert isinstance(new, FlowMatchHeunDiscreteScheduler)
    with pytest.raises(ConfigError, match=r"These do: FlowMatchEulerDiscreteScheduler, FlowMatchHeun\w+\."):
        replacement("DDIMScheduler", FlowMatchEulerDiscreteScheduler())


def test_steps_that_lead_below_the_last_sigma_are_refused():
    with pytest.raises(ConfigError, match=r"These do: FlowMatchEulerDiscreteScheduler\."):
        replacement("FlowMatchHeunDiscreteScheduler", FlowMatchEulerDiscreteScheduler(shift_terminal=0.2))


def test_generate_takes_one_and_says_so_of_each_network(digits_pipeline, tmp_path):
    settings = {"pipeline": str(digits_pipeline), "num_networks": 2, "num_inference_steps": 5}
    made = run_generate(GenerateConfig(**settings, output_dir=str(tmp_path / "zoo"), scheduler="DDIMScheduler"))
    assert {row["scheduler"] for row in made.metadata} == {"DDIMScheduler"}
    with pytest.raises(ConfigError, match="PNDMScheduler does not fit"):
        run_generate(GenerateConfig(**settings, output_dir=str(tmp_path / "none"), scheduler="PNDMScheduler"))
    assert not (tmp_path / "none").exists()
    assert len(WeightZoo(tmp_path / "zoo")) == 2
