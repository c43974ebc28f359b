"""What the page of `pdiff-hf play` shows, without the page."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch.nn import functional as F

from .errors import TaskError, ZooError
from .evaluation.measures import similarity
from .evaluation.subjects import check_together
from .files import is_zoo
from .hub.cards import UNKNOWN_TASK
from .hub.pipeline_files import pipeline_folder
from .hub.pipelines import load_pipeline
from .info import verdict_of_card
from .networks.predictor import Predictor
from .parallel import processes
from .pipelines.neural_network_diffusion.pipeline import draw_seed
from .runs import zoo_of_training
from .schedulers import replacement
from .tasks import Task, load_family
from .tasks.task import trusted_name
from .text import printable
from .zoo import WeightZoo, evenly


# Training networks in the plane, test images to choose from, stops of a walk, pictures of a denoising.
TRAINED, IMAGES, STOPS, PICTURES = 100, 24, 13, 8
# By so many the mean of what is drawn is known.
DRAWS = 100


class Playground:
    r"""
    What the page shows, without the page.

    Args:
        pipeline (`str`): Its folder, or its name on the Hub, whose code is not run.
        task (`str`, *optional*): What the networks do; by default what the pipeline's card names, if it is built in.
        zoo (`str`, *optional*):
            The training networks, to compare with; by default those that the training in the folder names, if it is a
            zoo in a folder here, and the task is no family.

    Raises:
        [`PdiffError`]: there is no such pipeline, task or zoo.
    """

    def __init__(self, pipeline: str, task: str | None = None, zoo: str | None = None):
        folder = pipeline_folder(pipeline)
        self.pipe = load_pipeline(folder).to(processes().device)
        self.pipe.set_progress_bar_config(disable=True)
        file = folder / "README.md"
        card = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        named = re.search(r"networks for the task `([^`]+)`", card)
        self.name = trusted_name(task, named[1] if named and named[1] != UNKNOWN_TASK else None)
        # Its sentence, after the label where there is a verdict, and without what Markdown would make of it.
        sentence = " ".join(verdict_of_card(folder)).partition("**: ")[2]
        self.verdict = re.sub(r"([^\w\s.,:%+()-])", r"\\\1", printable(sentence))
        self.family = load_family(self.name)
        encoder = self.pipe.condition_encoder
        self.columns: list[dict[str, Any]] = [] if encoder is None else encoder.config.columns
        self.example = self.family.conditions("test")[0]
        if lacking := self.example.keys() - {column["name"] for column in self.columns}:
            raise TaskError(
                f"{pipeline} cannot be asked for {sorted(lacking)[0]!r}, by which the tasks of {self.name} differ."
            )
        first = self.family.task(self.example)
        try:
            self.pipe.layout.flatten(first.build_network().state_dict())
        except ValueError as error:
            raise TaskError(f"{pipeline} generates no networks of {self.name}: {error}") from error
        self.images = first.data("test")[0].cpu()
        self._one_at_a_time = threading.Lock()
        self._predictor = Predictor(first, self.pipe.layout, self.pipe.device)
        self.trained: tuple[torch.Tensor, torch.Tensor] | None = None
        self._trained_rows: list[dict[str, Any]] = []
        if zoo is not None and self.example:
            raise ZooError(f"Networks of {zoo} do different tasks of {self.name}, and are not compared: leave it out.")
        networks = None
        if zoo is not None:
            networks = self._comparable(WeightZoo.from_pretrained(zoo), pipeline)
        elif not self.example:
            networks = self._known_zoo(folder)
        if networks is not None:
            vectors = networks.vectors(evenly(len(networks), TRAINED))
            accuracies, wrong = self.trained = self.score(vectors, first)
            overlap = similarity(wrong, wrong).fill_diagonal_(-1).amax(1)
            pairs = zip(accuracies.tolist(), overlap.tolist(), strict=True)
            self._trained_rows = [{"accuracy, %": 100 * a, "similarity": s, "networks": "trained"} for a, s in pairs]

    def _comparable(self, zoo: WeightZoo, pipeline: str | Path) -> WeightZoo:
        """A zoo with whose networks generated ones can be compared. Raises [`ZooError`] where they cannot."""
        check_together(zoo, self.pipe.layout, pipeline)
        if len(zoo) < 2:
            raise ZooError(f"{zoo.folder} holds fewer than two networks: similarity to training networks needs more.")
        return zoo

    def _known_zoo(self, folder: Path) -> WeightZoo | None:
        """The training networks, where a folder says which they are, and they are here."""
        place = zoo_of_training(folder)
        with suppress(ZooError):
            if place is not None and is_zoo(Path(place)):
                return self._comparable(WeightZoo(place), folder)
        return None

    @property
    def draws(self) -> bool:
        """Whether inputs are pictures: `[N, 1 or 3, H, W]`."""
        return self.images.ndim == 4 and self.images.shape[1] in (1, 3)

    def score(self, vectors: torch.Tensor, task: Task) -> tuple[torch.Tensor, torch.Tensor]:
        """Accuracies `[N]` on the test split, and wrong answers, boolean `[N, E]`."""
        inputs, targets = task.data("test")
        predictions = self._predict(vectors, inputs, task)
        wrong = ~torch.stack([task.correct(one, targets.cpu()) for one in predictions])
        return 1 - wrong.float().mean(1), wrong

    def networks(self, condition: dict[str, Any], count: int, seed: int, guidance: float) -> Iterator[torch.Tensor]:
        """Networks, one after the other, as vectors `[1, P]`."""
        for one in range(seed, seed + count):
            yield self._sample(condition, generator=torch.Generator().manual_seed(one), guidance_scale=guidance)

    def places(self, vectors: torch.Tensor, condition: dict[str, Any], number: int = 1) -> list[dict[str, Any]]:
        """Where networks, whose numbers count up from this one, are in the plane of accuracy and, where a zoo is
        there, similarity; and then where those of the zoo are."""
        accuracies, wrong = self.score(vectors, self.family.task(condition or self.example))
        rows = []
        for index, accuracy in enumerate(accuracies.tolist()):
            row = {"network": number + index, "accuracy, %": 100 * accuracy, "networks": "generated"}
            if self.trained is not None:
                row["similarity"] = similarity(wrong[index : index + 1], self.trained[1]).max().item()
            rows.append(row)
        return rows + self._trained_rows

    def together(self, vectors: torch.Tensor, condition: dict[str, Any]) -> float:
        """The accuracy of the ensemble."""
        task = self.family.task(condition or self.example)
        inputs, targets = task.data("test")
        predictions = self._predict(vectors, inputs, task).mean(0)
        return task.correct(predictions, targets.cpu()).float().mean().item()

    def classify(self, vectors: torch.Tensor, image: torch.Tensor, condition: dict[str, Any]) -> torch.Tensor:
        """What networks that were asked for say to an image `[C, H, W]`: probabilities `[N, classes]`."""
        return self._predict(vectors, image[None], self.family.task(condition or self.example))[:, 0]

    def drawn(self, ink: np.ndarray) -> torch.Tensor:
        """A drawing, 0 to 1 `[height, width]`, as the inputs are: cut out, centred, at their size and range."""
        rows, columns = np.nonzero(ink > 0.1)
        channels, height, width = self.images.shape[1:]
        low, high = self.images.min().item(), self.images.max().item()
        if not len(rows):
            return torch.full((channels, height, width), low)
        cut = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        side = max(cut.shape)
        square = np.zeros((side, side))
        top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
        square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut
        small = F.interpolate(torch.tensor(square)[None, None], (height, width), mode="area")[0].float()
        return low + (high - low) * (small / small.max()).expand(channels, -1, -1)

    def walk(self, first: int, second: int, condition: dict[str, Any]) -> list[dict[str, float]]:
        """Accuracies on the way from the noise (and the initialization, where the denoiser is told it) of one seed to
        that of another, without further noise on the way, along a circle: it stays noise."""
        angles = torch.linspace(0, math.pi / 2, STOPS)
        # Noise first, and initializations then, as the pipeline draws them for these seeds.
        ends = [torch.Generator().manual_seed(draw_seed(torch.Generator().manual_seed(s))) for s in (first, second)]

        def between(drawn: torch.Tensor, mean: torch.Tensor | float = 0.0) -> torch.Tensor:
            start, end = drawn - mean
            shares = [part.reshape(-1, *[1] * start.ndim) for part in (angles.cos(), angles.sin())]
            return mean + shares[0] * start + shares[1] * end

        noise = torch.cat([torch.randn(1, *self.pipe.latent_shape, generator=end) for end in ends])
        arguments = {"latents": between(noise)}
        if self.pipe.takes_initial:
            # Unlike noise, they have a mean: constants stay what they are.
            many = [torch.Generator().manual_seed(seed) for seed in range(DRAWS)]
            draw = self.pipe.layout.draw_initial
            arguments["initial"] = between(draw(ends), draw(many).mean(0))
        vectors = self._sample(condition, deterministic(self.pipe.scheduler), **arguments)
        accuracies, _ = self.score(vectors, self.family.task(condition or self.example))
        return [
            {"way": step / (STOPS - 1), "accuracy, %": 100 * accuracy}
            for step, accuracy in enumerate(accuracies.tolist())
        ]

    def denoising(self, seed: int, condition: dict[str, Any]) -> tuple[list[dict[str, float]], list[np.ndarray]]:
        """Accuracy after each step of the denoising of a network, and pictures of its largest matrix."""
        steps: list[torch.Tensor] = []

        def keep(_: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            steps.append(self.pipe.decode(tensors["latents"]))
            return tensors

        self._sample(condition, generator=torch.Generator().manual_seed(seed), callback_on_step_end=keep)
        vectors = torch.cat(steps).cpu()
        accuracies, _ = self.score(vectors, self.family.task(condition or self.example))
        rows = [{"step": step + 1.0, "accuracy, %": 100 * a} for step, a in enumerate(accuracies.tolist())]
        shown = torch.linspace(0, len(vectors) - 1, min(PICTURES, len(vectors))).round().long()
        dicts = self.pipe.layout.unflatten(vectors[shown])
        name = max(self.pipe.layout.slices, key=lambda one: dicts[0][one].numel())
        matrices = [one[name].float().flatten(1) if one[name].ndim > 1 else one[name].float()[None] for one in dicts]
        return rows, [heat(matrix, matrices[-1].abs().max().item()) for matrix in matrices]

    def _predict(self, vectors: torch.Tensor, inputs: torch.Tensor, task: Task) -> torch.Tensor:
        with self._one_at_a_time:  # visitors share a network
            return self._predictor.of(task)(vectors, inputs)

    def _sample(self, condition: dict[str, Any], scheduler: Any = None, **arguments: Any) -> torch.Tensor:
        if condition:
            arguments["condition"] = condition
        with self._one_at_a_time:  # visitors share a pipeline
            own = self.pipe.scheduler
            try:
                self.pipe.scheduler = scheduler or own
                vectors: torch.Tensor = self.pipe(**arguments, output_type="pt").state_dicts
            finally:
                self.pipe.scheduler = own
        return vectors.cpu()


def deterministic(scheduler: Any) -> Any:
    """A scheduler of the same noise that adds none while sampling."""
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return type(scheduler).from_config(scheduler.config, stochastic_sampling=False)
    if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):  # which adds none
        return type(scheduler).from_config(scheduler.config)
    return replacement("DDIMScheduler", scheduler)


def heat(matrix: torch.Tensor, most: float) -> np.ndarray:
    """A matrix as a picture, RGB uint8: red above zero, blue below, white at it; `most` is full colour."""
    share = (matrix / (most or 1)).clamp(-1, 1)
    red, blue = 1 + share.clamp(max=0), 1 - share.clamp(min=0)
    picture = torch.stack([red, torch.minimum(red, blue), blue], -1)
    scale = max(1, 240 // max(picture.shape[:2]))
    return (255 * picture).byte().numpy().repeat(scale, 0).repeat(scale, 1)


def grey(image: torch.Tensor) -> np.ndarray:
    """An input `[C, H, W]` as a picture, `[height, width, 3]` uint8."""
    low, high = image.min(), image.max()
    picture = ((image - low) / (high - low).clamp_min(1e-6)).expand(3, -1, -1).permute(1, 2, 0)
    scale = max(1, 64 // max(picture.shape[:2]))
    return (255 * picture).byte().numpy().repeat(scale, 0).repeat(scale, 1)


def names_of(classes: int, families: bool) -> list[str]:
    """What the classes of a task are called: of a family's tasks with two, whether an input is meant."""
    return ["no", "yes"] if families and classes == 2 else [str(one) for one in range(classes)]


def each_said(probabilities: torch.Tensor, families: bool) -> list[dict[str, Any]]:
    """What each of networks `[N, classes]` says, and how sure it is."""
    names, best = names_of(probabilities.shape[1], families), probabilities.max(-1)
    return [
        {"network": number, "says": names[place], "sure, %": round(100 * sure, 1)}
        for number, (place, sure) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True), 1)
    ]


def said(probabilities: torch.Tensor, families: bool) -> str:
    """What networks `[N, classes]` say, in words."""
    answers = probabilities.argmax(-1)
    most = int(answers.mode().values)
    name = names_of(probabilities.shape[1], families)[most]
    word = f"class {name}" if name.isdigit() else {"yes": "yes, it counts", "no": "no, it does not count"}[name]
    return f"**{word}**, say {int((answers == most).sum())} of {len(answers)} networks"
