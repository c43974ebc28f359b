"""What goes to the Hub and comes from it: pipelines, zoos and their cards."""

import os
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers import DiffusionPipeline
from huggingface_hub import DatasetCard, DatasetCardData, ModelCard, ModelCardData

from .errors import PdiffError
from .pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline


if TYPE_CHECKING:
    from .zoo import WeightZoo


class PipelineError(PdiffError, ValueError):
    """A pipeline that cannot be loaded."""


def load_pipeline(name_or_path: str | os.PathLike, **kwargs: Any) -> NeuralNetworkDiffusionPipeline:
    r"""
    A pipeline from a folder, run by the code of this package: none of the folder's own code is executed.

    Args:
        name_or_path (`str` or `os.PathLike`): The folder.
        kwargs (*optional*): Passed to `from_pretrained`.

    Raises:
        [`PipelineError`]: there is no pipeline.
    """
    folder = Path(name_or_path)
    if not (folder / DiffusionPipeline.config_name).is_file():
        raise PipelineError(f"{folder} holds no pipeline: there is no {DiffusionPipeline.config_name}.")
    return NeuralNetworkDiffusionPipeline.from_pretrained(str(folder), **kwargs)


def write_zoo_card(zoo: "WeightZoo", description: str) -> None:
    """Writes the dataset card of a zoo."""
    card_data = DatasetCardData(
        license="apache-2.0",
        tags=["neural-network-diffusion", "model-zoo", "weights"],
        configs=[{"config_name": "default", "data_files": "metadata.jsonl"}],
    )
    DatasetCard.from_template(
        card_data,
        template_str=_template("zoo.md"),
        title=f"Weight zoo: {zoo.task or 'networks'}",
        description=description,
        count=len(zoo),
        parameters=zoo.vector_size,
    ).save(zoo.folder / "README.md")


def write_pipeline_card(folder: str | os.PathLike, zoo: "WeightZoo", facts: dict[str, Any]) -> None:
    """Writes the model card of a pipeline that was trained on a zoo."""
    card_data = ModelCardData(
        license="apache-2.0",
        library_name="diffusers",
        tags=["neural-network-diffusion", "weight-generation", "diffusers:NeuralNetworkDiffusionPipeline"],
    )
    ModelCard.from_template(
        card_data,
        template_str=_template("pipeline.md"),
        title=f"Neural network diffusion: {zoo.task or 'networks'}",
        task=zoo.task,
        count=len(zoo),
        parameters=zoo.vector_size,
        facts=facts,
    ).save(Path(folder) / "README.md")


def _template(name: str) -> str:
    return (files("pdiff_hf.model_cards") / name).read_text(encoding="utf-8")
