"""The paper's table: original, soup and generated networks over tasks, and its ablations.

Each cell is computed once and kept in `<work_dir>/cells`; a run that was interrupted goes on. Data for MNIST,
Fashion-MNIST and CIFAR-10: see `pdiff_hf/tasks/images.py`.

    python -m benchmarks.paper_table --data-dir DATA --output benchmarks/results/paper_table

writes `paper_table.json` and `paper_table.md`.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import tyro

from benchmarks import facts, fit_denoiser, minutes_of, write
from pdiff_hf import (
    CollectConfig,
    LinearParameterAutoencoder,
    NeuralNetworkDiffusionPipeline,
    ParameterUNet1DModel,
    TrainConfig,
    WeightZoo,
    evaluate,
    load_pipeline,
    load_task,
    run_collect,
)
from pdiff_hf.evaluation.measures import similarity
from pdiff_hf.evaluation.scoring import Scorer
from pdiff_hf.train import DenoiserObjective, denoising_scheduler


IMAGES = "benchmarks.images:"
MAIN = {
    "digits-convnet": ("digits-convnet", "all"),
    "digits-mlp": ("digits-mlp", "all"),
    "digits-resnet": ("digits-resnet", "last two batch norms"),
    "mnist-mlp3": (f"{IMAGES}MNISTMLP3", "all"),
    "fashion-mlp3": (f"{IMAGES}FashionMLP3", "all"),
    "cifar10-mlp3": (f"{IMAGES}CIFAR10MLP3", "all"),
    "mnist-convnet3": (f"{IMAGES}MNISTConvNet3", "all"),
    "fashion-convnet3": (f"{IMAGES}FashionConvNet3", "all"),
    "cifar10-convnet3": (f"{IMAGES}CIFAR10ConvNet3", "all"),
}
# Of the ablations: Fashion-MNIST is harder than MNIST, and MLP-3 is quick to score on the whole test set.
ABLATED = "fashion-mlp3"
LAYERS = {"all layers": "*", "first layer": "1.*", "second layer": "3.*", "last layer": "5.*"}
SAMPLERS = (
    *(("DDPMScheduler", 1000), ("DDPMScheduler", 100), ("DDPMScheduler", 50), ("DDPMScheduler", 10)),
    *(("DDIMScheduler", 50), ("DDIMScheduler", 10), ("DPMSolverMultistepScheduler", 10)),
)
# The denoiser predicts noise, as in the paper.
TRAINING: dict[str, Any] = {"autoencoder": "linear", "prediction_type": "epsilon", "checkpointing_steps": 10**9}
# Of the noise ablation: in standard deviations of a tensor's values, and of a latent.
PARAMETER_NOISE, LATENT_NOISE = 0.01, 0.1


@dataclass(frozen=True)
class Config:
    """Fills the table."""

    data_dir: str | None = None
    """Folder of local data; they come from the Hub otherwise."""
    work_dir: str = "runs/paper_table"
    """Zoos, pipelines and cells; a cell that is there is not computed again."""
    output: str | None = None
    """Path, without suffix, of the table as .json and .md."""
    tasks: tuple[str, ...] = tuple(MAIN)
    ablations: bool = True
    num_networks: int = 100
    networks_per_point: int = 20
    """Of each baseline."""
    threads: int = 1


class Cells:
    """Results on disk."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The cell's content, computed where it is not there yet."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            start = time.perf_counter()
            content = compute()
            content["seconds"] = round(time.perf_counter() - start, 1)
            file.with_suffix(".part").write_text(json.dumps(content), encoding="utf-8")
            file.with_suffix(".part").replace(file)
        content = json.loads(file.read_text(encoding="utf-8"))
        print(f"{name}: {json.dumps(content)}", flush=True)
        return content


def zoo_of(config: Config, name: str, **changes: Any) -> WeightZoo:
    """The trajectory zoo of a task, collected where it is not there yet."""
    folder = Path(config.work_dir, "zoos", "-".join([name, *changes.get("patterns", ())]).replace("*", "x"))
    return run_collect(CollectConfig(task=MAIN[name][0], output_dir=str(folder), **changes))


