"""The published method: an autoencoder of the parameters, and a denoiser of its latents."""

from typing import TYPE_CHECKING

import torch
from diffusers import DDPMScheduler

from ..errors import ZooError
from ..pipelines.neural_network_diffusion import ParameterAutoencoderKL, ParameterLayout
from ..zoo import BATCH_VALUES, WeightZoo


if TYPE_CHECKING:
    from .stage import TrainConfig

# Networks, evenly picked, that the autoencoder's directions are fitted to: the cost grows with their square.
MOST_FITTED = 2048


def denoising_scheduler(prediction_type: str) -> DDPMScheduler:
    """The noise of the published method, 1000 steps. Nothing is clipped: latents have unit scale and no bounds."""
    return DDPMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


def encode(
    config: "TrainConfig", zoo: WeightZoo, device: torch.device
) -> tuple[ParameterLayout, ParameterAutoencoderKL, torch.Tensor]:
    """The first two components, and the latents `[N, C, L]` of the networks, on the CPU."""
    # 1. Statistics of the parameters
    layout = zoo.layout.fit(zoo.batches())
    if not (layout.std > 0).any():
        raise ZooError(f"The {len(zoo)} networks of {config.zoo} are identical: there is no distribution to learn.")

    # 2. Autoencoder
    vae = ParameterAutoencoderKL(layout.vector_size, config.latent_channels, config.latent_length)
    together = config.checkpoint_averaging
    every = -(-len(zoo) // MOST_FITTED)
    width = max(1, BATCH_VALUES // len(zoo)) * (every if together == 1 else 1)

    def columns(start: int) -> torch.Tensor:
        if together == 1:
            return layout.normalize(zoo.columns(start, start + width, every), start)
        return _averages(layout.normalize(zoo.columns(start, start + width), start), together)[::every]

    shares = vae.fit(lambda: (columns(start) for start in range(0, layout.vector_size, width)))
    vae.to(device)
    with torch.no_grad():
        batches = (layout.normalize(batch).to(vae.device) for batch in zoo.batches())
        # Linear: latents of averages are averages of latents.
        latents = _averages(torch.cat([vae.encode(batch).latent_dist.mean.cpu() for batch in batches]), together)
    print(f"{len(latents[0].flatten())} latents explain {100 * shares.sum():.4f} % of the variance.")
    return layout, vae, latents


def _averages(rows: torch.Tensor, together: int) -> torch.Tensor:
    """Means of so many consecutive rows, `[N, ...]` to `[N - together + 1, ...]`."""
    return rows if together == 1 else rows.unfold(0, together, 1).mean(-1)
