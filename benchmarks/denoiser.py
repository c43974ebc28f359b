"""Our 1-D U-Net, of two widths, against diffusers' UNet1DModel, on the same latents with the same training.

Takes a trained pipeline and its zoo, trains each denoiser anew on the latents, and prints parameters, seconds of the
training, final loss, and of 100 networks that it samples mean and minimum accuracy on the test split, spread (mean L2
distance of two of them) and seconds.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass

import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, UNet1DModel

from benchmarks import fit_denoiser, write
from pdiff_hf import (
    LinearParameterAutoencoder,
    NeuralNetworkDiffusionPipeline,
    ParameterUNet1DModel,
    TrainConfig,
    WeightZoo,
    load_pipeline,
    load_task,
)
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.train import DenoiserObjective


@dataclass(frozen=True)
class Config:
    """Compares denoisers."""

    pipeline: str = "runs/quickstart/pipeline"
    zoo: str = "runs/quickstart/zoo"
    task: str = "digits-convnet"
    steps: int = 1500
    threads: int = 1
    seed: int = 0
    output: str | None = None
    """A JSON file for the figures."""


def main(config: Config) -> None:
    """Measures and prints."""
    torch.set_num_threads(config.threads)
    pipe = load_pipeline(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    zoo = WeightZoo(config.zoo)
    if not isinstance(pipe.vae, LinearParameterAutoencoder):
        raise SystemExit(
            f"{config.pipeline} has other latents than the figures are of: train with --autoencoder linear."
        )
    with torch.no_grad():
        latents = pipe.encode(zoo.vectors())
    channels = latents.shape[1]
    # Residual blocks, as diffusers' own value-guided planning uses them.
    residual = {
        "time_embedding_type": "positional",
        "use_timestep_embedding": True,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "mish",
        "down_block_types": ("DownResnetBlock1D", "DownResnetBlock1D"),
        "mid_block_type": "MidResTemporalBlock1D",
        "up_block_types": ("UpResnetBlock1D",),
        "out_block_type": "OutConv1DBlock",
        "block_out_channels": (64, 128),
    }
    candidates = {
        "ParameterUNet1DModel (64, 64)": lambda: ParameterUNet1DModel(channels, channels, (64, 64)),
        "ParameterUNet1DModel (32, 32)": lambda: ParameterUNet1DModel(channels, channels, (32, 32)),
        "UNet1DModel, residual blocks (64, 128)": lambda: UNet1DModel(
            sample_size=latents.shape[2], in_channels=channels, out_channels=channels, **residual
        ),
    }
    schedulers = {
        "DDPM 50": (pipe.scheduler, 50),
        "DPM-Solver++ 10": (DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), 10),
    }
    rows = []
    print("denoiser | parameters | seconds | loss | scheduler | mean | min | spread | seconds")
    for name, build in candidates.items():
        torch.manual_seed(config.seed)
        unet = build()
        with tempfile.TemporaryDirectory() as folder:
            train_config = TrainConfig(
                output_dir=folder, seed=config.seed, unet_steps=config.steps, checkpointing_steps=10**9
            )
            start = time.perf_counter()
            fit_denoiser(DenoiserObjective(unet, pipe.scheduler), latents, train_config)
            seconds = time.perf_counter() - start
            loss = _final_loss(f"{folder}/train.losses.jsonl")
        row = {
            "denoiser": name,
            "parameters": sum(parameter.numel() for parameter in unet.parameters()),
            "train_s": seconds,
            "loss": loss,
        }
        for label, (scheduler, number) in schedulers.items():
            parts = pipe.components | {"unet": unet, "scheduler": scheduler}
            figures = _sampled(NeuralNetworkDiffusionPipeline(**parts), number, config.task)
            rows.append({**row, "scheduler": label, **figures})
            print(
                f"{name} | {row['parameters']:,} | {seconds:.0f} | {loss:.4f} | {label} | {100 * figures['mean']:.2f} "
                f"| {100 * figures['min']:.2f} | {figures['spread']:.3f} | {figures['sample_s']:.2f}",
                flush=True,
            )
    write(config, rows=rows)


def _final_loss(file: str) -> float:
    with open(file, encoding="utf-8") as lines:
        losses = [json.loads(line)["loss"] for line in lines]
    return math.fsum(losses[-200:]) / len(losses[-200:])


def _sampled(pipe: NeuralNetworkDiffusionPipeline, steps: int, task_name: str) -> dict[str, float]:
    """Accuracy and spread of 100 networks, and how long they take."""
    pipe.set_progress_bar_config(disable=True)
    task = load_task(task_name)
    inputs, targets = task.data("test")
    start = time.perf_counter()
    vectors = pipe(100, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="pt")[0]
    seconds = time.perf_counter() - start
    predictions = Predictor(task, pipe.layout, torch.device("cpu"))(vectors, inputs)
    accuracy = torch.stack([task.correct(p, targets).double().mean() for p in predictions])
    spread = torch.pdist(vectors).mean().item()
    return {"mean": accuracy.mean().item(), "min": accuracy.min().item(), "spread": spread, "sample_s": seconds}


if __name__ == "__main__":
    main(tyro.cli(Config))
