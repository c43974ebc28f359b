"""The training loop: accelerate, EMA, checkpoints, logs."""

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tqdm.auto import tqdm

from ..errors import ConfigError, TrainingError
from ..parallel import processes
from ..runs import check_same_run
from .objectives import DenoiserObjective


if TYPE_CHECKING:
    from .stage import TrainConfig

CHECKPOINT = "checkpoint-"
LOSSES = "train.losses.jsonl"
# They may change from a run to the one that resumes it, and say nothing of the result.
RUN_SETTINGS = ("output_dir", "resume_from_checkpoint", "checkpoints_total_limit", "report_to", "push_to_hub")


class Training:
    r"""
    The training loop of the denoiser. The batch and the noise of a step depend on seed and step alone, and processes
    share them: a resumed training has the losses of an uninterrupted one, and several processes, up to rounding,
    those of one.
    """

    def __init__(self, config: "TrainConfig"):
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


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _checkpoint_to_resume(config: "TrainConfig") -> Path | None:
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
