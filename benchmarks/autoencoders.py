"""The linear basis against a chunked autoencoder with shared weights, on the same zoos.

The chunked autoencoder cuts a normalized vector into chunks. The same residual MLP encodes each of them to a few
latents, together with learned embeddings of the chunk's position and of its tensor, and a mirror image decodes them;
both are trained by AdamW with a one-cycle learning rate to reconstruct, with noise on inputs and latents. Its weights
do not grow with the network, but for an embedding a chunk. The linear basis is `ParameterAutoencoderKL`, fitted in
closed form: 64 numbers a parameter.

Each candidate runs in a process of its own. Prints latents, weights, memory (peak of the process before it starts,
which is Python and torch, and after fitting and encoding), seconds of fitting and encoding, share of the zoo's
variance explained, and mean and minimum accuracy on the test split of the originals, of their reconstructions, and of
generated networks: the denoiser is the same for all and trained for as many steps on the latents (centred, with a
standard deviation of 1 taken together), where latents of neighbouring chunks become channels until there are at most
32 positions; sampling takes 50 steps of DDPM.

Data for MNIST: see `benchmarks/images.py`.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn
from torch.nn import functional as F

from benchmarks import peak_memory_gb, write
from pdiff_hf import (
    CollectConfig,
    ParameterAutoencoderKL,
    ParameterLayout,
    ParameterUNet1DModel,
    TrainConfig,
    WeightZoo,
    load_task,
    run_collect,
)
from pdiff_hf.networks.predictor import Predictor
from pdiff_hf.train import DenoiserObjective, Training, denoising_scheduler
from pdiff_hf.zoo import BATCH_VALUES


# Of the latents that the denoiser sees, at most.
POSITIONS = 32


@dataclass(frozen=True)
class Chunked:
    """A chunked autoencoder and its training."""

    chunk: int
    """Parameters of a chunk."""
    latents: int
    """Of a chunk."""
    width: int
    """Of the hidden layers."""
    steps: int
    batch: int
    """Chunks a step, of any network and position."""
    learning_rate: float = 1e-3
    blocks: int = 2
    """Residual blocks of the encoder, and of the decoder."""
    embedding: int = 64
    input_noise: float = 0.05
    latent_noise: float = 0.1
    latent_penalty: float = 1e-3
    """On half the mean square of the latents: with noise of a fixed size, this is the KL divergence."""


@dataclass(frozen=True)
class Setting:
    """A zoo and the autoencoders that are compared on it."""

    task: str
    num_networks: int
    candidates: dict[str, Chunked | None]


CANDIDATES = {
    "digits-convnet": Setting(
        "digits-convnet",
        200,
        {
            "linear": None,
            "chunks of 64": Chunked(64, 8, 256, steps=4000, batch=256),
            "chunks of 256": Chunked(256, 8, 512, steps=3000, batch=128, blocks=1),
        },
    ),
    "mnist-large-mlp": Setting(
        "benchmarks.images:MNISTMLP1M",
        50,
        {
            "linear": None,
            "chunks of 1024": Chunked(1024, 2, 512, steps=1000, batch=256, blocks=1),
            "chunks of 16384": Chunked(16384, 16, 512, steps=1000, batch=64, blocks=1),
        },
    ),
}


@dataclass(frozen=True)
class Config:
    """Compares autoencoders of parameters."""

    tasks: tuple[str, ...] = tuple(CANDIDATES)
    training_steps: int = 1000
    """Of the denoiser."""
    num_networks: int = 100
    """To generate."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the zoo, and of all that is trained on it."""
    threads: int = 1
    work_dir: str = "runs/autoencoders"
    """Where the zoos go."""
    output: str | None = None
    """A JSON file for the figures."""
    only: tuple[str, str] | None = None
    """A task and one of its candidates ('zoo' makes the zoo): measure the first seed in this process, and print it."""


