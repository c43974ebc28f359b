"""Pipelines of a folder or of the Hub, run by the code of this package."""

import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from ..errors import PipelineError
from ..files import is_pipeline
from ..pipelines import neural_network_diffusion
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline
from .client import download, is_repository


# Far above any schedule; a scheduler allocates several numbers a timestep.
MOST_TIMESTEPS = 10**6
COMPONENTS = ("layout", "vae", "unet", "transformer", "condition_encoder")
OWN = {name: getattr(neural_network_diffusion, name) for name in neural_network_diffusion.__all__}


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
    if not is_pipeline(folder):
        raise PipelineError(f"{name_or_path} holds no pipeline: there is no model_index.json.")
    try:
        index = NeuralNetworkDiffusionPipeline.load_config(str(folder))
        _check_schedule(folder / "scheduler")
        for component in COMPONENTS:
            class_name = (index.get(component) or [None, None])[1]
            # The class that the loader takes is the one of the index, whatever the config says.
            if class_name is not None and component not in kwargs:
                _check_weights(folder / component, _described(folder / component, class_name))
        pipe = NeuralNetworkDiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, **kwargs)
        statistics = torch.stack([pipe.layout.mean, pipe.layout.std])
        if not torch.isfinite(statistics).all() or (pipe.layout.std < 0).any():
            raise ValueError("the statistics of the layout are no numbers")
    except Exception as error:  # whatever a damaged or hostile folder makes of the loaders
        raise PipelineError(f"The pipeline in {name_or_path} cannot be loaded: {error}") from error
    return pipe


def pipeline_folder(
    name_or_path: str | os.PathLike[str], revision: str | None = None, token: str | None = None
) -> Path:
    """The folder itself, or that of the repository's commit in the cache, which is named by the commit."""
    if Path(name_or_path).is_dir() or not is_repository(name_or_path):
        return Path(name_or_path)
    # Code, and weights in other formats than safetensors, stay where they are.
    patterns = ["model_index.json", "*/*.json", "*/*.safetensors"]
    return Path(download(str(name_or_path), "model", revision, token, patterns))


def _check_schedule(folder: Path) -> None:
    config = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))
    timesteps = config.get("num_train_timesteps", 1000)
    if type(timesteps) is not int or not 1 <= timesteps <= MOST_TIMESTEPS:
        raise ValueError(f"num_train_timesteps has to be between 1 and {MOST_TIMESTEPS}, and is {timesteps!r:.200}")


def _described(folder: Path, name: str) -> torch.nn.Module:
    """The component that a config describes, without memory for its weights: of our class or one of diffusers."""
    model_class = OWN.get(name) or getattr(diffusers, name)
    config = model_class.load_config(str(folder))
    with torch.device("meta"):
        model: torch.nn.Module = model_class.from_config(config)
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
