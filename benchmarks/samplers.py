"""What the denoiser should predict, and which sampler with how many steps generates networks from it.

Denoisers that predict noise (epsilon), velocity (v_prediction) or data (sample), and one of flow matching, have the
same U-Net, latents and training. The first three are sampled with diffusers' schedulers. Flow matching (rectified
flow): the U-Net sees `(1 - t) x + t noise` and 1000 t and predicts `noise - x`; t is logit-normal; networks come from
Euler's or Heun's method with equal steps.

For each task and each seed, a zoo is collected and every denoiser trained on its latents; figures are over the
networks of all seeds. Prints a row for each denoiser, sampler and number of steps: evaluations of the U-Net, mean and
minimum accuracy on the test split, how many networks are more than half a point below the worst original of their zoo
(outliers), spread (mean L2 distance of two networks of one seed), seconds for the networks of one seed, by what factor
that is faster than the published implementation (12.7 s a network of 1,898 parameters, one by one), its ratio to
decoding the latents alone (the median of 20 times), and whether that is as good as 1000 steps of DDPM with the same
denoiser: mean accuracy at most two standard errors below, no more outliers, and a spread within a tenth. Few steps can
look good by sampling near the mean only; the last column alone does not say that a denoiser is good.

Data for Fashion-MNIST: see `pdiff_hf/tasks/images.py`. Zoos and denoisers are kept in `work_dir`; a run that was
interrupted goes on.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch.nn import functional as F

from benchmarks import fit_denoiser, minutes_of, write
from pdiff_hf import (
    CollectConfig,
    NeuralNetworkDiffusionPipeline,
    ParameterUNet1DModel,
    TrainConfig,
    WeightZoo,
    load_pipeline,
    load_task,
    run_collect,
)
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.train import DenoiserObjective
from pdiff_hf.train.objectives import Batch


TASKS = {"digits-convnet": "digits-convnet", "fashion-mlp3": "benchmarks.images:FashionMLP3"}
PREDICTIONS: tuple[Literal["epsilon", "v_prediction", "sample"], ...] = ("epsilon", "v_prediction", "sample")
SCHEDULERS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "DDPM": ("DDPMScheduler", {}, (1000, 50, 20, 10)),
    "DDIM": ("DDIMScheduler", {}, (10,)),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", {}, (10, 5)),
    "SDE-DPM-Solver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, (10, 5)),
    "UniPC": ("UniPCMultistepScheduler", {}, (10,)),
    "Heun": ("HeunDiscreteScheduler", {}, (5,)),
}
FLOW = "flow matching"
# The published implementation, one thread, 1000 steps, for a network of so many parameters.
PUBLISHED_SECONDS, PUBLISHED_SIZE = 12.7, 1898
Row = tuple[str, str, int]
Sampler = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Config:
    """Trains denoisers, and samples with every method and number of steps."""

    tasks: tuple[str, ...] = tuple(TASKS)
    seeds: tuple[int, ...] = (0, 1, 2)
    training_steps: int = 1500
    num_networks: int = 100
    """Of each seed."""
    threads: int = 1
    work_dir: str = "runs/samplers"
    """Where zoos and denoisers are kept."""
    output: str | None = None
    """A JSON file for the figures."""


class FlowObjective(DenoiserObjective):
    """Squared error of the velocity `noise - x` at a random time between data (0) and noise (1)."""

    def draw(self, count: int, data: Batch, generator: torch.Generator) -> Batch:
        """Noise `[count, C, L]` and times `[count]`."""
        noise = torch.randn((count, *data["latents"].shape[1:]), generator=generator)
        return {"noise": noise, "times": torch.randn(count, generator=generator).sigmoid()}

    def forward(  # type: ignore[override]
        self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> torch.Tensor:
        noisy = torch.lerp(latents, noise, times[:, None, None])
        return F.mse_loss(self.denoiser(noisy, 1000 * times).sample, noise - latents)


def samplers(
    config: Config, task: str, seed: int
) -> tuple[WeightZoo, dict[Row, Sampler], list[ParameterUNet1DModel], Sampler]:
    """The zoo of a seed, ways to sample networks like its own, the denoisers, to count their evaluations, and a way to
    decode as many latents."""
    folder = Path(config.work_dir, f"{task}-{seed}")
    zoo = run_collect(CollectConfig(task=TASKS[task], output_dir=str(folder / "zoo"), seed=seed))
    settings: dict[str, Any] = {
        "seed": seed,
        "autoencoder": "linear",
        "unet_steps": config.training_steps,
        "checkpointing_steps": 10**9,
    }
    found: dict[Row, Sampler] = {}
    denoisers = []
    for prediction in PREDICTIONS:
        target = folder / prediction
        minutes_of(TrainConfig(zoo=str(zoo.folder), output_dir=str(target), prediction_type=prediction, **settings))
        pipe = load_pipeline(target)
        pipe.set_progress_bar_config(disable=True)
        denoisers.append(pipe.unet)
        for name, (scheduler, changes, all_steps) in SCHEDULERS.items():
            scheduler_class = getattr(diffusers, scheduler)
            swapped = scheduler_class.from_config(pipe.scheduler.config, **changes)
            for steps in all_steps:

                def sample(
                    pipe: NeuralNetworkDiffusionPipeline = pipe, scheduler: Any = swapped, steps: int = steps
                ) -> torch.Tensor:
                    pipe.scheduler = scheduler
                    generator = torch.Generator().manual_seed(0)
                    return pipe(
                        config.num_networks, num_inference_steps=steps, generator=generator, output_type="pt"
                    ).state_dicts

                found[prediction, name, steps] = sample
    unet = flow_denoiser(pipe, zoo, TrainConfig(output_dir=str(folder / "flow"), **settings))
    denoisers.append(unet)
    for name, scheduler_class, steps in (
        ("Euler", FlowMatchEulerDiscreteScheduler, 10),
        ("Heun", FlowMatchHeunDiscreteScheduler, 5),
    ):
        flow_pipe = NeuralNetworkDiffusionPipeline(pipe.layout, scheduler_class(), pipe.vae, unet)
        flow_pipe.set_progress_bar_config(disable=True)

        def flow(flow_pipe: NeuralNetworkDiffusionPipeline = flow_pipe, steps: int = steps) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return flow_pipe(
                config.num_networks, num_inference_steps=steps, generator=generator, output_type="pt"
            ).state_dicts

        found[FLOW, name, steps] = flow
    return zoo, found, denoisers, lambda: pipe.decode(torch.randn(config.num_networks, *pipe.latent_shape))


def flow_denoiser(pipe: NeuralNetworkDiffusionPipeline, zoo: WeightZoo, config: TrainConfig) -> ParameterUNet1DModel:
    """A U-Net like the pipeline's, trained on the same latents to predict velocities."""
    if not Path(config.output_dir, "config.json").exists():
        torch.manual_seed(config.seed)
        unet = ParameterUNet1DModel.from_config(pipe.unet.config)
        fit_denoiser(FlowObjective(unet, pipe.scheduler), pipe.encode(zoo.vectors()), config)
        unet.save_pretrained(config.output_dir)
    return ParameterUNet1DModel.from_pretrained(config.output_dir)


