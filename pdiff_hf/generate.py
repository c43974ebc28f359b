"""Stage 3: sample networks from a pipeline into a zoo."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from .config import json_object, read_objects
from .configs import GenerateConfig
from .errors import ConfigError, PipelineError
from .files import is_zoo
from .hub.pipeline_files import pipeline_folder, settings_sha256, weights_sha256
from .hub.pipelines import check_draws, load_pipeline
from .parallel import processes, wait_for_everyone, written
from .runs import check_not_fewer, check_same_facts, check_same_run, save_run
from .schedulers import replacement
from .tasks.family import COLUMNS
from .zoo import WeightZoo, check_room_for
from .zoo.export import check_export
from .zoo.fill import fill


def run_generate(config: GenerateConfig) -> WeightZoo:
    r"""
    Samples networks, in one process or in several. The metadata of each names the scheduler, `num_inference_steps`,
    `parameter_noise`, `guidance_scale`, what was asked for, and the seed: with that scheduler the same pipeline makes
    the network again of all of these, `pipe(generator=torch.Generator().manual_seed(row["seed"]), ...)`, with
    `mixed_precision="bf16"` under `torch.autocast`.

    Raises:
        [`ConfigError`]: an unknown scheduler, or a folder with another zoo.
        [`PipelineError`]: there is no pipeline.
    """
    with written(config.output_dir, "generate"):
        return _generate(config, Path(config.output_dir))


def _recorded(asked: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, under another name where the row of a generated network says that of itself."""
    taken = {*COLUMNS, "accuracy", *own}
    return {f"asked_{name}" if name in taken else name: value for name, value in asked.items()}


def _conditions(config: GenerateConfig) -> list[dict[str, Any]]:
    """What is asked for, one network after the other; nothing where nothing is."""
    if config.conditions is not None:
        return read_objects(config.conditions, "conditions")
    return [] if config.condition is None else [json_object(config.condition, "condition")]


def _generate(config: GenerateConfig, folder: Path) -> WeightZoo:
    state = processes()
    if config.export is not None:
        check_export(config.export, config.num_networks)
    exists = is_zoo(folder)
    present = 0
    if exists:
        free = ("output_dir", "num_networks", "batch_size", "export", "push_to_hub")
        check_same_run(folder, "generate", config, but_for=free)
        present = len(WeightZoo(folder))
        check_not_fewer(folder, present, config.num_networks)
    source = pipeline_folder(config.pipeline, config.revision)
    pipe = load_pipeline(source).to(state.device)
    facts: dict[str, Any] = {"weights_sha256": weights_sha256(source), "settings_sha256": settings_sha256(source)}
    if config.scheduler is not None:
        pipe.scheduler = replacement(config.scheduler, pipe.scheduler)
    asked = _conditions(config)
    if asked:
        facts["conditions_sha256"] = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if exists:
        check_same_facts(folder, "generate", facts)
    if pipe.condition_encoder is not None:
        try:
            pipe.condition_encoder(asked or [{}])
        except ValueError as error:
            raise ConfigError(f"{source} cannot be asked for this: {error}") from error
    elif asked:
        raise ConfigError(f"{source} cannot be asked for anything: it was trained without --condition.")
    most = pipe.scheduler.config.num_train_timesteps
    num_steps = config.num_inference_steps or pipe.default_inference_steps
    if num_steps > most:
        raise ConfigError(f"num_inference_steps is {num_steps}; the scheduler has {most} timesteps.")
    check_draws(pipe)
    check_room_for(folder, config.num_networks - present, pipe.layout, config.dtype)
    wait_for_everyone()
    if state.is_main_process:
        save_run(folder, "generate", config, **facts)

    pipe.set_progress_bar_config(disable=True)
    origin = {
        "source": "generated",
        # Of a folder the name alone: its path says nothing to anyone else.
        **(
            {"pipeline": source.resolve().name}
            if source == Path(config.pipeline)
            else {"pipeline": config.pipeline, "revision": source.name}
        ),
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": num_steps,
        "mixed_precision": config.mixed_precision,
        "parameter_noise": config.parameter_noise,
        **({"guidance_scale": config.guidance_scale} if asked else {}),
    }

    def sample(indices: range) -> list[tuple[torch.Tensor, dict[str, Any]]]:
        seeds = [config.seed + index for index in indices]
        rows = [asked[index % len(asked)] if asked else {} for index in indices]
        try:
            with torch.autocast(state.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
                vectors = pipe(
                    num_networks=len(seeds),
                    num_inference_steps=num_steps,
                    generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                    **({"condition": rows, "guidance_scale": config.guidance_scale} if asked else {}),
                    parameter_noise=config.parameter_noise,
                    chunk_size=len(seeds),
                    output_type="pt",
                ).state_dicts
        except ValueError as error:  # of settings, or of what came out
            raise PipelineError(f"{source}: {error}") from error
        return [
            (vector, {**_recorded(row, origin), "seed": seed, **origin})
            for seed, row, vector in zip(seeds, rows, vectors.cpu(), strict=True)
        ]

    zoo = fill(
        folder,
        create=lambda: WeightZoo.create(folder, pipe.layout, task=config.task, dtype=config.dtype),
        num_networks=config.num_networks,
        unit_size=config.batch_size or pipe.default_chunk_size,
        make=sample,
        description="generate",
    )
    if state.is_main_process:
        zoo.write_card(f"Networks sampled by Neural Network Diffusion from the pipeline `{origin['pipeline']}`.")
        if config.export is not None:
            zoo.export(config.export)
        if config.push_to_hub is not None:
            zoo.push_to_hub(config.push_to_hub)
    return zoo
