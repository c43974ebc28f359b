"""Generated networks against those of the published implementation, learned from the very same zoo.

Needs a safetensors file with `trained` (the zoo: 200 checkpoints of a digits ConvNet), `published_generated` (what the
published implementation generated from it), and the inputs and targets of that ConvNet's test split. Prints for both,
and for the plainest baselines: accuracy (mean and minimum), largest similarity to a training network, seconds. Our
rows differ in `checkpoint_averaging` and `parameter_noise`, which move a generator along the front of accuracy against
novelty; all of them are printed, none is chosen. Where that curve, linear between two of its points, passes the
similarity of the published generator, the accuracies can be compared.

The seconds of the published implementation were measured on one thread with its published sizes, and are given.
"""

import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import load_file

from benchmarks import write
from pdiff_hf import ParameterLayout, TrainConfig, WeightZoo, load_task, run_train
from pdiff_hf.evaluation.baselines import Baseline, StandardizedZoo
from pdiff_hf.evaluation.measures import similarity
from pdiff_hf.evaluation.scoring import Scorer
from pdiff_hf.tasks.digits import DigitsConvNet


PUBLISHED_SECONDS = {"train": 1055 + 1801, "generate": 1270}


# How the generator is trained: the default, with principal components, and with a tighter bottleneck.
VARIANTS: dict[str, dict[str, Any]] = {
    "kl": {},
    "linear": {"autoencoder": "linear"},
    "kl, weight 3": {"kl_weight": 3.0},
    "kl, 16 latents": {"latent_channels": 2, "kl_weight": 1.0},
}


@dataclass(frozen=True)
class Config:
    """Compares with the published implementation."""

    peer: str
    """The safetensors file."""
    averaging: tuple[int, ...] = (1, 100)
    noise: tuple[float, ...] = (0.0, 1.0, 1.5, 2.0)
    seeds: tuple[int, ...] = (0, 1, 2)
    num_networks: int = 100
    """Of each seed."""
    threads: int = 1
    output: str | None = None
    """A JSON file for the figures."""


class PeerTask(DigitsConvNet):
    """The ConvNet of the file, and its test split."""

    def __init__(self, peer: dict[str, torch.Tensor]):
        self.peer = peer

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The file has no validation split, and nothing is chosen here."""
        return self.peer["test_inputs"], self.peer["test_targets"]


def main(config: Config) -> None:
    """Measures and prints."""
    torch.set_num_threads(config.threads)
    peer = load_file(config.peer)
    network = load_task("digits-convnet").build_network()
    rows: list[dict[str, Any]] = []
    at_equal_similarity: dict[str, float] = {}
    print(
        "networks | accuracy: mean, min | similarity | seconds (published: times as many): train, generate 100", end=""
    )
    print(" | at least as accurate and as novel as the published ones")
    with tempfile.TemporaryDirectory() as folder:
        layout = ParameterLayout.from_state_dict(network.state_dict())
        with WeightZoo.create(Path(folder, "zoo"), layout) as zoo:
            for vector in peer["trained"]:
                zoo.append(vector)
        scorer = Scorer(PeerTask(peer), zoo, torch.device("cpu"))
        trained = scorer(zoo.vectors, len(zoo), "trained").wrong

        def row(name: str, vectors: torch.Tensor, **seconds: float) -> tuple[float, float]:
            scores = scorer(lambda some: vectors[some.start : some.stop], len(vectors), name)
            accuracy = scores.test
            figures = {
                "networks": name,
                "mean": accuracy.mean().item(),
                "standard_error": (accuracy.std() / len(accuracy) ** 0.5).item(),
                "min": accuracy.min().item(),
                "similarity": similarity(scores.wrong, trained).amax(1).mean().item(),
                **seconds,
            }
            rows.append(figures)
            figures["as_good"] = figures["mean"] >= rows[0]["mean"] and figures["similarity"] <= rows[0]["similarity"]
            timings = ", ".join(
                f"{seconds[f'{stage}_s']:.2f} ({published_s / seconds[f'{stage}_s']:.0f})" if seconds else ""
                for stage, published_s in PUBLISHED_SECONDS.items()
            )
            print(
                f"{name} | {100 * figures['mean']:.2f} ±{100 * figures['standard_error']:.2f}, "
                f"{100 * figures['min']:.2f} | {figures['similarity']:.3f} | {timings} | {figures['as_good']}",
                flush=True,
            )
            return figures["similarity"], figures["mean"]

        def compare(name: str, points: list[tuple[float, float]]) -> None:
            similarities, means = zip(*sorted(points), strict=True)
            if similarities[0] <= published[0] <= similarities[-1]:
                at_equal_similarity[name] = float(np.interp(published[0], similarities, means))
                print(f"{name}, at the published similarity: {100 * at_equal_similarity[name]:.2f}")

        published = row(
            "published",
            peer["published_generated"],
            train_s=PUBLISHED_SECONDS["train"],
            generate_s=PUBLISHED_SECONDS["generate"],
        )
        standardized = StandardizedZoo(zoo)
        for kind, strengths in (("soup", (16,)), ("gaussian", (1, 2)), ("noise", (1, 2)), ("low-rank-gaussian", (1,))):
            compare(
                kind,
                [
                    row(f"{kind} {strength}", Baseline(standardized, kind, strength).vectors(list(range(300))))
                    for strength in strengths
                ],
            )
        for (variant, changes), averaging in itertools.product(VARIANTS.items(), config.averaging):
            pipes, train_seconds = [], 0.0
            for seed in config.seeds:
                start = time.perf_counter()
                settings = TrainConfig(
                    zoo=str(zoo.folder),
                    output_dir=str(Path(folder, f"pipeline-{variant}-{averaging}-{seed}")),
                    seed=seed,
                    checkpoint_averaging=averaging,
                    checkpointing_steps=10**9,
                    **changes,
                )
                pipes.append(run_train(settings))
                pipes[-1].set_progress_bar_config(disable=True)
                train_seconds += (time.perf_counter() - start) / len(config.seeds)
            points = []
            for noise in config.noise:
                start = time.perf_counter()
                vectors = [
                    pipe(
                        config.num_networks,
                        generator=torch.Generator().manual_seed(seed),
                        parameter_noise=noise,
                        output_type="pt",
                    ).state_dicts
                    for seed, pipe in zip(config.seeds, pipes, strict=True)
                ]
                seconds = (time.perf_counter() - start) / len(config.seeds)
                name = f"ours ({variant}), averages of {averaging}, noise {noise}"
                points.append(row(name, torch.cat(vectors), train_s=train_seconds, generate_s=seconds))
            compare(f"ours ({variant}), averages of {averaging}", points)
    write(config, rows=rows, at_equal_similarity=at_equal_similarity)


if __name__ == "__main__":
    main(tyro.cli(Config))