def measure(config: Config, task_name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The originals of a task, and a row for each sampler and number of steps."""
    task = load_task(TASKS[task_name])
    inputs, targets = task.data("test")
    cells: dict[Row, list[dict[str, Any]]] = {}
    originals, decoded = [], []
    for seed in config.seeds:
        zoo, found, denoisers, decode_alone = samplers(config, task_name, seed)
        predictor = Predictor(task, zoo.layout, torch.device("cpu"))

        def accuracy(vectors: torch.Tensor, predictor: Predictor = predictor) -> torch.Tensor:
            return task.correct(predictor(vectors, inputs).flatten(0, 1), targets.repeat(len(vectors))).double()

        def facts(vectors: torch.Tensor) -> dict[str, Any]:
            right = accuracy(vectors).unflatten(0, (len(vectors), -1)).mean(1)
            return {"accuracy": right, "spread": torch.pdist(vectors).mean().item()}

        originals.append(facts(zoo.vectors()))
        calls = [0]
        for denoiser in denoisers:
            denoiser.register_forward_hook(lambda *_, calls=calls: calls.__setitem__(0, calls[0] + 1))
        for key, sample in found.items():
            calls[0] = 0
            vectors, seconds = _timed(sample)
            cell = facts(vectors) | {"seconds": seconds, "evaluations": calls[0]}
            cell["outliers"] = int((cell["accuracy"] < originals[-1]["accuracy"].min() - 0.005).sum())
            cells.setdefault(key, []).append(cell)
        decoded += [_timed(decode_alone)[1] for _ in range(20)]
    decoding = statistics.median(decoded)
    rows: list[dict[str, Any]] = []
    references: dict[str, dict[str, Any]] = {}
    for (prediction, name, steps), parts in cells.items():
        row: dict[str, Any] = {"task": task_name, "denoiser": prediction, "sampler": name, "steps": steps}
        row |= {"evaluations": parts[0]["evaluations"]} | pooled(parts)
        row |= {"outliers": sum(part["outliers"] for part in parts)}
        row["seconds"] = sum(part["seconds"] for part in parts) / len(parts)
        row["times_decoding"] = row["seconds"] / decoding
        if zoo.vector_size == PUBLISHED_SIZE:
            row["times_faster_than_published"] = config.num_networks * PUBLISHED_SECONDS / row["seconds"]
        rows.append(row)
        if prediction != FLOW:
            first = references.setdefault(prediction, row)
            error = (row["standard_error"] ** 2 + first["standard_error"] ** 2) ** 0.5
            row["as_good_as_1000"] = (
                row["mean"] >= first["mean"] - 2 * error
                and row["outliers"] <= first["outliers"]
                and abs(row["spread"] / first["spread"] - 1) <= 0.1
            )
    return {"task": task_name} | pooled(originals), rows


def _timed(work: Sampler) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def pooled(parts: list[dict[str, Any]]) -> dict[str, float]:
    """Figures over the networks of all seeds."""
    accuracy = torch.cat([part["accuracy"] for part in parts])
    return {
        "mean": accuracy.mean().item(),
        "standard_error": accuracy.std().item() / len(accuracy) ** 0.5,
        "min": accuracy.min().item(),
        "spread": sum(part["spread"] for part in parts) / len(parts),
    }


def main(config: Config) -> None:
    """Measures and prints."""
    torch.set_num_threads(config.threads)
    originals, rows = [], []
    for task in config.tasks:
        zoo, measured = measure(config, task)
        originals.append(zoo)
        rows += measured
        print(f"\n{task} | sampler | steps | evaluations | mean | min | outliers | spread | seconds", end=" | ")
        print("times faster than published | times decoding | as good as 1000 steps")
        print(f"trained | | | | {figures(zoo)} | | {zoo['spread']:.3f} | | | |")
        for row in measured:
            faster = f"{row.get('times_faster_than_published', 0):,.0f}".removeprefix("0")
            print(
                f"{row['denoiser']} | {row['sampler']} | {row['steps']} | {row['evaluations']} | {figures(row)} "
                f"| {row['outliers']} | {row['spread']:.3f} | {row['seconds']:.2f} "
                f"| {faster} | {row['times_decoding']:.0f} "
                f"| {row.get('as_good_as_1000', '')}",
                flush=True,
            )
    write(config, originals=originals, rows=rows)


def figures(row: dict[str, Any]) -> str:
    """Mean and minimum accuracy."""
    return f"{100 * row['mean']:.2f} ±{100 * row['standard_error']:.2f} | {100 * row['min']:.2f}"


if __name__ == "__main__":
    main(tyro.cli(Config))
