"""Our 1-D U-Net against diffusers' UNet1DModel, on the same latents with the same training.

Takes a trained pipeline and its zoo, trains each denoiser anew on the latents, and prints parameters, seconds, final
loss, and mean and minimum accuracy of the networks that it samples.
"""

import json
import math
import tempfile
import time
from dataclasses import dataclass

import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, UNet1DModel

from pdiff_hf import (
    NeuralNetworkDiffusionPipeline,
    ParameterUNet1DModel,
    TrainConfig,
    WeightZoo,
    load_pipeline,
    load_task,
)
from pdiff_hf.train import DenoiserObjective, Training


@dataclass(frozen=True)
class Config:
    """Compares denoisers."""

    pipeline: str = "runs/quickstart/pipeline"
    zoo: str = "runs/quickstart/zoo"
    task: str = "digits-convnet"
    steps: int = 1500
    threads: int = 1
    seed: int = 0


def main(config: Config) -> None:
    """Measures and prints."""
    torch.set_num_threads(config.threads)
    pipe = load_pipeline(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    zoo = WeightZoo(config.zoo)
    with torch.no_grad():
        latents = pipe.vae.encode(pipe.layout.normalize(zoo.vectors())).latent_dist.mean
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
        "UNet1DModel, residual blocks (64, 128)": lambda: UNet1DModel(
            sample_size=latents.shape[2], in_channels=channels, out_channels=channels, **residual
        ),
    }
    print("denoiser | parameters | seconds | loss | DDPM 50: mean, min | DPM-Solver++ 10: mean, min")
    for name, build in candidates.items():
        torch.manual_seed(config.seed)
        unet = build()
        with tempfile.TemporaryDirectory() as folder:
            train_config = TrainConfig(
                output_dir=folder, seed=config.seed, unet_steps=config.steps, checkpointing_steps=10**9
            )
            with Training(train_config) as training:
                start = time.perf_counter()
                training.fit(DenoiserObjective(unet, pipe.scheduler), latents)
                seconds = time.perf_counter() - start
                loss = _final_loss(f"{folder}/train.losses.jsonl")
        parts = pipe.components | {"unet": unet}
        ddpm = _accuracy(NeuralNetworkDiffusionPipeline(**parts), 50, config.task)
        solver = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        dpm = _accuracy(NeuralNetworkDiffusionPipeline(**(parts | {"scheduler": solver})), 10, config.task)
        count = sum(parameter.numel() for parameter in unet.parameters())
        print(f"{name} | {count:,} | {seconds:.0f} | {loss:.4f} | {ddpm} | {dpm}", flush=True)


def _final_loss(file: str) -> float:
    with open(file, encoding="utf-8") as lines:
        losses = [json.loads(line)["loss"] for line in lines]
    return math.fsum(losses[-200:]) / len(losses[-200:])


def _accuracy(pipe: NeuralNetworkDiffusionPipeline, steps: int, task_name: str) -> str:
    pipe.set_progress_bar_config(disable=True)
    task = load_task(task_name)
    network = task.build_network()
    inputs, targets = task.data("test")
    accuracies = []
    for state_dict in pipe(100, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)).state_dicts:
        network.load_state_dict(state_dict)
        accuracies.append(task.correct(task.predict(network, inputs), targets).double().mean().item())
    return f"{100 * sum(accuracies) / len(accuracies):.2f}, {100 * min(accuracies):.2f}"


if __name__ == "__main__":
    main(tyro.cli(Config))
