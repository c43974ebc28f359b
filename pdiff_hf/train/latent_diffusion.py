"""The published method: an autoencoder of the parameters, and a denoiser of its latents."""

import sys
from collections.abc import Callable, Iterable, Iterator

import torch
from diffusers import DDPMScheduler
from torch import nn

from ..configs import TrainConfig
from ..errors import ConfigError
from ..networks.behaviour import VARIANCE_NETWORKS, Behaviour, run_at_once
from ..networks.stacked import NotStackableError
from ..parallel import from_main, processes
from ..pipelines.neural_network_diffusion import (
    LinearParameterAutoencoder,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
)
from ..runs import own_randomness
from ..tasks.task import Task, load_task, source_sha256, trusted_name
from ..zoo import BATCH_VALUES, WeightZoo, evenly
from .loop import TrainingLoop
from .models import check_memory, check_networks, condition_encoder, seeded, selected
from .objectives import AutoencoderObjective, Batch, DenoiserObjective


Autoencoder = LinearParameterAutoencoder | ParameterAutoencoderKL
# Networks, evenly picked, that the linear autoencoder's directions are fitted to: the cost grows with their square.
MOST_FITTED = 2048
# Parameters of all networks together that stay in memory while the autoencoder is trained.
MOST_HELD = 2**28


