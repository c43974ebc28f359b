"""The linear autoencoder is fitted in closed form."""

from collections.abc import Callable

import pytest
import torch

from .cases import CASES, NUM_PARAMETERS, randn


def columns_of(vectors: torch.Tensor, width: int) -> Callable[[], list[torch.Tensor]]:
    return lambda: list(vectors.split(width, dim=1))


@torch.no_grad()
def test_a_fitted_autoencoder_keeps_all_that_its_networks_span():
    vectors = randn(7, NUM_PARAMETERS)
    vectors = vectors - vectors.mean(0)
    vae = CASES["linear"].model()
    shares = vae.fit(columns_of(vectors, 10))
    assert shares.sum().item() == pytest.approx(1, abs=1e-5)
    assert (shares[:6] > 0).all()
    assert not shares[6:].any()
    torch.testing.assert_close(vae(vectors).sample, vectors, atol=1e-4, rtol=0)
    latents = vae.encode(vectors).latent_dist.mean.flatten(1)
    assert latents[:, :6].square().mean().item() == pytest.approx(1, abs=1e-4)
    assert not latents[:, 6:].any()


@torch.no_grad()
def test_the_fit_is_the_principal_subspace_whatever_the_width_of_the_columns():
    vectors = randn(30, NUM_PARAMETERS) * torch.linspace(3, 0.1, NUM_PARAMETERS)
    vectors = vectors - vectors.mean(0)
    one, other = CASES["linear"].model(), CASES["linear"].model()
    shares = one.fit(columns_of(vectors, NUM_PARAMETERS))
    other.fit(columns_of(vectors, 5))
    torch.testing.assert_close(one.basis.weight, other.basis.weight, atol=1e-5, rtol=1e-4)
    _, values, directions = torch.linalg.svd(vectors.double(), full_matrices=False)
    torch.testing.assert_close(shares.double(), (values.square() / values.square().sum())[:12], atol=1e-6, rtol=1e-4)
    subspace = directions[:12].T @ directions[:12]
    torch.testing.assert_close(one(vectors).sample.double(), vectors.double() @ subspace, atol=1e-4, rtol=0)
    # What is left over is the variance of the posterior, in units of the latents.
    left = values[12:].square().sum() / (30 * (NUM_PARAMETERS - 12)) / one.basis.scale.double().square()
    assert one.encode(vectors).latent_dist.var[0, 0, 0].item() == pytest.approx(left.item(), rel=1e-3)


def test_latents_of_large_networks_fit_half_precision():
    """Where the square of the scale does not."""
    vae = CASES["linear"].model()
    vectors = 400 * randn(30, NUM_PARAMETERS)
    vae.fit(columns_of(vectors - vectors.mean(0), NUM_PARAMETERS))
    assert vae.basis.scale.square() > torch.finfo(torch.float16).max
    expected = vae.encode(vectors).latent_dist.mean
    found = vae.to(torch.float16).encode(vectors.to(torch.float16)).latent_dist.mean
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_networks_that_do_not_differ_cannot_be_encoded():
    with pytest.raises(ValueError, match="do not differ"):
        CASES["linear"].model().fit(columns_of(torch.zeros(3, NUM_PARAMETERS), 10))
