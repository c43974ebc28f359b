"""Stage 2: learn the distribution of the networks of a zoo. Runs alone or under `accelerate launch`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from ..config import check_positive
from ..errors import ConfigError, ZooError
from ..hub import load_pipeline, push, write_pipeline_card
from ..parallel import from_main
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline, ParameterUNet1DModel
from ..runs import check_same_facts, save_run
from ..zoo import WeightZoo
from .latent_diffusion import denoising_scheduler, encode
from .loop import RUN_SETTINGS, Training
from .objectives import DenoiserObjective


Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainConfig:
    """Fits the parameter autoencoder, trains the denoiser of its latents, and saves a pipeline."""

    zoo: str = "runs/zoo"
    """Folder of the zoo to learn from, or its name on the Hub."""
    output_dir: str = "runs/pipeline"
    """Folder of the pipeline; checkpoints of the training go there too."""
    seed: int = 0
    """Of initialization, batches and noise."""
    batch_size: int = 64
    """Networks drawn for each forward pass, by all processes together."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward passes."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    checkpoint_averaging: int = 1
    """Consecutive networks of a trajectory whose averages are learned instead of single ones, for better accuracy."""
    latent_channels: int = 8
    """Channels of the latents."""
    latent_length: int = 8
    """Length of the latents. Channels times length are the directions that are kept: memory, too."""

    block_out_channels: tuple[int, ...] = (64, 64)
    """Channels of the denoiser, a level each."""
    layers_per_block: int = 1
    """Residual blocks of the denoiser a level."""
    unet_steps: int = 1500
    """Optimizer steps of the denoiser."""
    unet_learning_rate: float = 1e-3
    """Peak of the one-cycle learning rate of the denoiser."""
    ema_decay: float = 0.995
    """Decay of the average of the denoiser's weights that goes into the pipeline."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "sample"
    """What the denoiser predicts. With epsilon, as in the paper, few-step solvers leave outliers."""

    checkpointing_steps: int = 500
    """Optimizer steps from one checkpoint to the next."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints are kept; the oldest go first."""
    resume_from_checkpoint: str | None = None
    """'latest', or the path of a checkpoint of this output_dir."""
    push_to_hub: str | None = None
    """Name of the model repository that the pipeline is pushed to in the end."""
    report_to: str | None = None
    """A tracker of accelerate: tensorboard, wandb, all, ..."""


def run_train(config: TrainConfig) -> NeuralNetworkDiffusionPipeline:
    r"""
    Learns the networks of a zoo and saves the pipeline in `config.output_dir`.

    Raises:
        [`ZooError`]: the zoo cannot be read, or has fewer than two networks.
        [`TrainingError`]: the training diverged, or cannot be resumed.
    """
    _check(config)
    zoo = WeightZoo.from_pretrained(config.zoo)
    if len(zoo) < 2:
        raise ZooError(f"{config.zoo} has {len(zoo)} network: a distribution needs at least two, and better hundreds.")
    if len(zoo) - config.checkpoint_averaging < 1:
        raise ConfigError(
            f"checkpoint_averaging {config.checkpoint_averaging} leaves fewer than two of {len(zoo)} networks."
        )
    with Training(config) as training:
        return _train(config, zoo, training)


def _train(config: TrainConfig, zoo: WeightZoo, training: Training) -> NeuralNetworkDiffusionPipeline:
    accelerator, folder = training.accelerator, training.folder
    facts = {"networks": len(zoo)}
    if training.step > 0:
        check_same_facts(folder, "train", facts)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_run(folder, "train", config, **facts, processes=accelerator.num_processes)
        layout, vae, latents = encode(config, zoo, accelerator.device)
    # The others need the latents alone, and no memory for the rest.
    latents = from_main(lambda: latents)

    # 3. Denoiser
    scheduler = denoising_scheduler(config.prediction_type)
    unet = _seeded(
        config.seed,
        lambda: ParameterUNet1DModel(
            in_channels=config.latent_channels,
            out_channels=config.latent_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
        ),
    )
    training.fit(DenoiserObjective(unet, scheduler), latents)

    # 4. Pipeline
    if accelerator.is_main_process:
        pipeline = NeuralNetworkDiffusionPipeline(unet=unet, vae=vae, layout=layout, scheduler=scheduler)
        pipeline.save_pretrained(str(folder))
        recipe = {k: v for k, v in asdict(config).items() if k not in RUN_SETTINGS and k != "zoo"}
        write_pipeline_card(folder, zoo, recipe, dataset=None if Path(config.zoo).is_dir() else config.zoo)
        if config.push_to_hub is not None:
            push(folder, config.push_to_hub)
    accelerator.wait_for_everyone()
    return pipeline if accelerator.is_main_process else load_pipeline(folder)


def _check(config: TrainConfig) -> None:
    check_positive(
        config,
        *("batch_size", "gradient_accumulation_steps", "checkpoint_averaging", "latent_channels", "latent_length"),
        *("unet_steps", "layers_per_block", "checkpointing_steps"),
    )
    if config.checkpoints_total_limit is not None:
        check_positive(config, "checkpoints_total_limit")
    widths = config.block_out_channels
    if not widths or any(width < 8 or width % 8 for width in widths):
        raise ConfigError(f"block_out_channels have to be multiples of 8, and are {widths}.")
    if (Path(config.output_dir) / "zoo.json").exists():
        raise ConfigError(f"{config.output_dir} holds a zoo. Choose another --output-dir.")


def _seeded(seed: int, build: Callable[[], Model]) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()