class ChunkedAutoencoder(nn.Module):
    """Chunks `[B, chunk]` with their positions `[B]` to latents `[B, d]`, and back."""

    def __init__(self, config: Chunked, layout: ParameterLayout):
        super().__init__()
        self.config, self.size = config, layout.vector_size
        self.count = -(-self.size // config.chunk)
        sizes = torch.tensor([torch.Size(tensor["shape"]).numel() for tensor in layout.tensors("generated")])
        # The tensor that a chunk begins in.
        self.tensor = torch.searchsorted(sizes.cumsum(0), torch.arange(self.count) * config.chunk, right=True)
        self.embed_position = nn.Embedding(self.count, config.embedding)
        self.embed_tensor = nn.Embedding(len(sizes), config.embedding)
        self.encoder = self._mlp(config.chunk, config.latents)
        self.decoder = self._mlp(config.latents, config.chunk)

    def _mlp(self, inputs: int, outputs: int) -> nn.Sequential:
        width = self.config.width
        blocks = [Residual(width) for _ in range(self.config.blocks)]
        first = nn.Linear(inputs + self.config.embedding, width)
        return nn.Sequential(first, *blocks, nn.LayerNorm(width), nn.Linear(width, outputs))

    def _with_place(self, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        place = self.embed_position(positions) + self.embed_tensor(self.tensor[positions])
        return torch.cat([values, place], dim=1)

    def chunks(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]` as `[N, chunks, chunk]`, the last one filled up with zeros."""
        return F.pad(vectors, (0, self.count * self.config.chunk - self.size)).unflatten(1, (self.count, -1))

    def loss(self, chunks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Squared error of the reconstruction, and the penalty on latents."""
        noisy = chunks + self.config.input_noise * torch.randn_like(chunks)
        latents = self.encoder(self._with_place(noisy, positions))
        noise = self.config.latent_noise * torch.randn_like(latents)
        decoded = self.decoder(self._with_place(latents + noise, positions))
        return F.mse_loss(decoded, chunks) + self.config.latent_penalty * latents.square().mean() / 2

    @torch.no_grad()
    def encode(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors `[N, P]` to latents `[N, d, chunks]`."""
        positions = torch.arange(self.count)
        return torch.stack([self.encoder(self._with_place(row, positions)).T for row in self.chunks(vectors)])

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        positions = torch.arange(self.count)
        rows = [self.decoder(self._with_place(row.T, positions)).flatten()[: self.size] for row in latents]
        return torch.stack(rows)


class Residual(nn.Module):
    """A hidden layer, added to its input."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.body(hidden)


def fit_chunked(config: Chunked, zoo: WeightZoo, layout: ParameterLayout) -> ChunkedAutoencoder:
    """Trains on chunks of any network and position."""
    model = ChunkedAutoencoder(config, layout)
    chunks = torch.cat([model.chunks(layout.normalize(batch)) for batch in zoo.batches()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.steps)
    for _ in range(config.steps):
        networks = torch.randint(len(chunks), (config.batch,))
        positions = torch.randint(model.count, (config.batch,))
        optimizer.zero_grad()
        model.loss(chunks[networks, positions], positions).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def fit_linear(zoo: WeightZoo, layout: ParameterLayout) -> ParameterAutoencoderKL:
    """As `pdiff-hf train` does."""
    vae = ParameterAutoencoderKL(layout.vector_size)
    width = max(1, BATCH_VALUES // len(zoo))
    starts = range(0, layout.vector_size, width)
    vae.fit(lambda: (layout.normalize(zoo.columns(start, start + width), start) for start in starts))
    return vae


def measure(config: Config, task_name: str, name: str) -> dict[str, Any]:
    """One candidate on one zoo."""
    setting, seed = CANDIDATES[task_name], config.seeds[0]
    folder = str(Path(config.work_dir, f"{task_name}-{seed}"))
    if name == "zoo":
        collect = CollectConfig(setting.task, folder, num_networks=setting.num_networks, seed=seed)
        return {"networks": len(run_collect(collect))}
    torch.manual_seed(seed)
    zoo = WeightZoo(folder)
    before = peak_memory_gb()

    # 1. Fit and encode
    start = time.perf_counter()
    layout = zoo.layout.fit(zoo.batches())
    chunked = setting.candidates[name]
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    if chunked is None:
        vae = fit_linear(zoo, layout)
        encode, decode = (
            lambda vectors: vae.encode(vectors).latent_dist.mean,
            lambda latents: vae.decode(latents).sample,
        )
        weights = vae.state_dict()
    else:
        model = fit_chunked(chunked, zoo, layout)
        encode, decode = model.encode, model.decode
        weights = model.state_dict()
    with torch.no_grad():
        latents = torch.cat([encode(layout.normalize(batch)) for batch in zoo.batches()])
    seconds, peak = time.perf_counter() - start, peak_memory_gb()

    # 2. Reconstruct
    task = load_task(setting.task)
    inputs, targets = task.data("test")
    predictor = Predictor(task, layout, torch.device("cpu"))

    def accuracy(vectors: torch.Tensor) -> torch.Tensor:
        predictions = predictor(vectors, inputs)
        return torch.stack([task.correct(rows, targets).double().mean() for rows in predictions])

    @torch.no_grad()
    def networks(latents: torch.Tensor) -> torch.Tensor:
        return layout(decode(latents)).vectors

    left = total = 0.0
    scores: dict[str, list[torch.Tensor]] = {"original": [], "reconstructed": [], "generated": []}
    rows = iter(latents.split(10))
    for batch in zoo.batches(10):
        normalized, part = layout.normalize(batch), next(rows)
        with torch.no_grad():
            left += (decode(part) - normalized).square().sum().item()
        total += normalized.square().sum().item()
        scores["original"].append(accuracy(batch))
        scores["reconstructed"].append(accuracy(networks(part)))

    # 3. Generate
    start = time.perf_counter()
    sampled = generate(config, latents)
    generate_seconds = time.perf_counter() - start
    scores["generated"] = [accuracy(networks(part)) for part in sampled.split(10)]
    return {
        "task": task_name,
        "parameters": zoo.vector_size,
        "autoencoder": name,
        "seed": seed,
        "latents": latents[0].numel(),
        "weights_mb": sum(value.numel() * value.element_size() for value in weights.values()) / 1e6,
        "memory_before_gb": before,
        "peak_memory_gb": peak,
        "fit_s": seconds,
        "variance_explained": 1 - left / total,
        "denoiser_s": generate_seconds,
        **{
            f"{group}_{key}": getattr(torch.cat(values), key)().item()
            for group, values in scores.items()
            for key in ("mean", "min")
        },
    }


def generate(config: Config, latents: torch.Tensor) -> torch.Tensor:
    """New latents: a denoiser is trained on these and sampled from."""
    mean = latents.mean(0)
    scale = (latents - mean).std()
    # Neighbours become channels: [N, d, chunks] to [N, d * fold, positions].
    shape, fold = latents.shape, -(-latents.shape[2] // POSITIONS)
    data = F.pad((latents - mean) / scale, (0, -shape[2] % fold))
    data = data.unflatten(2, (-1, fold)).movedim(3, 2).flatten(1, 2)
    scheduler = denoising_scheduler("sample")
    torch.manual_seed(config.seeds[0])
    unet = ParameterUNet1DModel(data.shape[1], data.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainConfig(
            output_dir=folder, seed=config.seeds[0], unet_steps=config.training_steps, checkpointing_steps=10**9
        )
        with Training(settings) as training:
            training.fit(DenoiserObjective(unet, scheduler), data)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(config.num_networks, *data.shape[1:], generator=generator)
    scheduler.set_timesteps(50)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            prediction = unet(sample, timestep).sample
            sample = scheduler.step(prediction, timestep, sample, generator=generator).prev_sample
    sample = sample.unflatten(1, (shape[1], fold)).movedim(2, 3).flatten(2, 3)[..., : shape[2]]
    return sample * scale + mean


def main(config: Config) -> None:
    """Measures each candidate in a process of its own."""
    torch.set_num_threads(config.threads)
    if config.only is not None:
        print(json.dumps(measure(config, *config.only)))
        return
    rows = []
    print("task | autoencoder | seed | latents | weights, MB | before, GB | peak, GB | fit, s", end="")
    print(" | variance explained, % | original: mean, min | reconstructed: mean, min | generated: mean, min")
    for task in config.tasks:
        for seed, name in itertools.product(config.seeds, ("zoo", *CANDIDATES[task].candidates)):
            arguments = ["--training-steps", str(config.training_steps), "--num-networks", str(config.num_networks)]
            arguments += ["--seeds", str(seed), "--threads", str(config.threads)]
            arguments += ["--work-dir", config.work_dir, "--only", task, name]
            command = [sys.executable, "-m", "benchmarks.autoencoders", *arguments]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            row = json.loads(done.stdout.splitlines()[-1])
            if name == "zoo":
                continue
            rows.append(row)
            percent = (
                f"{100 * row[f'{group}_mean']:.2f}, {100 * row[f'{group}_min']:.2f}"
                for group in ("original", "reconstructed", "generated")
            )
            print(
                f"{task} | {name} | {seed} | {row['latents']:,} | {row['weights_mb']:.2f} "
                f"| {row['memory_before_gb']:.2f} | {row['peak_memory_gb']:.2f} | {row['fit_s']:.1f} "
                f"| {100 * row['variance_explained']:.2f} "
                f"| {' | '.join(percent)}",
                flush=True,
            )
    write(config, rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Config))
