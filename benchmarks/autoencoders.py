"""The linear autoencoder (principal components, in closed form) against the trained convolutional VAE, with and
without the behaviour loss, at equal latent size on the same zoos.

Each candidate runs in a process of its own: `pdiff-hf train` with its arguments, then 100 networks with the defaults.
Prints seconds of the autoencoder and of the denoiser, peak memory, and for originals, reconstructions and generated
networks mean and minimum accuracy on the test split; similarity of the generated ones to the most similar training
network; their spread (mean standard deviation of a parameter over that of the originals); and, where the audit runs
(the digits tasks), the gain over the front of the baselines at equal similarity. Then the means over the seeds.

Data for MNIST and Fashion-MNIST: see `pdiff_hf/tasks/images.py`; `--peer FILE` adds the published generator's zoo.
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

from benchmarks import peak_memory_gb, write
from benchmarks.peer import PeerTask
from pdiff_hf import CollectConfig, Task, TrainConfig, WeightZoo, evaluate, load_task, run_collect, run_train
from pdiff_hf.evaluation.measures import similarity
from pdiff_hf.evaluation.scoring import Scorer
from pdiff_hf.train import LOSSES
from pdiff_hf.zoo import make_layout


# Name, its task, networks of the zoo, whether the whole audit runs.
ZOOS = {
    "digits-convnet": ("digits-convnet", 200, True),
    "digits-mlp": ("digits-mlp", 200, True),
    "digits-resnet": ("digits-resnet", 200, True),
    "fashion-mlp3": ("benchmarks.images:FashionMLP3", 200, False),
    "mnist-mlp-1m": ("benchmarks.images:MNISTMLP1M", 50, False),
}
PEER = "peer"
# Makes the zoo, so that no candidate does.
ZOO = "zoo"
CANDIDATES: dict[str, dict[str, Any]] = {
    "linear": {"autoencoder": "linear"},
    "kl": {"autoencoder": "kl"},
    "kl, behaviour": {"autoencoder": "kl", "behaviour_weight": 1.0},
}
SUMMARIZED = ("generated_mean", "generated_min", "similarity", "accuracy_gain")


@dataclass(frozen=True)
class Config:
    """Compares autoencoders of parameters."""

    zoos: tuple[str, ...] = tuple(ZOOS)
    peer: str | None = None
    """The safetensors file of the published generator's zoo."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the zoo, and of all that is trained on it."""
    num_networks: int = 100
    """To generate."""
    threads: int = 1
    work_dir: str = "runs/autoencoders"
    """Where zoos and pipelines go."""
    output: str | None = None
    """A JSON file for the figures."""
    only: tuple[str, str] | None = None
    """A zoo and a candidate: measure the first seed in this process, and print it."""


def zoo_of(config: Config, name: str, seed: int) -> tuple[Task, WeightZoo]:
    """A zoo, made where it lacks, and what its networks do."""
    folder = Path(config.work_dir, f"{name}-{seed}", "zoo")
    if name != PEER:
        task, count, _ = ZOOS[name]
        zoo = run_collect(CollectConfig(task=task, num_networks=count, output_dir=str(folder), seed=seed))
        return load_task(task), zoo
    assert config.peer is not None
    peer = load_file(config.peer)
    task_of_peer = PeerTask(peer)
    if not folder.exists():
        layout = make_layout(task_of_peer.build_network().state_dict(), ("*",))
        with WeightZoo.create(folder, layout, task="digits-convnet") as made:
            for vector in peer["trained"]:
                made.append(vector)
    return task_of_peer, WeightZoo(folder)