def main_cell(config: Config, name: str) -> dict[str, Any]:
    """One row of the main table."""
    zoo = zoo_of(config, name)
    folder = Path(config.work_dir, "pipelines", name)
    minutes_of(TrainConfig(zoo=str(zoo.folder), output_dir=str(folder), **TRAINING))
    report = evaluate(
        MAIN[name][0],
        trained=zoo,
        generated=str(folder),
        num_networks=config.num_networks,
        networks_per_point=config.networks_per_point,
        output_dir=Path(config.work_dir, "reports", name),
    )
    groups = report["groups"]
    return {
        "parameters": zoo.vector_size,
        "examples": report["examples"],
        **{
            f"{group}_{key}": groups[group]["accuracy"][key]
            for group in ("trained", "generated")
            for key in ("mean", "min", "best_on_validation")
        },
        "soup": groups["soup"]["accuracy"]["mean"],
        "trained_similarity": groups["trained"]["maximum_similarity"]["mean"],
        "similarity": groups["generated"]["maximum_similarity"]["mean"],
        "verdict": report["verdict"]["label"],
        "gain": report["verdict"]["accuracy_gain"],
        "interval": report["verdict"]["interval"],
    }


def generated_cell(
    config: Config, zoo: WeightZoo, pipe: NeuralNetworkDiffusionPipeline, **sampling: Any
) -> dict[str, Any]:
    """Accuracy of networks that a pipeline generates, and their similarity to a zoo."""
    pipe.set_progress_bar_config(disable=True)
    scorer = Scorer(load_task(MAIN[ABLATED][0]), zoo, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    vectors = pipe(config.num_networks, generator=generator, output_type="pt", **sampling).state_dicts
    trained = scorer(zoo.vectors, len(zoo), "trained")
    generated = scorer(lambda some: vectors[some.start : some.stop], len(vectors), "generated")
    return {
        "mean": generated.test.mean().item(),
        "min": generated.test.min().item(),
        "best_on_validation": generated.test[generated.validation.argmax()].item(),
        "similarity": similarity(generated.wrong, trained.wrong).amax(1).mean().item(),
        "spread": torch.pdist(vectors).mean().item(),
    }


def subset(zoo: WeightZoo, count: int, folder: Path) -> WeightZoo:
    """The last networks of a zoo."""
    if (folder / "zoo.json").exists():
        return WeightZoo(folder)
    with WeightZoo.create(folder, zoo.layout, task=zoo.task) as part:
        for vector in zoo.vectors(range(len(zoo) - count, len(zoo))):
            part.append(vector)
    return part


def with_noise(zoo: WeightZoo, folder: Path) -> WeightZoo:
    """200 noisy copies of the networks."""
    if (folder / "zoo.json").exists():
        return WeightZoo(folder)
    generator = torch.Generator().manual_seed(0)
    sizes = [torch.Size(tensor["shape"]).numel() for tensor in zoo.layout.tensors("generated")]
    with WeightZoo.create(folder, zoo.layout, task=zoo.task) as noisy:
        for index in range(200):
            parts = zoo[index % len(zoo)].split(sizes)
            noise = [PARAMETER_NOISE * p.std(correction=0) * torch.randn(p.shape, generator=generator) for p in parts]
            noisy.append(torch.cat([part + n for part, n in zip(parts, noise, strict=True)]))
    return noisy


def pipeline_of(
    config: Config, zoo: WeightZoo, name: str, latent_noise: float = 0.0
) -> NeuralNetworkDiffusionPipeline:
    """A pipeline of a zoo; its denoiser may see latents with noise, ten times as many."""
    folder = str(Path(config.work_dir, "pipelines", name))
    settings = TrainConfig(zoo=str(zoo.folder), output_dir=folder, **TRAINING)
    if not latent_noise:
        minutes_of(settings)
        return load_pipeline(folder)
    layout, vectors = zoo.layout, zoo.vectors()
    normalized = layout.fit([vectors]).normalize(vectors)
    vae = LinearParameterAutoencoder(layout.vector_size, settings.latent_channels, settings.latent_length)
    vae.fit(lambda: [normalized])
    with torch.no_grad():
        latents = vae.encode(normalized).latent_dist.mean.repeat(10, 1, 1)
    latents += latent_noise * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    scheduler = denoising_scheduler("epsilon")
    torch.manual_seed(0)
    unet = ParameterUNet1DModel(settings.latent_channels, settings.latent_channels, settings.block_out_channels)
    fit_denoiser(DenoiserObjective(unet, scheduler), latents, settings)
    return NeuralNetworkDiffusionPipeline(unet=unet, vae=vae, layout=layout, scheduler=scheduler)


def ablations(config: Config, cells: Cells) -> dict[str, dict[str, Any]]:
    """The paper's ablations on one task."""
    zoo = zoo_of(config, ABLATED)
    work, rows = Path(config.work_dir), {}
    for count in (1, 10, 50, 200):
        part = subset(zoo, count, work / "zoos" / f"{ABLATED}-K{count}") if count < len(zoo) else zoo
        for noise in ("none", "parameters", "latent", "both") if count in (1, 200) else ("none",):
            if count == 1 and noise in ("none", "latent"):
                continue  # one network alone is no distribution
            name = f"K={count}, noise on {noise}"

            def compute(part: WeightZoo = part, noise: str = noise, count: int = count) -> dict[str, Any]:
                noisy = noise in ("parameters", "both")
                source = with_noise(part, work / "zoos" / f"{ABLATED}-K{count}-noise") if noisy else part
                latent = LATENT_NOISE if noise in ("latent", "both") else 0.0
                return generated_cell(config, part, pipeline_of(config, source, f"K{count}-{noise}", latent))

            rows[name] = cells.get(f"K{count}-{noise}", compute)
    for name, pattern in LAYERS.items():

        def compute_layers(name: str = name, pattern: str = pattern) -> dict[str, Any]:
            part = zoo if pattern == "*" else zoo_of(config, ABLATED, patterns=(pattern,))
            return generated_cell(config, part, pipeline_of(config, part, f"layers-{name.partition(' ')[0]}"))

        rows[name] = cells.get(f"layers-{name.partition(' ')[0]}", compute_layers)
    for scheduler, steps in SAMPLERS:

        def compute_sampler(scheduler: str = scheduler, steps: int = steps) -> dict[str, Any]:
            pipe = load_pipeline(work / "pipelines" / ABLATED)
            pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
            return generated_cell(config, zoo, pipe, num_inference_steps=steps)

        rows[f"{scheduler}, {steps} steps"] = cells.get(f"sampler-{scheduler}-{steps}", compute_sampler)
    return rows


def markdown(table: dict[str, dict[str, Any]], ablation: dict[str, dict[str, Any]], facts: dict[str, Any]) -> str:
    """Both tables."""

    def percent(*values: float) -> str:
        return " / ".join(f"{100 * value:.2f}" for value in values)

    lines = [
        f"`{facts['command']}`, {facts['date']}, {facts['machine']}, {facts['threads']} thread(s), "
        + ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
        + ".",
        "",
        "Accuracy on test examples in %. Denoisers that predict noise, as in the paper. 200 consecutive checkpoints "
        "of one run, "
        f"{facts['num_networks']} generated networks. Best is chosen on validation data. "
        "Gain: accuracy over the best trivial baseline at equal similarity, with its 99 % interval.",
        "",
        "| task | generated parameters | trained: best, mean | soup | generated: best, mean, min | similarity "
        "| verdict | gain |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in table.items():
        low, high = (f"{100 * value:+.2f}" if value is not None else "-" for value in row["interval"])
        gain = "-" if row["gain"] is None else f"{100 * row['gain']:+.2f}"
        lines.append(
            f"| {name} | {MAIN[name][1]}, {row['parameters']:,} "
            f"| {percent(row['trained_best_on_validation'], row['trained_mean'])} | {percent(row['soup'])} "
            f"| {percent(row['generated_best_on_validation'], row['generated_mean'], row['generated_min'])} "
            f"| {row['similarity']:.3f} (trained {row['trained_similarity']:.3f}) | {row['verdict']} "
            f"| {gain} ({low} to {high}) |"
        )
    if ablation:
        lines += ["", f"Ablations on {ABLATED}; spread is the mean L2 distance of two generated networks.", ""]
        lines += ["| setting | generated: best, mean, min | similarity | spread |", "| --- | --- | --- | --- |"]
        for name, row in ablation.items():
            figures = percent(row["best_on_validation"], row["mean"], row["min"])
            lines.append(f"| {name} | {figures} | {row['similarity']:.3f} | {row['spread']:.3f} |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    """Fills the table, prints and writes it."""
    torch.set_num_threads(config.threads)
    if config.data_dir is not None:
        os.environ["PDIFF_HF_DATA"] = config.data_dir
    unknown = set(config.tasks) - set(MAIN)
    if unknown:
        raise SystemExit(f"There are no tasks {', '.join(sorted(unknown))}. There are: {', '.join(MAIN)}.")
    cells = Cells(Path(config.work_dir, "cells"))
    table = {name: cells.get(name, lambda name=name: main_cell(config, name)) for name in config.tasks}  # type: ignore
    ablation = ablations(config, cells) if config.ablations and ABLATED in config.tasks else {}
    text = markdown(table, ablation, facts(config))
    print(text)
    write(config, table=table, ablations=ablation)
    if config.output:
        Path(f"{config.output}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(tyro.cli(Config))
