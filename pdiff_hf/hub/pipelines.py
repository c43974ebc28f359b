"""Pipelines of a folder or of the Hub, run by the code of this package."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import PipelineError
from ..files import UNFINISHED, is_pipeline
from ..pipelines import neural_network_diffusion
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline
from .pipeline_files import COMPONENTS, pipeline_folder


# Far above any schedule; a scheduler allocates several numbers a timestep.
MOST_TIMESTEPS = 10**6
# More than any component counts.
MOST_NUMBER = 10**12
# Parts of a component. Building them takes a second.
MOST_MODULES = 20_000
KNOWN = {name: getattr(neural_network_diffusion, name) for name in neural_network_diffusion.__all__}
# The denoiser of diffusers that fits the slot.
KNOWN["UNet1DModel"] = diffusers.UNet1DModel


def load_pipeline(
    name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None, **kwargs: Any
) -> NeuralNetworkDiffusionPipeline:
    r"""
    A pipeline from a folder or a model repository, run by the code of this package: none of the repository's own code
    is executed.

    Args:
        name_or_path (`str` or `os.PathLike`): The folder, or the name on the Hub.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        token (`str`, *optional*): For private repositories; the one of `hf auth login` by default.
        kwargs (*optional*): Passed to `from_pretrained`.

    Raises:
        [`PipelineError`]: there is no pipeline, or it is damaged.
        [`HubError`]: the repository cannot be read.
    """
    folder = pipeline_folder(name_or_path, revision, token)
    if any(Path(folder).glob(f"{UNFINISHED}pipeline")) and not is_pipeline(folder):
        raise PipelineError(f"{name_or_path} holds no pipeline: saving it was interrupted. Save or train it again.")
    if not is_pipeline(folder):
        raise PipelineError(
            f"{name_or_path} holds no pipeline: there is no model_index.json. `pdiff-hf train` makes one."
        )
    try:
        index = NeuralNetworkDiffusionPipeline.load_config(str(folder))
        if "scheduler" not in kwargs:
            _check_scheduler(index.get("scheduler"))
        _check_schedule(folder / "scheduler")
        for component in COMPONENTS:
            class_name = (index.get(component) or [None, None])[1]
            # The class that the loader takes is the one of the index, whatever the config says.
            if class_name is not None and component not in kwargs:
                _check_library(component, *index[component])
                _check_weights(folder / component, _described(folder / component, class_name))
        pipe = NeuralNetworkDiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **kwargs)
        statistics = torch.stack([pipe.layout.mean, pipe.layout.std])
        if not torch.isfinite(statistics).all() or (pipe.layout.std < 0).any():
            raise ValueError("the statistics of the layout are no numbers")
    except Exception as error:  # whatever a damaged or hostile folder makes of the loaders
        raise PipelineError(f"The pipeline in {name_or_path} cannot be loaded: {error}") from error
    return pipe


def check_draws(pipeline: Any) -> None:
    """Raises [`PipelineError`] where a pipeline is told initializations, and cannot draw them itself."""
    if getattr(pipeline, "takes_initial", False):
        try:
            pipeline.layout.draw_initial([torch.Generator().manual_seed(0)])
        except ValueError as error:
            raise PipelineError(
                f"This pipeline cannot sample by itself: {error} No command can: call the pipeline from Python, "
                "`pipe(initial=state_dicts)`, and evaluate what it makes."
            ) from error


def _check_scheduler(entry: Any) -> None:
    """The loader takes any class of diffusers for a scheduler, models of any size too."""
    library, name = entry
    known = getattr(diffusers, name, None) if library == "diffusers" else None
    if not isinstance(known, type) or not issubclass(known, diffusers.SchedulerMixin):
        raise ValueError(f"the scheduler is of the class {name!r:.100}, which is no scheduler of diffusers")


def _check_library(component: str, library: Any, name: str) -> None:
    """Of any other module, the loader would import code."""
    if library != "diffusers" and library != getattr(KNOWN.get(name), "__module__", None):
        raise ValueError(f"{component} is of the module {library!r:.100}, which is none of this package")


def _check_schedule(folder: Path) -> None:
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    timesteps = config.get("num_train_timesteps", 1000)
    if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps has to be between 1 and {MOST_TIMESTEPS}, and is {timesteps!r:.200}")
    _check_numbers(config, MOST_TIMESTEPS)


def _check_numbers(value: Any, most: int, name: str = "") -> None:
    """What loaders may take for a size is refused where nothing is so large."""
    if isinstance(value, Mapping | list):
        entries = value.items() if isinstance(value, Mapping) else ((name, one) for one in value)
        for key, one in entries:
            _check_numbers(one, most, str(key))
    elif isinstance(value, int | float) and abs(value) > most and abs(value) != math.inf:
        raise ValueError(f"{name:.100} is {value:.3g}, and has to be {most:,} at most")


def _described(folder: Path, name: str) -> torch.nn.Module:
    """The component that a config describes, without memory for its weights: of our class or one of diffusers."""
    model_class = KNOWN.get(name)
    if model_class is None:
        raise ValueError(f"{folder.name} is of the class {name!r:.100}; known are {', '.join(KNOWN)}")
    config = model_class.load_config(str(folder))
    _check_numbers(config, MOST_NUMBER)
    built = 0

    def count(*_: Any) -> None:
        nonlocal built
        built += 1
        if built > MOST_MODULES:
            raise ValueError(f"{folder.name} would have more than {MOST_MODULES:,} layers")

    hook = register_module_module_registration_hook(count)
    try:
        with torch.device("meta"):
            model: torch.nn.Module = model_class.from_config(config)
    finally:
        hook.remove()
    return model


def _check_weights(folder: Path, model: torch.nn.Module) -> None:
    """The loaders fill up what a file lacks, and allocate what a config claims: both are compared before."""
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    stored: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    differing = sorted(name for name in stored.keys() | expected.keys() if stored.get(name) != expected.get(name))
    if differing:
        raise ValueError(f"the weights of {folder.name} do not fit its config: {', '.join(differing):.200}")
