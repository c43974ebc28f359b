"""The training loop: accelerate, EMA, checkpoints, logs."""

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from ..configs import LoopConfig
from ..errors import ConfigError, TrainingError
from ..files import explained, is_pipeline
from ..parallel import processes, wait_for_everyone
from ..runs import check_same_run, generator_at, own_randomness
from .objectives import Batch, Objective


Config = TypeVar("Config", bound="LoopConfig")
CHECKPOINT = "checkpoint-"
LOSSES = "train.losses.jsonl"
# In a checkpoint: the moving average of what is being trained, and what was trained before it.
AVERAGE, FINISHED = "average.safetensors", "finished.safetensors"
# They may change from a run to the one that resumes it, and say nothing of the result.
RUN_SETTINGS = ("output_dir", "resume_from_checkpoint", "checkpoints_total_limit", "report_to", "push_to_hub")


def with_environment(config: Config) -> Config:
    """The configuration with what `accelerate launch` was told, where it leaves that open."""
    steps, precision = config.gradient_accumulation_steps, config.mixed_precision
    asked = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    try:
        steps = steps or int(asked)
    except ValueError as error:
        raise ConfigError(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {asked!r}, and no number.") from error
    precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()  # type: ignore[assignment]
    return replace(config, gradient_accumulation_steps=steps, mixed_precision=precision)


class TrainingLoop:
    r"""
    Trains one objective after the other. The batch and the noise of a step depend on seed and step alone, and
    processes share them: a resumed training has the losses of an uninterrupted one, and several processes, up to
    rounding, those of one. They are drawn on the device: another kind of device has others.

    Args:
        config (`LoopConfig`): Of the training.
        steps (`int`): Optimizer steps of all objectives together.

    Raises:
        [`TrainingError`]: there is no such checkpoint, or one and nobody asked to go on from it.
        [`ConfigError`]: the processes cannot share a batch, or the checkpoint is of another configuration.
    """

    def __init__(self, config: LoopConfig, steps: int):
        self.config, self.steps = config, steps
        self.folder = Path(config.output_dir)
        self.resume_from = _checkpoint_to_resume(config)
        self.step = _step_of(self.resume_from) if self.resume_from else 0
        self.planned = 0  # steps of the objectives so far
        self.losses: TextIO | None = None  # of the main process
        self.finished: dict[str, torch.Tensor] = {}
        processes()
        self.accelerator = Accelerator(
            # As a plugin, beside which accelerate's environment says nothing.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=self.accumulation),
            mixed_precision=config.mixed_precision,
            log_with=config.report_to,
            project_dir=config.output_dir,
        )
        try:
            self._start(steps)
        except BaseException:
            AcceleratorState._reset_state()  # as `__exit__`, which comes after a start only
            raise

    def _start(self, steps: int) -> None:
        """What may be refused, and what is open until the end."""
        config = self.config
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
            raise ConfigError(f"accelerate is set up for {kind.value}, and what is trained here is not split.")
        if config.batch_size % self.accelerator.num_processes:
            raise ConfigError(
                f"{self.accelerator.num_processes} processes cannot share a batch_size of {config.batch_size} evenly."
            )
        if self.resume_from is not None:
            with _readable(self.resume_from):
                self.finished = load_file(self.resume_from / FINISHED)
        if config.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise ConfigError("fp16 needs an accelerator, and here is none: take bf16.")
        # Where nothing is said, TQDM_DISABLE decides.
        silent: dict[str, Any] = {} if self.accelerator.is_local_main_process else {"disable": True}
        self.progress = tqdm(total=steps, initial=self.step, desc="train", unit="step", **silent)
        try:
            self.accelerator.init_trackers("pdiff-hf")
        except Exception as error:  # of whatever package tracks
            raise TrainingError(f"The tracker {config.report_to} cannot start: {error}") from error

    @property
    def accumulation(self) -> int:
        """Forward passes an optimizer step."""
        return self.config.gradient_accumulation_steps or 1

    def fit(
        self,
        name: str,
        objective: Objective,
        data: Callable[[torch.Tensor], Batch],
        count: int,
        steps: int,
        learning_rate: float,
    ) -> None:
        r"""
        Trains an objective, from the beginning or from the checkpoint to resume, and leaves the moving average of its
        weights in it.

        Args:
            name (`str`): What is trained, as in the names of its settings: `<name>_learning_rate`.
            objective (`Objective`): A module.
            data (`Callable[[torch.Tensor], dict[str, torch.Tensor]]`):
                Gives what the objective takes, by name, each `[n, ...]`, of indices `[n]`.
            count (`int`): How many data there are.
            steps (`int`): Optimizer steps.
            learning_rate (`float`): The peak of a one-cycle schedule (Smith and Topin 2017, arXiv 1708.07120).

        Raises:
            [`TrainingError`]: it diverged, or the checkpoint is damaged.
        """
        accelerator, config = self.accelerator, self.config
        first = self.planned
        last = self.planned = first + steps
        objective.to(accelerator.device)
        if self.step >= last:  # before the checkpoint that was resumed
            with _readable(self.resume_from):
                objective.load_state_dict(
                    {key: self.finished[f"{name}.{key}"].to(accelerator.device) for key in objective.state_dict()}
                )
            objective.eval()
            return
        self.progress.set_description(f"train {name}")
        made = objective.optimizers(learning_rate)
        peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in made]
        model, *optimizers = accelerator.prepare(objective, *made)
        ema = EMAModel(objective.parameters(), decay=config.ema_decay, foreach=True)
        if self.step > first:
            assert self.resume_from is not None
            with _readable(self.resume_from), own_randomness():
                of_python, of_numpy = random.getstate(), np.random.get_state()
                accelerator.load_state(str(self.resume_from))
                random.setstate(of_python)
                np.random.set_state(of_numpy)
                _load_average(ema, self.resume_from / AVERAGE)
            ema.to(accelerator.device)
        # Not prepared: accelerate would take a step of the schedule for every process.
        schedules = [
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer.optimizer,
                peak,
                total_steps=steps,
                cycle_momentum="betas" in optimizer.optimizer.defaults,
                last_epoch=self.step - first - 1,
            )
            for optimizer, peak in zip(optimizers, peaks, strict=True)
        ]

        # Only now has a checkpoint turned out to be what can be resumed.
        if accelerator.is_main_process and self.losses is None:
            self.losses = _open_losses(self.folder / LOSSES, self.step)
        if accelerator.is_main_process and self.resume_from is not None:
            self._remove_later(self.step + 1)
        model.train()
        while self.step < last:
            losses = []
            for accumulation in range(self.accumulation):
                with accelerator.accumulate(model):
                    loss = model(**self._draw(objective, data, count, accumulation))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                losses.append(loss.detach())
            for schedule in schedules:
                schedule.step()
            ema.step(objective.parameters())
            self.step += 1
            self._log(name, accelerator.reduce(torch.stack(losses).mean(), "mean").item())
            if self._is_due() and self.step < last:
                self._save_checkpoint(ema)
        ema.copy_to(objective.parameters())
        objective.eval()
        # Copies, since whoever gets the objective back may change it.
        self.finished |= {f"{name}.{key}": value.to("cpu", copy=True) for key, value in objective.state_dict().items()}
        accelerator.free_memory()
        if self._is_due() and self.step < self.steps:
            self._save_checkpoint(None)

    def _draw(
        self, objective: Objective, data: Callable[[torch.Tensor], Batch], count: int, accumulation: int
    ) -> Batch:
        """This process's share of what the objective takes in this step."""
        accelerator, config = self.accelerator, self.config
        position = self.step * self.accumulation + accumulation
        generator = generator_at(config.seed, position, accelerator.device)
        indices = torch.randint(count, (config.batch_size,), generator=generator, device=accelerator.device)
        share = slice(accelerator.process_index, None, accelerator.num_processes)
        batch = {name: values.to(accelerator.device) for name, values in data(indices[share]).items()}
        drawn = objective.draw(len(indices), batch, generator)
        return batch | {name: values[share] for name, values in drawn.items()}

    def _is_due(self) -> bool:
        return self.step % self.config.checkpointing_steps == 0

    def _log(self, name: str, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"The {name} diverged: its loss is {loss} at step {self.step}. Lower --{name}-learning-rate."
            )
        self.progress.update()
        self.progress.set_postfix(loss=f"{loss:.4f}", refresh=False)
        self.accelerator.log({f"{name}/loss": loss}, step=self.step)
        if self.losses is not None:
            self.losses.write(json.dumps({"step": self.step, "objective": name, "loss": loss}) + "\n")

    def _save_checkpoint(self, ema: EMAModel | None) -> None:
        target = self.folder / f"{CHECKPOINT}{self.step}"
        temporary = target.with_name(f"{target.name}.part")
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        if self.losses is not None:
            self.losses.flush()
        wait_for_everyone()
        try:
            with explained(target, "The checkpoints before are whole; make room and resume from the latest."):
                # safetensors would leave out weights without numbers, of tokens that have none, and miss them later.
                self.accelerator.save_state(str(temporary), safe_serialization=False)
                if self.accelerator.is_main_process:
                    save_file(self.finished, temporary / FINISHED)
                    if ema is not None:
                        _save_average(ema, temporary / AVERAGE)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        wait_for_everyone()
        if self.accelerator.is_main_process:
            self._remove_later(self.step)
            temporary.rename(target)
            limit = self.config.checkpoints_total_limit
            for old in _checkpoints(self.folder)[: -limit if limit else 0]:
                shutil.rmtree(old)

    def _remove_later(self, step: int) -> None:
        """Removes checkpoints from a step on: to a training that goes on before it, they are another future."""
        for later in _checkpoints(self.folder):
            if _step_of(later) >= step:
                shutil.rmtree(later)

    def __enter__(self) -> "TrainingLoop":
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        if self.losses is not None:
            self.losses.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # unlike `end_training`, which parts the processes
        # So that the next training of this process may have another precision.
        AcceleratorState._reset_state()


