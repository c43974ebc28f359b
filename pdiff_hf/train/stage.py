"""Stage 2: learn the distribution of the networks of a zoo. Runs alone or under `accelerate launch`."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..configs import AnyTrainConfig, LoopConfig, NeuronTrainConfig, TrainConfig
from ..errors import ZooError
from ..files import check_parts, explained
from ..hub.cards import write_pipeline_card
from ..hub.pipeline_files import weights_sha256
from ..hub.pipelines import load_pipeline
from ..hub.push import push
from ..parallel import from_main, wait_for_everyone, written
from ..pipelines.neural_network_diffusion import NeuralNetworkDiffusionPipeline, ParameterLayout
from ..runs import check_same_facts, save_run
from ..text import shown_name
from ..zoo import WeightZoo
from .latent_diffusion import LatentDiffusion
from .loop import RUN_SETTINGS, TrainingLoop, with_environment
from .neuron_diffusion import NeuronDiffusion


# What trains the pipelines of each family.
RECIPES: dict[type[LoopConfig], Any] = {TrainConfig: LatentDiffusion, NeuronTrainConfig: NeuronDiffusion}


def run_train(config: AnyTrainConfig) -> NeuralNetworkDiffusionPipeline:
    r"""
    Learns the networks of a zoo and saves the pipeline in `config.output_dir`.

    Raises:
        [`ConfigError`]: a condition that the rows lack, models that no memory holds, a folder with another run.
        [`ZooError`]: the zoo cannot be read, or has fewer than two networks.
        [`TrainingError`]: the training diverged, or cannot be resumed.
        [`TaskError`]: networks of this task cannot be learned in this way.
        [`WriteError`]: the disk is full, or another process writes the folder.
    """
    with written(config.output_dir, "train"):
        check_parts(config.output_dir, "a pipeline")
        return _train(config, Path(config.output_dir))


def _train(config: AnyTrainConfig, folder: Path) -> NeuralNetworkDiffusionPipeline:
    zoo = WeightZoo.from_pretrained(config.zoo)
    if len(zoo) < 2:
        raise ZooError(f"{config.zoo} has {len(zoo)} network: a distribution needs at least two, and better hundreds.")
    sources = zoo.repositories()  # reads all rows: what they lack is said now, and not after hours
    recipe = RECIPES[type(config)](config, zoo)
    config = with_environment(config)
    with TrainingLoop(config, config.steps) as loop:
        accelerator = loop.accelerator
        facts = {"networks": len(zoo), **recipe.facts, "zoo_sha256": from_main(zoo.sha256)}
        if loop.step > 0:
            check_same_facts(folder, "train", facts)
        wait_for_everyone()
        if accelerator.is_main_process:
            noted = {**facts, "seen": _seen(config, recipe), "processes": accelerator.num_processes}
            save_run(folder, "train", config, **noted)

        # 1. Statistics of the parameters
        layout = _statistics(zoo)

        # 2. What is denoised
        components, data, count = recipe.encode(layout, loop)

        # 3. Denoiser
        denoising = recipe.objective(layout, loop)
        loop.fit(recipe.slot, denoising, data, count, *recipe.budget)

        # 4. Pipeline
        if accelerator.is_main_process:
            pipeline = NeuralNetworkDiffusionPipeline(
                layout=layout.to(accelerator.device),
                scheduler=denoising.scheduler,
                condition_encoder=denoising.condition_encoder,
                **components,
                **{recipe.slot: denoising.denoiser},
            )
            with explained(folder, "The checkpoints are whole; make room and resume from the latest."):
                pipeline.save_pretrained(str(folder))
            save_run(folder, "train", config, **noted, weights_sha256=weights_sha256(folder))
            shutil.rmtree(folder / "evaluation", ignore_errors=True)  # of an earlier pipeline
            encoder = denoising.condition_encoder
            _write_card(config, zoo, folder, sources, None if encoder is None else encoder.known())
            if config.push_to_hub is not None:
                push(folder, config.push_to_hub)
        wait_for_everyone()
        return pipeline if accelerator.is_main_process else load_pipeline(folder)


def _seen(config: Any, recipe: Any) -> dict[str, float]:
    """What the denoiser sees: networks, in all of its steps, and inputs of each step where it compares outputs, which
    count so much. An audit gives as much to what it compares with."""
    networks = recipe.budget[0] * config.batch_size * (config.gradient_accumulation_steps or 1)
    weight = getattr(config, "behaviour_weight", 0.0)
    return {"networks": networks, "inputs": getattr(config, "behaviour_inputs", 0) if weight else 0, "weight": weight}


def _statistics(zoo: WeightZoo) -> ParameterLayout:
    """The layout with mean and standard deviation of each parameter, which the main process takes from the zoo."""

    def fitted() -> tuple[Any, dict[str, torch.Tensor]]:
        layout = zoo.layout.fit(zoo.batches())
        return layout.config.tensors, layout.state_dict()

    tensors, statistics = from_main(fitted)
    layout = ParameterLayout(tensors=tensors, adapter=zoo.layout.config.adapter)
    layout.load_state_dict(statistics)
    if not (layout.std > 0).any():
        raise ZooError(f"The {len(zoo)} networks of {zoo.folder} are identical: there is no distribution to learn.")
    return layout


def _write_card(config: LoopConfig, zoo: WeightZoo, folder: Path, sources: set[str], asked: str | None) -> None:
    recipe = {name: value for name, value in asdict(config).items() if name not in (*RUN_SETTINGS, "zoo")}
    if recipe["task"] is not None:
        recipe["task"] = shown_name(recipe["task"])
    recipe["condition"] = ", ".join(config.condition) or None
    write_pipeline_card(
        folder,
        recipe,
        zoo.task,
        len(zoo),
        zoo.vector_size,
        sources=sources,
        dataset=None if Path(config.zoo).is_dir() else config.zoo,
        asked=asked,
        adapter=zoo.layout.config.adapter,
    )