class NormalizedNetworks:
    r"""
    The normalized vectors of a zoo's networks, or of averages of consecutive ones: `networks(indices)` is `[n, P]`.

    Args:
        zoo (`WeightZoo`): N networks.
        layout (`ParameterLayout`): With the zoo's statistics.
        window (`int`): Consecutive networks of an average.
    """

    def __init__(self, zoo: WeightZoo, layout: ParameterLayout, window: int):
        self.zoo, self.layout, self.window = zoo, layout, window
        self._held: torch.Tensor | None = None
        if len(zoo) * zoo.vector_size <= MOST_HELD:
            self._held = _averages(torch.cat([self._normalize(batch) for batch in zoo.batches()]), window)

    def __len__(self) -> int:
        return len(self.zoo) - self.window + 1

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        if self._held is not None:
            return self._held[indices.to(self._held.device)]
        # One window at a time: a batch of them takes as many times the memory.
        windows = (self.zoo.vectors(range(first, first + self.window)) for first in indices.tolist())
        return torch.stack([self._normalize(vectors).mean(0) for vectors in windows])

    def batches(self) -> Iterator[torch.Tensor]:
        """All of them in order, `[n, P]` at a time."""
        for start in range(0, len(self), self.zoo.batch_size):
            yield self(torch.arange(start, min(start + self.zoo.batch_size, len(self))))

    def _normalize(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.layout.normalize(vectors.to(self.layout.device))


class LatentDiffusion:
    r"""
    The recipe of the published method.

    Args:
        config (`TrainConfig`): Its settings.
        zoo (`WeightZoo`): N networks.

    Raises:
        [`ConfigError`]: too few networks for an average, or the models do not fit this machine's memory.
        [`TaskError`]: the behaviour loss needs another task.
    """

    slot = "unet"

    def __init__(self, config: TrainConfig, zoo: WeightZoo):
        self.config, self.zoo = config, zoo
        self.facts: dict[str, str | None] = {}
        self.task: Task | None = None
        if len(zoo) - config.checkpoint_averaging < 1:
            raise ConfigError(
                f"checkpoint_averaging {config.checkpoint_averaging} leaves fewer than two of {len(zoo)} networks."
            )
        if "initial_norm" in next(zoo.rows(), {}) and processes().is_main_process:
            print(
                f"{zoo.folder} has networks of independent seeds, whose hidden units are in any order. --family "
                "neuron learns them; for this family, `pdiff-hf align` gives them one order first.",
                file=sys.stderr,
            )
        if config.behaviour_weight:
            name = trusted_name(config.task, zoo.task)
            self.task = load_task(name)
            self.facts["task_sha256"] = source_sha256(self.task)
            with own_randomness():
                check_networks(self.task.build_network(), zoo, name)
        # Rows of very many networks stay where they are, unless they are learned from.
        self.encoder = condition_encoder(zoo.metadata if config.condition else (), config.condition, config.seed)
        words = [] if self.encoder is None else [c["name"] for c in self.encoder.config.columns if c["kind"] == "word"]
        if words and config.checkpoint_averaging > 1:
            raise ConfigError(f"checkpoint_averaging averages what is asked for, too, and {words[0]!r} holds words.")
        latents = config.latent_channels * config.latent_length
        check_memory(
            self._trained,
            more=4 * latents * zoo.vector_size if config.autoencoder == "linear" else 0,
            remedy="Fewer latents, fewer channels or --autoencoder linear take less.",
        )

    def encode(
        self, layout: ParameterLayout, loop: TrainingLoop
    ) -> tuple[dict[str, nn.Module | None], Callable[[torch.Tensor], Batch], int]:
        """The autoencoder (of the main process), and the latents `[N, C, L]` of the networks, at unit scale."""
        config, zoo, device = self.config, self.zoo, loop.accelerator.device
        vae: Autoencoder | None = None
        if config.autoencoder == "kl":
            networks = NormalizedNetworks(zoo, layout.to(device), config.checkpoint_averaging)
            trained = vae = _train_kl(config, self.task, networks, loop)
            latents = from_main(lambda: _latents(trained, networks.batches()))
        elif loop.accelerator.is_main_process:
            fitted = vae = _fit_linear(config, zoo, layout).to(device)
            each = _latents(fitted, (layout.normalize(batch) for batch in zoo.batches()))
            # Linear: latents of averages are averages of latents.
            latents = from_main(lambda: _averages(each, config.checkpoint_averaging))
        else:
            # The others need the latents alone, and no memory for the rest.
            latents = from_main(lambda: torch.empty(0))
        data = {"latents": latents.to(device)}
        if self.encoder is not None:
            codes = self.encoder.codes(selected(zoo.rows(), config.condition))
            data["codes"] = _averages(codes, config.checkpoint_averaging).to(device)
        return {"vae": vae}, lambda indices: {name: rows[indices] for name, rows in data.items()}, len(latents)

    def objective(self, layout: ParameterLayout, loop: TrainingLoop) -> DenoiserObjective:
        """The denoiser with the noise of the published method."""
        unet = seeded(self.config.seed, self._denoiser)
        return DenoiserObjective(unet, denoising_scheduler(self.config.prediction_type), self.encoder)

    @property
    def budget(self) -> tuple[int, float]:
        """Optimizer steps of the denoiser, and their learning rate."""
        return self.config.unet_steps, self.config.unet_learning_rate

    def _trained(self) -> list[nn.Module]:
        config = self.config
        trained: list[nn.Module] = [self._denoiser()]
        if config.autoencoder == "kl":
            size = self.zoo.vector_size
            trained.append(ParameterAutoencoderKL(size, config.latent_channels, config.latent_length))
        return trained

    def _denoiser(self) -> ParameterUNet1DModel:
        config = self.config
        return ParameterUNet1DModel(
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            condition_dim=None if self.encoder is None else self.encoder.config.embedding_dim,
        )


def denoising_scheduler(prediction_type: str) -> DDPMScheduler:
    """The noise of the published method, 1000 steps. Nothing is clipped: latents have unit scale and no bounds."""
    return DDPMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


def _fit_linear(config: TrainConfig, zoo: WeightZoo, layout: ParameterLayout) -> LinearParameterAutoencoder:
    vae = seeded(
        config.seed,
        lambda: LinearParameterAutoencoder(layout.vector_size, config.latent_channels, config.latent_length),
    )
    window = config.checkpoint_averaging
    every = -(-len(zoo) // MOST_FITTED)
    width = max(1, BATCH_VALUES // len(zoo)) * (every if window == 1 else 1)

    def columns(start: int) -> torch.Tensor:
        if window == 1:
            return layout.normalize(zoo.columns(start, start + width, every), start)
        return _averages(layout.normalize(zoo.columns(start, start + width), start), window)[::every]

    shares = vae.fit(lambda: (columns(start) for start in range(0, layout.vector_size, width)))
    print(f"{len(shares)} latents explain {100 * shares.sum():.4f} % of the variance.")
    return vae


def _train_kl(
    config: TrainConfig, task: Task | None, networks: NormalizedNetworks, loop: TrainingLoop
) -> ParameterAutoencoderKL:
    layout = networks.layout
    vae = seeded(
        config.seed,
        lambda: ParameterAutoencoderKL(layout.vector_size, config.latent_channels, config.latent_length),
    )
    behaviour = None
    if task is not None:
        inputs = task.data("train")[0]
        try:
            with own_randomness():
                network = run_at_once(task.build_network(), layout, inputs)
        except NotStackableError as error:
            raise ConfigError(f"behaviour_weight needs networks that run side by side. {error}") from error
        some = networks(torch.tensor(evenly(len(networks), VARIANCE_NETWORKS)))
        behaviour = Behaviour(network, layout, inputs.to(layout.device), some)
    trained = AutoencoderObjective(
        vae, config.input_noise, config.latent_noise, config.kl_weight, behaviour, config.behaviour_weight
    )
    loop.fit(
        "autoencoder",
        trained,
        lambda indices: {"vectors": networks(indices)},
        len(networks),
        config.autoencoder_steps,
        config.autoencoder_learning_rate,
    )
    return vae.standardize(networks.batches())


@torch.no_grad()
def _latents(vae: Autoencoder, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Latents `[N, C, L]`, on the CPU, of normalized vectors, `[n, P]` at a time."""
    return torch.cat([vae.encode(batch.to(vae.device)).latent_dist.mean.cpu() for batch in batches])


def _averages(rows: torch.Tensor, window: int) -> torch.Tensor:
    """Means of so many consecutive rows, `[N, ...]` to `[N - window + 1, ...]`."""
    return rows if window == 1 else rows.unfold(0, window, 1).mean(-1)