@contextmanager
def _readable(checkpoint: Path | None) -> Iterator[None]:
    """Turns whatever a damaged or hostile checkpoint makes of its readers into a [`TrainingError`]."""
    try:
        yield
    except Exception as error:
        raise TrainingError(f"{checkpoint} cannot be resumed: {error!r:.500}") from error


def _save_average(ema: EMAModel, file: Path) -> None:
    """As tensors: what can arrive by download must not hold code."""
    tensors = {str(index): value.contiguous() for index, value in enumerate(ema.shadow_params)}
    save_file(tensors, file, {"optimization_step": str(ema.optimization_step)})


def _load_average(ema: EMAModel, file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        ema.shadow_params = [tensors.get_tensor(str(index)) for index in range(len(ema.shadow_params))]
        ema.optimization_step = int(tensors.metadata()["optimization_step"])


def _checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found = [path for path in folder.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return sorted(found, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def _checkpoint_to_resume(config: LoopConfig) -> Path | None:
    folder = Path(config.output_dir)
    present = _checkpoints(folder)
    if config.resume_from_checkpoint is None:
        if present:
            raise TrainingError(
                f"{folder} holds {present[-1].name} of an earlier training. Go on from it with "
                "--resume-from-checkpoint latest, or choose another --output-dir."
            )
        if is_pipeline(folder):
            raise TrainingError(f"{folder} holds a pipeline. Choose another --output-dir, or delete it.")
        return None
    if config.resume_from_checkpoint == "latest":
        wanted = present[-1] if present else None
        if wanted is None and is_pipeline(folder):
            raise TrainingError(
                f"{folder} holds a pipeline whose training has ended, and no checkpoint to go on from. Choose another "
                "--output-dir, or delete it."
            )
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
    if file.is_symlink():
        raise TrainingError(f"{file} is a link, through which no losses are written: remove it.")
    with explained(file):
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"".join(lines[:step]))
        return file.open("a", encoding="utf-8")
