"""Zoos larger than memory: opening one, reading a network of it, and writing thousands of generated networks.

Each measurement runs in a fresh process, after its imports:

- open: `WeightZoo(folder)` and one network from the middle of a made-up zoo, as a vector or as a state dict: seconds,
  and by how much resident memory grows. Warm: the files are in the page cache. Cold: they were dropped from it
  (`posix_fadvise`) before each process. The baseline copies all networks into memory.
- generate: `run_generate`, with the share of its time that goes into `WeightZoo.flush`, for a small architecture
  (trained on digits, for a few steps) and a large, made-up one. Against that, the same networks written as plain
  safetensors shards, and as a file of `torch.save` each. Files count as written when they are on the disk.
"""

import json
import os
import shutil
import statistics
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
from safetensors.torch import load_file, save_file

from benchmarks import peak_memory_gb, write
from pdiff_hf import (
    CollectConfig,
    GenerateConfig,
    ParameterLayout,
    TrainConfig,
    WeightZoo,
    run_collect,
    run_generate,
    run_train,
)


# Parameters of the large architecture.
LARGE = 1_000_000


@dataclass(frozen=True)
class Config:
    """Measures reading and writing."""

    gigabytes: float = 10
    """Of the zoo to open. As much memory has to be free for the baseline."""
    sizes: tuple[int, ...] = (1_000_000, 1_898)
    """Parameters of a network in that zoo, which is made once for each."""
    processes: int = 7
    """Fresh processes that open the zoo."""
    small: tuple[int, ...] = (1_000, 10_000)
    """Networks to generate of the small architecture."""
    large: tuple[int, ...] = (250, 1_000)
    """Networks to generate of the large one, with a million parameters."""
    threads: int = 1
    work_dir: str | None = None
    """Where a temporary folder for all files is made."""
    output: str | None = None
    """A JSON file for the figures."""
    only: tuple[str, str, int] | None = None
    """Take one measurement in this process, and print its figures: its name, a folder and a number."""


def make_zoo(folder: str | Path, size: int, num_networks: int) -> None:
    """Points of a smooth random curve, with noise."""
    generator = torch.Generator().manual_seed(0)
    layout = ParameterLayout.from_state_dict({"weight": torch.zeros(size)})
    directions = 0.05 * torch.randn(4, size, generator=generator)
    base = torch.randn(size, generator=generator)
    with WeightZoo.create(folder, layout) as zoo:
        for index in range(num_networks):
            angle = torch.arange(1, 5) * (3 * index / num_networks)
            noise = 0.005 * torch.randn(size, generator=generator)
            zoo.append(base + angle.sin() @ directions + noise)


def main(config: Config) -> None:
    """Takes each measurement in a process of its own."""
    torch.set_num_threads(config.threads)
    if config.only is not None:
        name, folder, number = config.only
        print(json.dumps(MEASUREMENTS[name](Path(folder), number)))
        return
    if config.work_dir is not None:
        Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.work_dir) as scratch:
        rows = [row for size in config.sizes for row in reading(config, size, Path(scratch, f"read-{size}"))]
        rows += writing(config, Path(scratch, "write"))
    write(config, rows=rows)