def measure(config: Config, name: str, candidate: str) -> dict[str, Any]:
    """The figures of one candidate on one zoo."""
    seed = config.seeds[0]
    task, zoo = zoo_of(config, name, seed)
    if candidate == ZOO:
        return {}
    before = peak_memory_gb()
    folder = Path(config.work_dir, f"{name}-{seed}", candidate.replace(", ", "-"))
    start = time.perf_counter()
    pipe = run_train(
        TrainConfig(
            zoo=str(zoo.folder),
            output_dir=str(folder),
            seed=seed,
            checkpointing_steps=10**9,
            task=None if name == PEER else ZOOS[name][0],
            **CANDIDATES[candidate],
        )
    )
    seconds = time.perf_counter() - start
    peak = peak_memory_gb()
    rows = [json.loads(line) for line in (folder / LOSSES).read_text(encoding="utf-8").splitlines()]
    scorer = Scorer(task, zoo, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    made = pipe(num_networks=config.num_networks, generator=generator, output_type="pt").state_dicts
    originals = zoo.vectors()
    scores = {
        "original": scorer(lambda some: originals[some.start : some.stop], len(zoo), "original"),
        "reconstructed": scorer(
            lambda some: pipe.decode(pipe.encode(originals[some.start : some.stop])), len(zoo), "reconstructed"
        ),
        "generated": scorer(lambda some: made[some.start : some.stop], len(made), "generated"),
    }
    varied = originals.std(0) > 0
    gain = None
    if name in ZOOS and ZOOS[name][2]:
        gain = evaluate(task, trained=zoo, generated=pipe, num_networks=config.num_networks)["verdict"][
            "accuracy_gain"
        ]
    return {
        "zoo": name,
        "parameters": zoo.vector_size,
        "autoencoder": candidate,
        "seed": seed,
        "latents": pipe.latent_shape[0] * pipe.latent_shape[1],
        "train_s": seconds,
        "autoencoder_steps": sum(row["objective"] == "autoencoder" for row in rows),
        "memory_before_gb": before,
        "peak_memory_gb": peak,
        **{
            f"{group}_{key}": getattr(values.test, key)().item()
            for group, values in scores.items()
            for key in ("mean", "min")
        },
        "similarity": similarity(scores["generated"].wrong, scores["original"].wrong).amax(1).mean().item(),
        "spread": (made.std(0)[varied] / originals.std(0)[varied]).mean().item(),
        "accuracy_gain": gain,
    }


def main(config: Config) -> None:
    """Measures each candidate in a process of its own."""
    torch.set_num_threads(config.threads)
    if config.only is not None:
        print(json.dumps(measure(config, *config.only)))
        return
    rows: list[dict[str, Any]] = []
    print(
        "zoo | autoencoder | seed | train, s | peak, GB (before) | trained: mean, min | reconstructed: mean, min",
        end="",
    )
    print(" | generated: mean, min | similarity | spread | gain over the front, points")
    names = [*config.zoos, *([PEER] if config.peer else [])]
    for name, seed, candidate in itertools.product(names, config.seeds, (ZOO, *CANDIDATES)):
        arguments = ["--seeds", str(seed), "--num-networks", str(config.num_networks), "--work-dir", config.work_dir]
        arguments += ["--threads", str(config.threads), *(["--peer", config.peer] if config.peer else [])]
        command = [sys.executable, "-m", "benchmarks.autoencoders", *arguments, "--only", name, candidate]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        if candidate == ZOO:
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        groups = (
            f"{100 * row[f'{group}_mean']:.2f}, {100 * row[f'{group}_min']:.2f}"
            for group in ("original", "reconstructed", "generated")
        )
        gain = "-" if row["accuracy_gain"] is None else f"{100 * row['accuracy_gain']:+.2f}"
        print(
            f"{name} | {candidate} | {seed} | {row['train_s']:.1f} | {row['peak_memory_gb']:.2f} "
            f"({row['memory_before_gb']:.2f}) | {' | '.join(groups)} | {row['similarity']:.3f} | {row['spread']:.3f} "
            f"| {gain}",
            flush=True,
        )
    summary = summarize(rows)
    print(f"\nzoo | autoencoder | mean over seeds of {', '.join(SUMMARIZED)}")
    for row in summary:
        print(" | ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    write(config, rows=rows, summary=summary)


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds."""
    summary = []
    for name, candidate in dict.fromkeys((row["zoo"], row["autoencoder"]) for row in rows):
        same = [row for row in rows if (row["zoo"], row["autoencoder"]) == (name, candidate)]
        known = [key for key in SUMMARIZED if all(row[key] is not None for row in same)]
        means = {key: statistics.mean(row[key] for row in same) for key in known}
        summary.append({"zoo": name, "autoencoder": candidate, **means})
    return summary


if __name__ == "__main__":
    main(tyro.cli(Config))
