"""What the losses ask for."""

from types import SimpleNamespace

import pytest
import torch

from pdiff_hf.train.latent_diffusion import denoising_scheduler
from pdiff_hf.train.objectives import DenoiserObjective


class Perfect(torch.nn.Module):
    """A denoiser that knows the latents."""

    def __init__(self, latents, prediction_type, kept):
        super().__init__()
        self.latents, self.prediction_type, self.kept = latents, prediction_type, kept

    def forward(self, noisy, timesteps):
        signal, noise = (part[timesteps].sqrt()[:, None, None] for part in (self.kept, 1 - self.kept))
        epsilon = (noisy - signal * self.latents) / noise
        kinds = {"sample": self.latents, "epsilon": epsilon, "v_prediction": signal * epsilon - noise * self.latents}
        return SimpleNamespace(sample=kinds[self.prediction_type])


@pytest.mark.parametrize("learned", ["sample", "epsilon", "v_prediction"])
@pytest.mark.parametrize("predicted", ["sample", "epsilon", "v_prediction"])
def test_what_a_prediction_type_says_is_learned(learned, predicted):
    latents = torch.randn(64, 2, 4, generator=torch.Generator().manual_seed(0))
    scheduler = denoising_scheduler(learned)
    objective = DenoiserObjective(Perfect(latents, predicted, scheduler.alphas_cumprod), scheduler)
    drawn = objective.draw(64, {"latents": latents}, torch.Generator().manual_seed(1))
    loss = objective(latents, **drawn).item()
    assert loss < 1e-6 if learned == predicted else loss > 0.1