def fresh(config: Config, name: str, folder: Path, number: int) -> dict[str, Any]:
    """The figures of a measurement in a process of its own."""
    arguments = ["--threads", str(config.threads), "--only", name, str(folder), str(number)]
    command = [sys.executable, "-m", "benchmarks.zoo_io", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def reading(config: Config, parameters: int, folder: Path) -> list[dict[str, Any]]:
    """One network, and all of them."""
    layout = ParameterLayout.from_state_dict({"weight": torch.zeros(parameters)})
    base, count = torch.rand(parameters), round(config.gigabytes * 1e9 / (4 * parameters))
    start = time.perf_counter()
    with WeightZoo.create(folder, layout) as zoo:
        for index in range(count):
            zoo.append(base + index, source="made up", seed=index, step=index, validation_accuracy=0.5)
    size, seconds = megabytes(folder), time.perf_counter() - start
    speed = size / seconds
    print(f"A zoo of {count:,} networks of {parameters:,} parameters, {size / 1e3:.2f} GB: {seconds:.1f} s", end=", ")
    print(f"{speed:.0f} MB/s")
    made = {"parameters": parameters, "networks": count, "mb": size, "s": seconds, "mb_per_s": speed}
    rows: list[dict[str, Any]] = [{"work": "append", **made}]
    print("read | page cache | best, ms | median, ms | of that opening | memory, MB: median | worst")
    for work, processes in (("vector", config.processes), ("state dict", config.processes), ("everything", 1)):
        for cache in ("warm", "cold") if hasattr(os, "posix_fadvise") else ("warm",):
            runs = []
            for turn in range(processes + (cache == "warm")):
                if cache == "cold":
                    forget(folder)
                figures = fresh(config, work, folder, count)
                if cache == "cold" or turn:  # the first one warms the cache
                    runs.append(figures)
            best, median, opening, memory = (
                min(run["ms"] for run in runs),
                *(statistics.median(run[key] for run in runs) for key in ("ms", "open_ms", "memory_mb")),
            )
            worst = max(run["memory_mb"] for run in runs)
            print(
                f"{work} | {cache} | {best:.1f} | {median:.1f} | {opening:.1f} | {memory:.1f} | {worst:.1f}",
                flush=True,
            )
            rows.append(
                {
                    "work": f"read {work}",
                    "parameters": parameters,
                    "page_cache": cache,
                    "processes": processes,
                    "best_ms": best,
                    "median_ms": median,
                    "median_open_ms": opening,
                    "median_memory_mb": memory,
                    "worst_memory_mb": worst,
                }
            )
    everything = rows[-2]["median_ms"]
    for row in rows[1:-2]:
        row["times_faster_than_everything"] = everything / row["median_ms"]
        print(f"{row['work']}, {row['page_cache']}: {everything / row['median_ms']:.0f} times faster than everything")
    shutil.rmtree(folder)
    return rows


def writing(config: Config, folder: Path) -> list[dict[str, Any]]:
    """Generated networks, of a small and of a large architecture."""
    rows: list[dict[str, Any]] = []
    print("networks | parameters | seconds | a second | MB | of that flushing, s | MB/s | peak memory, GB", end=" | ")
    print("as plain shards, s | MB/s | as a file each, s")
    for name, counts, parameters in (("small", config.small, 0), ("large", config.large, LARGE)):
        if counts:
            fresh(config, "pipeline", folder / name, parameters)
        for count in counts:
            row = fresh(config, "generate", folder / name, count)
            row |= fresh(config, "baselines", folder / name, count)
            rows.append({"work": f"generate, {name} architecture", **row})
            print(
                f"{count:,} | {row['parameters']:,} | {row['s']:.2f} | {count / row['s']:.0f} | {row['mb']:.0f} "
                f"| {row['flush_s']:.2f} | {row['mb'] / row['flush_s']:.0f} | {row['peak_memory_gb']:.2f} "
                f"| {row['shards_s']:.2f} | {row['mb'] / row['shards_s']:.0f} "
                f"| {row['files_s']:.2f} ({row['files_s'] / row['flush_s']:.1f} times flushing)",
                flush=True,
            )
    return rows


def read_one(folder: Path, count: int, read: Callable[[WeightZoo, int], Any]) -> dict[str, float]:
    """Opens a zoo and reads the network in the middle."""
    before, peak_before = memory()
    start = time.perf_counter()
    zoo = WeightZoo(folder)
    opened = time.perf_counter()
    network = read(zoo, count // 2)
    done = time.perf_counter()
    after, peak = memory()
    assert len(zoo) == count
    del network
    return {
        "ms": 1e3 * (done - start),
        "open_ms": 1e3 * (opened - start),
        "memory_mb": (peak if peak > peak_before else after) - before,
    }


def read_everything(folder: Path, count: int) -> dict[str, float]:
    """All networks in memory. What `load_file` returns is mapped, and read only when it is copied."""
    before, peak_before = memory()
    start = time.perf_counter()
    networks = [load_file(shard)["networks"].clone() for shard in sorted(folder.glob("networks-*.safetensors"))]
    done = time.perf_counter()
    after, peak = memory()
    assert sum(map(len, networks)) == count
    return {
        "ms": 1e3 * (done - start),
        "open_ms": 0.0,
        "memory_mb": (peak if peak > peak_before else after) - before,
    }


def make_pipeline(folder: Path, parameters: int) -> dict[str, float]:
    """Stages 1 and 2, for as short as it goes: how good the networks are makes no difference to writing them."""
    zoo, pipeline = str(folder / "zoo"), str(folder / "pipeline")
    if parameters:
        make_zoo(zoo, parameters, 50)
    else:
        run_collect(CollectConfig(output_dir=zoo, num_networks=50, epochs=1))
    run_train(
        TrainConfig(zoo=zoo, output_dir=pipeline, autoencoder="linear", unet_steps=50, checkpointing_steps=10**9)
    )
    return {}


def generate(folder: Path, count: int) -> dict[str, float]:
    """Stage 3, with the seconds of `flush`."""
    flushing, flush = 0.0, WeightZoo.flush

    def timed(zoo: WeightZoo) -> None:
        nonlocal flushing
        start = time.perf_counter()
        flush(zoo)
        flushing += time.perf_counter() - start

    WeightZoo.flush = timed  # type: ignore[assignment,method-assign]
    start = time.perf_counter()
    generated = folder / f"generated-{count}"
    config = GenerateConfig(pipeline=str(folder / "pipeline"), output_dir=str(generated), num_networks=count)
    zoo = run_generate(config)
    seconds = time.perf_counter() - start
    assert len(zoo) == count
    return {
        "networks": count,
        "parameters": zoo.vector_size,
        "s": seconds,
        "networks_per_s": count / seconds,
        "mb": megabytes(generated),
        "flush_s": flushing,
        "flush_share": flushing / seconds,
        "peak_memory_gb": memory()[1] / 1e3,
    }


def baselines(folder: Path, count: int) -> dict[str, float]:
    """The same networks as plain shards, and as a file each."""
    zoo = WeightZoo(folder / f"generated-{count}")
    shards, files = folder / f"shards-{count}", folder / f"files-{count}"
    shards.mkdir()
    files.mkdir()
    shards_s = files_s = 0.0
    step = zoo.networks_per_shard
    for first in range(0, count, step):
        networks = zoo.vectors(range(first, min(first + step, count)))
        state_dicts = zoo.layout.unflatten(networks)
        start = time.perf_counter()
        save_file({"networks": networks}, shards / f"{first}.safetensors")
        onto_disk([shards / f"{first}.safetensors"])
        middle = time.perf_counter()
        paths = [files / f"{first + index}.pt" for index in range(len(networks))]
        for path, state_dict in zip(paths, state_dicts, strict=True):
            torch.save(state_dict, path)
        onto_disk(paths)
        shards_s, files_s = shards_s + middle - start, files_s + time.perf_counter() - middle
    return {"shards_s": shards_s, "files_s": files_s, "files_mb": megabytes(files)}


def onto_disk(files: list[Path]) -> None:
    """Waits until files are written."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def memory() -> tuple[float, float]:
    """Resident memory in MB, now and at its peak; where the system does not tell the former, the peak twice."""
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        now, peak = (int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
        return now, peak
    peak = 1e3 * peak_memory_gb()
    return peak, peak


def forget(folder: Path) -> None:
    """Drops a folder's files, which are on the disk, from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as content:
            os.posix_fadvise(content.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def megabytes(folder: Path) -> float:
    """Of the files of a folder."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6


MEASUREMENTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "vector": lambda folder, count: read_one(folder, count, lambda zoo, index: zoo[index]),
    "state dict": lambda folder, count: read_one(folder, count, lambda zoo, index: zoo.state_dict(index)),
    "everything": read_everything,
    "pipeline": make_pipeline,
    "generate": generate,
    "baselines": baselines,
}


if __name__ == "__main__":
    main(tyro.cli(Config))
