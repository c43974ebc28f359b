"""Stage 2: learn the distribution of the networks of a zoo. Runs alone or under `accelerate launch`."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TextIO, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .config import ConfigError, check_positive, check_same_facts, check_same_run, save_run, stage_main
from .errors import PdiffError
from .hub import load_pipeline, push, write_pipeline_card
from .parallel import from_main, processes
from .pipelines.neural_network_diffusion import (
    NeuralNetworkDiffusionPipeline,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
)
from .zoo import BATCH_VALUES, WeightZoo, ZooError


Model = TypeVar("Model", bound=nn.Module)
CHECKPOINT = "checkpoint-"
LOSSES = "train.losses.jsonl"
# Networks, evenly picked, that the autoencoder's directions are fitted to: the cost grows with their square.
MOST_FITTED = 2048
# They may change from a run to the one that resumes it, and say nothing of the result.
RUN_SETTINGS = ("output_dir", "resume_from_checkpoint", "checkpoints_total_limit", "report_to", "push_to_hub")


class TrainingError(PdiffError, ValueError):
    """A training that cannot start or go on."""


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


class DenoiserObjective(nn.Module):
    """The loss of the denoiser: squared error of what the scheduler's prediction type asks for."""

    def __init__(self, unet: ParameterUNet1DModel, scheduler: DDPMScheduler):
        super().__init__()
        self.unet, self.scheduler = unet, scheduler

    def draw(self, count: int, shape: torch.Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise `[count, *shape]` and timesteps `[count]`."""
        noise = torch.randn((count, *shape), generator=generator, device=generator.device)
        steps = self.scheduler.config.num_train_timesteps
        return noise, torch.randint(steps, (count,), generator=generator, device=generator.device)

    def forward(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        prediction = self.unet(self.scheduler.add_noise(latents, noise, timesteps), timesteps).sample
        target = {
            "epsilon": lambda: noise,
            "sample": lambda: latents,
            "v_prediction": lambda: self.scheduler.get_velocity(latents, noise, timesteps),
        }[self.scheduler.config.prediction_type]()
        return F.mse_loss(prediction.float(), target)


class Training:
    r"""
    The training loop of the denoiser. The batch and the noise of a step depend on seed and step alone, and processes
    share them: a resumed training has the losses of an uninterrupted one, and several processes, up to rounding,
    those of one.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.resume_from = _checkpoint_to_resume(config)
        self.step = _step_of(self.resume_from) if self.resume_from else 0
        processes()
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_dir=config.output_dir,
        )
        if config.batch_size % self.accelerator.num_processes:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes cannot share a batch_size of {config.batch_size} evenly."
            )
        self.progress = tqdm(
            total=config.unet_steps,
            initial=self.step,
            desc="train",
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        if self.accelerator.is_main_process:
            self.losses = _open_losses(self.folder / LOSSES, self.step)
        self.accelerator.init_trackers("pdiff-hf")

    def fit(self, objective: DenoiserObjective, data: torch.Tensor) -> None:
        r"""
        Trains, from the beginning or from the checkpoint to resume, and leaves the moving average of the weights in
        the objective.

        Args:
            objective (`DenoiserObjective`): What is trained.
            data (`torch.Tensor`): Latents, `[N, C, L]`.
        """
        accelerator, config = self.accelerator, self.config
        steps, learning_rate = config.unet_steps, config.unet_learning_rate
        optimizer = torch.optim.AdamW(objective.parameters(), lr=learning_rate, fused=True)
        # Not prepared: accelerate would take a step of the schedule for every process.
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
        model, optimizer = accelerator.prepare(objective, optimizer)
        ema = EMAModel(objective.parameters(), decay=config.ema_decay, foreach=True)
        accelerator.register_for_checkpointing(schedule, ema)
        if self.resume_from is not None:
            accelerator.load_state(str(self.resume_from))
            ema.to(accelerator.device)
            self.resume_from = None

        model.train()
        data = data.to(accelerator.device)
        while self.step < steps:
            losses = []
            for accumulation in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(model):
                    loss = model(*self._draw(objective, data, accumulation))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            schedule.step()
            ema.step(objective.parameters())
            self.step += 1
            self._log(accelerator.reduce(torch.stack(losses).mean(), "mean").item())
            if self.step % config.checkpointing_steps == 0 and self.step < steps:
                self._save_checkpoint()
        ema.copy_to(objective.parameters())
        objective.eval()
        accelerator.free_memory()
        accelerator._custom_objects.clear()

    def _draw(self, objective: DenoiserObjective, data: torch.Tensor, accumulation: int) -> list[torch.Tensor]:
        """This process's share of what the objective takes in this step."""
        accelerator, config = self.accelerator, self.config
        position = self.step * config.gradient_accumulation_steps + accumulation
        generator = torch.Generator(accelerator.device).manual_seed((config.seed * 1_000_003 + position) % 2**63)
        indices = torch.randint(len(data), (config.batch_size,), generator=generator, device=accelerator.device)
        batch = (data[indices], *objective.draw(len(indices), data.shape[1:], generator))
        return [values[accelerator.process_index :: accelerator.num_processes] for values in batch]

    def _log(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"The denoiser diverged: its loss is {loss} at step {self.step}. Lower --unet-learning-rate."
            )
        self.progress.update()
        self.progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.accelerator.log({"loss": loss}, step=self.step)
        if self.accelerator.is_main_process:
            self.losses.write(json.dumps({"step": self.step, "loss": loss}) + "\n")

    def _save_checkpoint(self) -> None:
        target = self.folder / f"{CHECKPOINT}{self.step}"
        temporary = target.with_name(f"{target.name}.part")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            self.losses.flush()
        self.accelerator.wait_for_everyone()
        try:
            self.accelerator.save_state(str(temporary))
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise TrainingError(
                f"Cannot write {target}: {error}. The checkpoints before are whole; make room and resume from the "
                "latest."
            ) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            # Those of a training that went on from here before are of another future.
            for later in _checkpoints(self.folder):
                if _step_of(later) >= self.step:
                    shutil.rmtree(later)
            temporary.rename(target)
            limit = self.config.checkpoints_total_limit
            for old in _checkpoints(self.folder)[: -limit if limit else 0]:
                shutil.rmtree(old)

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self.accelerator.is_main_process:
            self.losses.close()
        self.accelerator.end_training()
        # So that the next training of this process may have another precision.
        AcceleratorState._reset_state()


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
        layout, vae, latents = _encode(config, zoo, accelerator.device)
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


def denoising_scheduler(prediction_type: str) -> DDPMScheduler:
    """The noise of the published method, 1000 steps. Nothing is clipped: latents have unit scale and no bounds."""
    return DDPMScheduler(
        beta_start=1e-4,
        beta_end=2e-2,
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )


def _encode(
    config: TrainConfig, zoo: WeightZoo, device: torch.device
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


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _checkpoint_to_resume(config: TrainConfig) -> Path | None:
    folder = Path(config.output_dir)
    present = _checkpoints(folder)
    if config.resume_from_checkpoint is None:
        if present:
            raise TrainingError(
                f"{folder} holds {present[-1].name} of an earlier training. Go on from it with "
                "--resume-from-checkpoint latest, or choose another --output-dir."
            )
        return None
    if config.resume_from_checkpoint == "latest":
        wanted = present[-1] if present else None
    else:
        given = Path(config.resume_from_checkpoint)
        wanted = folder / given.name
        if wanted not in present or (given != Path(given.name) and given.resolve() != wanted.resolve()):
            raise TrainingError(
                f"There is no checkpoint {given.name} in {folder}. "
                f"Present: {', '.join(path.name for path in present) or 'none'}."
            )
    if wanted is not None:
        check_same_run(folder, "train", config, but_for=RUN_SETTINGS)
    return wanted


def _open_losses(file: Path, step: int) -> TextIO:
    """The log of losses, without the steps that will be trained again."""
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines[:step]), encoding="utf-8")
    return file.open("a", encoding="utf-8")


main = stage_main("train", TrainConfig, run_train)

if __name__ == "__main__":
    main()
