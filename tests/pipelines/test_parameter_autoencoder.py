"""The convolutional autoencoder is trained, and its latents are standardized afterwards."""

import pytest
import torch

from pdiff_hf import ParameterAutoencoderKL

from .cases import CASES, NUM_PARAMETERS, randn


@pytest.fixture
def vae() -> ParameterAutoencoderKL:
    return CASES["kl"].model().eval()


@torch.no_grad()
def test_standardized_latents_have_mean_0_and_one_standard_deviation_of_1(vae):
    vectors = 3 * randn(50, NUM_PARAMETERS) + 1
    assert vae.standardize(vectors.split(7)) is vae
    latents = vae.encode(vectors).latent_dist.mean.flatten(1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(12), atol=1e-5, rtol=0)
    assert latents.square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)


@torch.no_grad()
def test_standardizing_leaves_what_is_decoded_as_it_was(vae):
    vectors = 3 * randn(50, NUM_PARAMETERS) + 1
    expected = vae(vectors).sample
    vae.standardize([vectors])
    torch.testing.assert_close(vae(vectors).sample, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_standardizing_scales_the_noise_of_the_posterior_with_the_latents(vae):
    vectors = randn(50, NUM_PARAMETERS)
    before = vae.encode(vectors).latent_dist
    vae.standardize([vectors])
    after = vae.encode(vectors).latent_dist
    ratio = (after.mean - after.mean.mean(0)).std() / (before.mean - before.mean.mean(0)).std()
    torch.testing.assert_close(after.std, before.std * ratio, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_standardizing_twice_changes_nothing_more(vae):
    vectors = randn(50, NUM_PARAMETERS)
    once = vae.standardize([vectors]).encode(vectors).latent_dist.mean
    twice = vae.standardize([vectors]).encode(vectors).latent_dist.mean
    torch.testing.assert_close(twice, once, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_new_autoencoder_is_linear_and_its_latents_are_almost_free_of_noise():
    torch.manual_seed(0)
    vae = ParameterAutoencoderKL(NUM_PARAMETERS, latent_channels=2, latent_length=6, patch_size=8, hidden_channels=4)
    one, other, nothing = randn(1, NUM_PARAMETERS), randn(1, NUM_PARAMETERS, seed=1), torch.zeros(1, NUM_PARAMETERS)
    torch.testing.assert_close(vae(one + other).sample + vae(nothing).sample, vae(one).sample + vae(other).sample)
    torch.testing.assert_close(vae.encode(one).latent_dist.logvar, torch.full((1, 2, 6), -4.0))


@torch.no_grad()
@pytest.mark.parametrize("num_parameters", [1, 7, 8, 9])
def test_vectors_need_not_fill_the_last_patch(num_parameters):
    vae = ParameterAutoencoderKL(num_parameters, patch_size=8, hidden_channels=4)
    assert vae(randn(3, num_parameters)).sample.shape == (3, num_parameters)


@torch.no_grad()
def test_each_patch_has_a_linear_map_of_its_own(vae):
    patches = randn(2, 6, 8)
    found = vae.patch_in(patches)
    weight, bias = vae.patch_in.weight.view(6, 4, 8), vae.patch_in.bias.view(6, 4)
    expected = torch.stack([patches[:, place] @ weight[place].T + bias[place] for place in range(6)], dim=1)
    torch.testing.assert_close(found, expected)
