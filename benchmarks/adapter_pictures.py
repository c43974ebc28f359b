"""Adapters of a diffusion model for classes that it was never adapted to, and what is drawn with them.

A U-Net of diffusers learns to draw scikit-learn's digits, each turned and mirrored in eight ways: 80 classes. A LoRA
makes it draw one: `pdiff-hf collect` trains some for each of 56 classes, and for two distorted forms of each, whose
condition is the mean image. Then `train --family neuron`, which is asked for 16 classes that no adapter was trained
for, in no form. Each adapter is loaded with `load_lora_weights`, and draws; another network says how many of its
pictures are of the class. Prints this share for generated adapters, for those of a shuffled condition, for what needs
no generator, for adapters trained on the class, and for the base model; and draws some of them.

A killed benchmark goes on where it was; a training or an audit that was killed begins anew.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn
from torch.nn import functional as F

from benchmarks import fit, minutes_of, write
from pdiff_hf import (
    AdaptedNetwork,
    CollectConfig,
    GenerateConfig,
    NeuronTrainConfig,
    Task,
    WeightZoo,
    lora,
    run_collect,
    run_generate,
)
from pdiff_hf.align import run_align
from pdiff_hf.configs import AlignConfig
from pdiff_hf.evaluation.regression import answers
from pdiff_hf.extras import require
from pdiff_hf.files import is_zoo
from pdiff_hf.networks.behaviour import VARIANCE_NETWORKS, Behaviour, run_at_once
from pdiff_hf.networks.gauge import Gauge
from pdiff_hf.parallel import processes
from pdiff_hf.tasks import TaskFamily, half_cosine
from pdiff_hf.tasks.family import training_inputs
from pdiff_hf.tasks.prototypes import DigitClass, images_of, mean_image
from pdiff_hf.zoo import evenly


FOLDER = Path("runs/adapter-pictures")
CLASSES = [DigitClass(digit, 0, way) for digit in range(10) for way in range(8)]
# Places of those of a split, in an order drawn once, and forms of each: distorted, but for the first.
PLACES_OF = {"train": slice(24, None), "validation": slice(16, 24), "test": slice(16)}
FORMS_OF = {"train": 3, "validation": 1, "test": 1}
# Pretraining, and the network that judges; adapters: noises of each example, their steps, rank.
PRETRAINING, JUDGING, NOISES, EPOCHS, RANK = 5000, 2000, 8, 10, 2
# All linear layers that do something where the context is always the same.
TARGETS = ["time_emb_proj", *(f"attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))]
TARGETS += ["attn2.to_v", "attn2.to_out.0"]
STEPS, PICTURES = 20, 32
# Of the losses of the generator and of the hypernetwork: pictures a step, and adapters.
INPUTS, BATCH = 8, 16


class Denoiser(nn.Module):
    """A U-Net as one that takes a picture and its noise level in two channels, and predicts the clean picture."""

    def __init__(self, unet: Any):
        super().__init__()
        self.unet = unet
        # `torch.vmap` runs fused attention network by network.
        unet.set_attn_processor(AttnProcessor())

    def forward(self, noisy: torch.Tensor) -> torch.Tensor:
        """Of pictures with noise and timesteps, `[B, 2, 8, 8]`: clean ones `[B, 1, 8, 8]`."""
        clean: torch.Tensor = self.unet(noisy[:, :1], noisy[:, 1, 0, 0], noisy.new_ones(len(noisy), 1, 8)).sample
        return clean


class Draw(DiffusionPipeline, require("diffusers.loaders", "adapters").StableDiffusionLoraLoaderMixin):  # type: ignore[misc]
    """Draws pictures with a U-Net that predicts clean ones."""

    def __init__(self, unet: UNet2DConditionModel, scheduler: DDIMScheduler):
        super().__init__()
        self.text_encoder = None
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, count: int, seed: int) -> torch.Tensor:
        """So many pictures, `[n, 1, 8, 8]`."""
        sample = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(STEPS)
        for step in self.scheduler.timesteps:
            clean = self.unet(sample, step, sample.new_ones(count, 1, 8)).sample
            sample = self.scheduler.step(clean, step, sample).prev_sample
        return sample


def scheduler() -> DDIMScheduler:
    """Of clean pictures."""
    return DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False)


def with_noise(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures with noise and its timestep, `[n, 2, 8, 8]`."""
    steps = torch.randint(1000, (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    noisy = scheduler().add_noise(images, noise, steps)
    return torch.cat([noisy, steps.view(-1, 1, 1, 1).expand(-1, -1, 8, 8).float()], 1)


def _trained(network: nn.Module, steps: int, loss: Any) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([images_of(one, "train") for one in CLASSES])  # [80, 75, 1, 8, 8]

    def of_some() -> torch.Tensor:
        classes = torch.randint(len(CLASSES), (64,), generator=generator)
        some = images[classes, torch.randint(images.shape[1], (64,), generator=generator)]
        return loss(network, some, classes, generator)

    fit(network, steps, 2e-3, 1e-2, of_some)
    return network.eval()


@cache
def base() -> Denoiser:
    """The diffusion model of all classes."""
    folder = FOLDER / "base"
    if not (folder / "config.json").exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = UNet2DConditionModel(
                sample_size=8,
                in_channels=1,
                out_channels=1,
                block_out_channels=(16, 32),
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                layers_per_block=1,
                cross_attention_dim=8,
                attention_head_dim=8,
                norm_num_groups=8,
            )
            _trained(
                Denoiser(unet),
                PRETRAINING,
                lambda network, images, classes, generator: F.mse_loss(network(with_noise(images, generator)), images),
            )
        unet.save_pretrained(folder)
    return Denoiser(UNet2DConditionModel.from_pretrained(folder)).eval()


@cache
def judge() -> nn.Module:
    """Says of which of the 80 classes a picture is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, len(CLASSES))),
        )

        def loss(network: nn.Module, images: torch.Tensor, classes: torch.Tensor, generator: Any) -> torch.Tensor:
            noisy = images + 0.2 * torch.randn(images.shape, generator=generator)
            return F.cross_entropy(network(noisy), classes)

        return _trained(network, JUDGING, loss)


class DrawsClass(Task):
    """A LoRA that makes the model draw one class, or a distorted form of it."""

    epochs = EPOCHS
    batch_size = 32
    learning_rate = 1e-2

    def __init__(self, one: DigitClass):
        self.one = one

    def build_network(self) -> nn.Module:
        return AdaptedNetwork(base(), lora(base(), TARGETS, RANK, prefix=""))

    def data(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures with noise, and without."""
        images = images_of(self.one, split).repeat(NOISES, 1, 1, 1)
        return with_noise(images, torch.Generator().manual_seed(0)), images

    def learning_rate_factor(self, progress: float) -> float:
        return half_cosine(progress)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs, targets)

    def probabilities(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs

    def correct(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Whether a predicted picture is nearly the clean one."""
        return (predictions - targets).square().flatten(1).mean(1) < 0.1


@cache
def _forms() -> tuple[list[DigitClass], torch.Tensor]:
    """All classes in all forms, and their mean images, `[n, 64]`."""
    forms = [one._replace(warp=form) for one in CLASSES for form in range(FORMS_OF["train"])]
    return forms, torch.tensor([mean_image(one) for one in forms])


def class_of(condition: dict[str, Any]) -> DigitClass:
    """The class, and its form, that a condition describes."""
    forms, means = _forms()
    return forms[int((means - torch.tensor(condition["mean"])).square().sum(1).argmin())]


class DrawsClasses(TaskFamily):
    """A class is a digit, turned or mirrored, and described by its mean image: `{"mean": [64 pixels]}`."""

    def conditions(self, split: str) -> list[dict[str, Any]]:
        order = torch.randperm(len(CLASSES), generator=torch.Generator().manual_seed(0)).tolist()
        classes = [
            CLASSES[place]._replace(warp=form) for place in order[PLACES_OF[split]] for form in range(FORMS_OF[split])
        ]
        return [{"mean": list(mean_image(one))} for one in classes]

    def task(self, condition: dict[str, Any]) -> Task:
        return DrawsClass(class_of(condition))


@dataclass(frozen=True)
class Config:
    """Generates adapters of a diffusion model for classes that it was never adapted to, and draws with them."""

    networks_per_task: int = 1
    """Adapters of each form of a training class."""
    transformer_steps: int = 1000
    """Of the generator's training."""
    seed: int = 0
    """Of the generator."""
    threads: int = 2
    """Of torch."""
    output: str | None = None
    """Where the figures go: a JSON file."""
    picture: str | None = None
    """Where the picture goes."""


def drawn(adapters: Sequence[dict[str, torch.Tensor]] | None, count: int) -> torch.Tensor:
    """What each adapter, or the base model alone, draws, `[A, count, 1, 8, 8]`."""
    pictures = []
    for seed, adapter in enumerate([None] if adapters is None else adapters):
        pipe = Draw(UNet2DConditionModel.from_pretrained(FOLDER / "base"), scheduler())
        if adapter is not None:
            pipe.load_lora_weights(dict(adapter))
        pictures.append(pipe(count, seed))
    return torch.stack(pictures)


def share(pictures: torch.Tensor, asked: Sequence[dict[str, Any]]) -> float:
    """The share of the pictures `[A, n, 1, 8, 8]` that are of the class that was asked for."""
    network = judge()
    with torch.no_grad():
        judged = network(pictures.flatten(0, 1)).argmax(1).view(len(pictures), -1)
    places = torch.tensor([CLASSES.index(class_of(condition)) for condition in asked])
    return (judged == places[:, None]).float().mean().item()


def measure(config: Config) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The share of each group of adapters, and what they drew."""
    family, family_name = DrawsClasses(), "benchmarks.adapter_pictures:DrawsClasses"
    zoo = run_collect(CollectConfig(family_name, str(FOLDER / "zoo"), networks_per_task=config.networks_per_task))
    fresh = run_collect(
        CollectConfig(family_name, str(FOLDER / "fresh"), networks_per_task=1, split="test", seed=10**6)
    )
    if not is_zoo(FOLDER / "aligned"):
        run_align(AlignConfig(str(zoo.folder), str(FOLDER / "aligned"), task=family_name))
    aligned = WeightZoo(FOLDER / "aligned")
    if len(aligned) != len(zoo):
        raise SystemExit(f"{zoo.folder} has grown: remove {aligned.folder}.")
    gauge, vectors = Gauge(zoo.layout), aligned.vectors()
    folder = FOLDER / f"seed-{config.seed}"
    minutes = minutes_of(
        NeuronTrainConfig(
            zoo=str(FOLDER / "aligned"),
            output_dir=str(folder / "pipeline"),
            task=family_name,
            condition=("mean",),
            initial=False,
            seed=config.seed,
            # As those of `benchmarks.adapters`.
            behaviour_weight=256.0,
            last_sigma=0.9,
            min_sigma=0.9,
            behaviour_inputs=INPUTS,
            batch_size=BATCH,
            transformer_steps=config.transformer_steps,
            checkpointing_steps=10**9,
        )
    )
    asked = family.conditions("test")

    def generated(conditions: list[dict[str, Any]], part: str) -> list[dict[str, torch.Tensor]]:
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in conditions))
        made = run_generate(
            GenerateConfig(
                pipeline=str(folder / "pipeline"),
                output_dir=str(folder / part),
                num_networks=len(conditions),
                conditions=str(folder / f"{part}.jsonl"),
            )
        )
        return [made.state_dict(index) for index in range(len(made))]

    layout = zoo.layout.fit([vectors])
    networks = layout.normalize(vectors)

    def adapters(flat: torch.Tensor) -> list[dict[str, torch.Tensor]]:
        return layout.unflatten(layout(flat, return_dict=False)[0])

    groups: dict[str, torch.Tensor] = {
        "generated": drawn(generated(asked, "generated"), PICTURES),
        "shuffled condition": drawn(generated(asked[1:] + asked[:1], "shuffled"), PICTURES),
    }
    rows = [{"mean": row["mean"]} for row in zoo.rows()]
    inputs, device = training_inputs(family), processes().device
    side_by_side = run_at_once(family.task(asked[0]).build_network(), layout, inputs)
    some = networks[list(evenly(len(networks), VARIANCE_NETWORKS))]
    behaviour = None
    if device.type != "cpu":  # where the hypernetwork would learn for hours what its adapters draw
        behaviour = Behaviour(side_by_side, copy.deepcopy(layout).to(device), inputs.to(device), some, INPUTS)
    known = family.conditions("validation")
    for name, answer in answers(
        rows,
        networks,
        behaviour,
        config.seed,
        lambda answer: share(drawn(adapters(answer(known)), PICTURES), known),
        lambda near: layout.normalize(gauge.mix(vectors[near])[None])[0],
        config.transformer_steps * BATCH,
    ).items():
        alone = ", on weights alone" if name == "hypernetwork" and behaviour is None else ""
        groups[name + alone] = drawn(adapters(answer(asked)), PICTURES)
    groups["trained on the class"] = drawn([fresh.state_dict(index) for index in range(len(fresh))], PICTURES)
    groups["base model"] = drawn(None, PICTURES).expand(len(asked), -1, -1, -1, -1)
    shares = {name: share(pictures, asked) for name, pictures in groups.items()}
    return {"minutes": minutes, "classes": len(asked), "shares": shares}, groups


def draw(groups: dict[str, torch.Tensor], file: str) -> None:
    """A line a class: its mean image, and four pictures of each of some groups."""
    plt = require("matplotlib.pyplot", "report")
    asked = DrawsClasses().conditions("test")[::2]
    names = ("base model", "trained on the class", "generated", "mix of the nearest")
    figure, axes = plt.subplots(len(asked), 1 + 4 * len(names), figsize=(11, 0.62 * len(asked)))
    for line, condition in zip(axes, asked, strict=True):
        place = DrawsClasses().conditions("test").index(condition)
        pictures = [torch.tensor(condition["mean"]).view(8, 8)]
        pictures += [one[0] for name in names for one in groups[name][place, :4]]
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture, cmap="gray_r", vmin=-1, vmax=1)
            axis.axis("off")
    for start, name in zip((0, *range(1, 4 * len(names), 4)), ("asked", *names), strict=True):
        axes[0, start].set_title(name, loc="left", fontsize=8)
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main(config: Config) -> None:
    """Prints a line a group."""
    torch.set_num_threads(config.threads)
    figures, groups = measure(config)
    print("adapters | pictures of the class that was asked for, %")
    for name, value in figures["shares"].items():
        print(f"{name} | {100 * value:.1f}")
    print(f"The generator was trained for {figures['minutes']:.1f} minutes.")
    write(config, **figures)
    if config.picture is not None:
        draw(groups, config.picture)


if __name__ == "__main__":
    main(tyro.cli(Config))
