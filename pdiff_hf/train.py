"""Stage 2: learn the distribution of the networks of a zoo. Runs alone or under `accelerate launch`."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .config import parse, save_run
from .hub import write_pipeline_card
from .pipelines.neural_network_diffusion import (
    NeuralNetworkDiffusionPipeline,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
)
from .zoo import WeightZoo, ZooError


CHECKPOINT = "checkpoint-"
LOSSES = "train.losses.jsonl"


class TrainingError(RuntimeError):
    """A training that cannot start or go on."""


@dataclass(frozen=True)
class TrainConfig:
    """Trains the parameter autoencoder, then the denoiser, and saves a pipeline."""

    zoo: str = "runs/zoo"
    """Folder of the zoo to learn from, or its name on the Hub."""
    output_dir: str = "runs/pipeline"
    """Folder of the pipeline; checkpoints of the training go there too."""
    seed: int = 0
    """Of initialization, batches and noise."""
    batch_size: int = 64
    """Networks a process draws for each forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes an optimizer step."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the forward passes."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    patch_size: int = 64
    """Parameters a patch of the autoencoder."""
    hidden_channels: int = 64
    """Features a patch of the autoencoder."""
    latent_channels: int = 4
    """Channels of the latents."""
    latent_length: int = 32
    """Length of the latents."""
    vae_steps: int = 800
    """Optimizer steps of the autoencoder."""
    vae_learning_rate: float = 2e-3
    """Peak of the one-cycle learning rate of the autoencoder."""
    input_noise: float = 0.05
    """Standard deviation of the noise on normalized vectors that the autoencoder removes."""
    kl_weight: float = 1e-3
    """Weight of the KL divergence, per latent element, against the squared error, per parameter."""

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
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    """What the denoiser predicts."""

    checkpointing_steps: int = 500
    """Optimizer steps, over both stages, from one checkpoint to the next."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints are kept; the oldest go first."""
    resume_from_checkpoint: str | None = None
    """'latest', or the path of a checkpoint of this output_dir."""
    report_to: str | None = None
    """A tracker of accelerate: tensorboard, wandb, all, ..."""


class AutoencoderObjective(nn.Module):
    """The loss of the autoencoder: squared error of the reconstruction plus the weighted KL divergence."""

    def __init__(self, vae: ParameterAutoencoderKL, input_noise: float, kl_weight: float):
        super().__init__()
        self.vae, self.input_noise, self.kl_weight = vae, input_noise, kl_weight

    def forward(self, normalized: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(normalized.shape, generator=generator, device=normalized.device)
        posterior = self.vae.encode(normalized + self.input_noise * noise).latent_dist
        reconstruction = self.vae.decode(posterior.sample(generator)).sample
        # Kingma and Welling (2013, arXiv 1312.6114), appendix B.
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(reconstruction.float(), normalized) + self.kl_weight * kl


class DenoiserObjective(nn.Module):
    """The loss of the denoiser: squared error of what the scheduler's prediction type asks for."""

    def __init__(self, unet: ParameterUNet1DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.unet, self.scheduler = unet, scheduler

    def forward(self, latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        timesteps = torch.randint(
            self.scheduler.config.num_train_timesteps, (len(latents),), generator=generator, device=latents.device
        )
        prediction = self.unet(self.scheduler.add_noise(latents, noise, timesteps), timesteps).sample
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        return F.mse_loss(prediction.float(), target)


class Training:
    r"""
    The loop that both stages share. Steps are counted over both; the batch and the noise of a step depend on seed,
    stage, step and process alone, so that a resumed training has the losses of an uninterrupted one.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_dir=config.output_dir,
        )
        self.resume_from = self._checkpoint_to_resume()
        self.step = int(self.resume_from.name.removeprefix(CHECKPOINT)) if self.resume_from else 0
        self.total = config.vae_steps + config.unet_steps
        self.progress = tqdm(
            total=self.total, initial=self.step, desc="train", disable=not self.accelerator.is_local_main_process
        )

    def fit(self, stage: str, objective: nn.Module, data: torch.Tensor, learning_rate: float, last_step: int) -> None:
        r"""
        Trains until `last_step`, from the present step or from the checkpoint to resume.

        Args:
            stage (`str`): Its name, in logs.
            objective (`nn.Module`): Called as `objective(batch, generator)`, gives a loss.
            data (`torch.Tensor`): Training examples, `[N, ...]`.
            learning_rate (`float`): Peak of the one-cycle schedule.
            last_step (`int`): Where the stage ends.
        """
        accelerator, config = self.accelerator, self.config
        first_step = 0 if stage == "vae" else config.vae_steps
        optimizer = torch.optim.AdamW(objective.parameters(), lr=learning_rate)
        # Not prepared: accelerate would take one step a process.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=last_step - first_step)
        ema = EMAModel(objective.parameters(), decay=config.ema_decay)
        model, optimizer = accelerator.prepare(objective, optimizer)
        ema.to(accelerator.device)
        accelerator.register_for_checkpointing(schedule, ema)
        if self.resume_from is not None and self.step < last_step:
            accelerator.load_state(str(self.resume_from))
            self.resume_from = None

        batches = self._batches(data, first_step)
        model.train()
        while self.step < last_step:
            losses = []
            for _ in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(model):
                    batch, generator = next(batches)
                    with accelerator.autocast():
                        loss = model(batch, generator)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            schedule.step()
            ema.step(objective.parameters())
            self.step += 1
            self._log(stage, accelerator.reduce(torch.stack(losses).mean(), "mean").item())
            if self.step % config.checkpointing_steps == 0 and self.step < last_step:
                self._save_checkpoint()
        if stage == "unet":
            ema.copy_to(objective.parameters())
        accelerator.unwrap_model(model)
        accelerator._custom_objects.clear()
        accelerator.free_memory()

    def _batches(self, data: torch.Tensor, first_step: int) -> Iterator[tuple[torch.Tensor, torch.Generator]]:
        accelerator, config = self.accelerator, self.config
        position = self.step * config.gradient_accumulation_steps
        while True:
            generator = torch.Generator(accelerator.device).manual_seed(
                (config.seed * 1_000_003 + position * accelerator.num_processes + accelerator.process_index) % 2**63
            )
            indices = torch.randint(
                len(data), (config.batch_size,), generator=generator, device=accelerator.device
            )
            yield data[indices], generator
            position += 1

    def _log(self, stage: str, loss: float) -> None:
        if loss != loss:
            raise TrainingError(
                f"The {stage} diverged at step {self.step}: its loss is NaN. Lower its learning rate and resume from "
                f"the last checkpoint in {self.folder}."
            )
        self.progress.update()
        self.progress.set_postfix(stage=stage, loss=f"{loss:.4f}", refresh=False)
        self.accelerator.log({f"{stage}/loss": loss}, step=self.step)
        if self.accelerator.is_main_process:
            self._losses.append(json.dumps({"step": self.step, "stage": stage, "loss": loss}))
