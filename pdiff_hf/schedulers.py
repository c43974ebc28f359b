"""Which schedulers of diffusers fit a pipeline: those that lead a perfect denoiser to the clean sample."""

import copy
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from .errors import ConfigError
from .runs import own_randomness


# A perfect denoiser is led to the clean sample up to this share of its scale, in so many steps.
TOLERANCE = 0.2
STEPS = 10
FLOW_MATCHING = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)


def replacement(name: str, scheduler: Any) -> Any:
    r"""
    A scheduler of another class with the noise of the present one.

    Args:
        name (`str`): A class of diffusers.
        scheduler (`SchedulerMixin`): Of the pipeline.

    Raises:
        [`ConfigError`]: there is none, or it does not fit. The message lists those that do.
    """
    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class not in _relatives(scheduler):
        raise ConfigError(f"{name!r} is no scheduler that fits this pipeline. These do: {_fitting(scheduler)}.")
    try:
        new = scheduler_class.from_config(scheduler.config)
    except ImportError as error:
        raise ConfigError(f"{name} needs a package that is not installed: {error}") from error
    if not fits(new):
        raise ConfigError(f"{name} does not fit what this pipeline predicts. These do: {_fitting(scheduler)}.")
    return new


def fits(scheduler: Any) -> bool:
    """Whether a scheduler leads a perfect denoiser to the clean sample."""
    clean = torch.linspace(-1, 1, 64).view(1, 8, 8)
    try:
        found = _sampled(copy.deepcopy(scheduler), clean)
    except Exception:  # schedulers that lack a prediction type, or a method, say so in many ways
        return False
    return bool((found - clean).abs().mean() < TOLERANCE * clean.abs().mean())


def _relatives(scheduler: Any) -> list[type]:
    if isinstance(scheduler, FLOW_MATCHING):
        # Heun's steps lead on below the sigma that Euler's end at, where a small error of a prediction is a large one
        # of the velocity.
        return [FlowMatchEulerDiscreteScheduler] if scheduler.config.get("shift_terminal") else list(FLOW_MATCHING)
    return [type(scheduler), *(one for one in scheduler.compatibles if one not in FLOW_MATCHING)]


def _fitting(scheduler: Any) -> str:
    names = []
    for scheduler_class in _relatives(scheduler):
        try:
            new = scheduler_class.from_config(scheduler.config)  # type: ignore[attr-defined]
        except ImportError:
            continue
        if fits(new):
            names.append(scheduler_class.__name__)
    return ", ".join(sorted(set(names)))


def _sampled(scheduler: Any, clean: torch.Tensor) -> torch.Tensor:
    """What sampling comes to with a denoiser that knows the clean sample `[1, C, L]`."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(clean.shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    scheduler.set_timesteps(STEPS)
    with own_randomness():  # some schedulers draw noise
        for timestep in scheduler.timesteps:
            inputs = sample
            if hasattr(scheduler, "scale_model_input"):
                inputs = scheduler.scale_model_input(sample, timestep)
            prediction = _perfect(scheduler, inputs, clean, float(timestep))
            sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    return sample


def _perfect(scheduler: Any, inputs: torch.Tensor, clean: torch.Tensor, timestep: float) -> torch.Tensor:
    """What a perfect denoiser predicts for the clean sample with the noise of a timestep."""
    config = scheduler.config
    if isinstance(scheduler, FLOW_MATCHING):
        # inputs = (1 - sigma) clean + sigma noise, and the velocity is noise - clean (Lipman et al. 2022).
        return (inputs - clean) / max(timestep / config.num_train_timesteps, 1e-6)
    kept = DDPMScheduler.from_config(config).alphas_cumprod
    at = min(max(timestep, 0.0), len(kept) - 1.0)
    low = int(at)
    kept_here = torch.lerp(kept[low], kept[min(low + 1, len(kept) - 1)], at - low)
    signal, noise = kept_here.sqrt(), (1 - kept_here).sqrt()
    epsilon = (inputs - signal * clean) / noise
    return {"sample": clean, "epsilon": epsilon, "v_prediction": signal * epsilon - noise * clean}[
        config.prediction_type
    ]
